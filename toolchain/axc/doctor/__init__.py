"""What is wrong with a bundle, held against the checkpoint that it was built from, and why: `axc doctor`.

A module a stage, in the order of axrun.doctor.report.STAGES. `weight_faults`, `constants` and `positions` test what
could have caused a disagreement, the cheap before the dear.
"""
