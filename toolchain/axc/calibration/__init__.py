"""Calibration: quantises the layers and the head of a checkpoint for the inputs that they get on a text.

`run` quantises one layer after another, each with the outputs of the quantised layers before it, and writes levels and
scales into one file (`file`). A build reads only that file, so a bundle's bytes do not depend on the machine.
"""
