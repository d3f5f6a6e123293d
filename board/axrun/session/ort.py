"""The onnxruntime engine: our axmodels on any CPU. https://onnxruntime.ai/docs/api/python/"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.axmodel import Axmodel, TensorInfo
from axrun.format.dtypes import DTYPES
from axrun.session import CACHES, Array, SessionGroup, StackedBinding
from axrun.session.finite import FiniteCheck
from axrun.session.lowering import lower

try:
    import onnxruntime
except ImportError:
    raise BadInput(
        "engine ort needs the package onnxruntime, which is not installed\nInstall it: pip install 'axrun[ort]'"
    ) from None

FATAL = 4  # log_severity_level: less severe errors are raised as exceptions anyway
CONFIG = {
    "session.intra_op.allow_spinning": "0",  # layers have separate threads: spinning ones would starve the next
    "session.use_env_allocators": "1",  # one arena for the intermediates of all layers
}


class OrtBinding:
    """Arrays wrapped once as OrtValues; onnxruntime works in the caller's memory."""

    def __init__(self, session: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], check: FiniteCheck) -> None:
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._values = (inputs, outputs)  # the binding holds only their addresses
        self._check = check

    def run(self) -> None:
        self._run(self._binding)
        self._check()


class OrtSession:
    """An axmodel in onnxruntime. M and T are symbolic in its graph, so bindings may have any values."""

    flexible = True
    exact = False
    stacks = False

    def __init__(self, model: Axmodel, session: Any) -> None:
        self._session, self._part = session, model.part
        self.window = model.window
        self._inputs = {info.name: info for info in model.inputs}
        self._outputs = {info.name: info for info in model.outputs}
        self.groups = tuple(
            SessionGroup(
                group.index,
                group.tokens,
                group.history,
                tuple(
                    _sized(info, group.tokens, group.history)
                    for info in model.inputs
                    if group.history or info.name not in CACHES
                ),
                tuple(_sized(info, group.tokens, group.history) for info in model.outputs),
            )
            for group in model.groups
        )

    def allocate(self, info: TensorInfo) -> Array:
        return np.zeros(info.shape, DTYPES[info.dtype].numpy)  # type: ignore[arg-type]

    def bind(self, group: int, arrays: Mapping[str, Array]) -> OrtBinding:
        bound = dict(arrays)
        if not self.groups[group].history:
            for name in self._inputs.keys() & set(CACHES):
                bound[name] = self.allocate(_sized(self._inputs[name], 0, 0))
        if self._inputs.keys() - bound.keys() or bound.keys() - self._inputs.keys() - self._outputs.keys():
            raise ValueError(f"{sorted(bound)} cannot be bound to {sorted(self._inputs)} and {sorted(self._outputs)}")
        tokens = bound["input"].shape[1]
        history = bound["K_cache"].shape[1] if "K_cache" in bound else 0
        values = {}
        for name, array in bound.items():
            info = _sized({**self._inputs, **self._outputs}[name], tokens, history)
            if array.shape != info.shape or array.dtype != DTYPES[info.dtype].numpy or not array.flags.c_contiguous:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected {info.dtype}{list(info.shape)}")
            values[name] = _ort_value(array, info.dtype)
        return OrtBinding(
            self._session,
            {name: value for name, value in values.items() if name in self._inputs},
            {name: value for name, value in values.items() if name in self._outputs},
            FiniteCheck(self._part, tuple(self._outputs.values()), bound),
        )

    def bind_stacked(self, arrays: Mapping[str, Array]) -> StackedBinding:
        raise ValueError("onnxruntime runs one sequence at a time")


def open_session(path: str | os.PathLike[str], threads: int | None = None, lowered: bool = True) -> OrtSession:
    """Loads one of our axmodels. `lowered` False: the unmodified graph, as any user of onnxruntime would load it.

    Raises BadInput for an axmodel of the vendor and for a file that onnxruntime refuses.
    """
    model = axmodel.read(path)
    if not model.ours:
        raise BadInput(
            f"{path} is made by {model.producer_name or 'an unknown compiler'}; engine ort runs axmodels of axc only"
            + ("\nIt is code for an NPU: run it on the board it was compiled for." if model.vendors else "")
        )
    _share_arena()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = threads or _cpus()
    options.use_deterministic_compute = True
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    source: bytes | str = os.fspath(path)
    try:
        if lowered:
            source, apart = lower(model)
            values = [_ort_value(constant.array, constant.dtype) for constant in apart.values()]
            options.add_external_initializers(list(apart), values)
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(f"{path} has a graph that axc does not write ({error!r})\nBuild or copy it again.") from None
    except Exception as error:  # onnxruntime's own exceptions have no common base
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path} does not load in onnxruntime {onnxruntime.__version__}: {reason}") from None
    return OrtSession(model, session)


def version() -> str:
    return str(onnxruntime.__version__)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@functools.cache
def _share_arena() -> None:
    """Shares one arena: otherwise 24 layers keep 24 arenas, each sized for the longest prefill."""
    cpu = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(cpu, None)


def _ort_value(array: Array, dtype: str) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, DTYPES[dtype].onnx)


def _sized(info: TensorInfo, tokens: int, history: int) -> TensorInfo:
    """`info` with M and T as numbers."""
    sizes: dict[int | str, int] = {"M": tokens, "T": history, "T+M": history + tokens}
    return TensorInfo(info.name, info.dtype, tuple(sizes.get(dim, dim) for dim in info.shape))
