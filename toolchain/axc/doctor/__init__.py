"""`axc doctor`: compares a bundle with its checkpoint stage by stage, and explains the first difference.

One module per stage of axrun.doctor.report.STAGES. `weight_faults`, `constants` and `positions` look for the cause.
"""
