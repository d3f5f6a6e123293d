"""Diagnosis of a bundle: compares each stage between checkpoint and answer, in order, with the checkpoint."""
