"""What is wrong with a bundle, and where: the stages between a checkpoint and an answer, in order."""
