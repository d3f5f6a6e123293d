"""Calibration: quantising the layers of a float checkpoint for the inputs that they get on a text.

`run` goes from layer to layer, each behind the ones that are quantised already, and writes the result, levels and
scales, into one file (`file`): the only thing that a build needs, so that a bundle's bytes depend on the file alone.
"""
