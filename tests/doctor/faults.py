"""The table of planted faults, in the order of the stages; written independently of the doctor."""

from __future__ import annotations

from tests.doctor import file_faults, graph_faults, runner_faults, text_faults, weight_faults
from tests.doctor.fault import Fault, RunnerFault

BUNDLE: tuple[Fault, ...] = (
    *file_faults.files(),
    *file_faults.versions(),
    *text_faults.tokenizer(),
    *text_faults.template(),
    *weight_faults.embedding(),
    *weight_faults.layers(),
    *graph_faults.layers(),
    *weight_faults.head(),
    *graph_faults.head(),
    *text_faults.sampling(),
)
RUNNER: tuple[RunnerFault, ...] = (*runner_faults.runner(),)
