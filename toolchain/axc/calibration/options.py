"""Options of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axc.checkpoints import EMBEDDING, HEAD, Checkpoint, Lora, StoredTensor
from axc.quantizer.kept import keep
from axrun.errors import BadInput

BLOCKS = {"s4": 32, "s8": 64}
LEAST_BITS, MOST_BITS = 4.5, 8.5
TOKENS = 32768


@dataclass(frozen=True)
class Options:
    """`calibration`: texts to use instead of the one shipped with axc. `bits`: the most bits per weight on average,
    with s8 for the most sensitive matrices.
    """

    input_path: Path
    weight_type: str = "s4"
    bits: float | None = None
    calibration: tuple[Path, ...] = ()
    tokens: int = TOKENS
    window: int = 512
    model_config: Path | None = None
    model_type: str | None = None
    lora: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        if self.weight_type not in BLOCKS:
            raise BadInput(f"--weight_type is {self.weight_type!r}; expected one of {', '.join(BLOCKS)} to calibrate")
        if self.bits is not None and not LEAST_BITS <= self.bits <= MOST_BITS:
            raise BadInput(f"--bits is {self.bits:g}; expected {LEAST_BITS} to {MOST_BITS}")
        if self.bits is not None and self.weight_type != "s4":
            raise BadInput(f"--bits needs --weight_type s4; it is {self.weight_type}")
        if not self.window <= self.tokens <= 1 << 24:
            raise BadInput(f"--calibration_tokens is {self.tokens}; expected {self.window} to {1 << 24}")

    @property
    def block(self) -> int:
        return BLOCKS[self.weight_type]

    def decided(self) -> dict[str, Any]:
        """The options that decide the result, besides checkpoint and text."""
        return {"weight_type": self.weight_type, "block": self.block, "bits": self.bits}


def wanted(
    path: Path,
    weight_type: str | None,
    quantizer: str | None,
    calibrated: Path | None,
    bits: float | None,
    texts: list[Path],
    tokens: int | None = None,
) -> bool:
    """Whether a build calibrates first; s4 does unless `quantizer` is rtn or the checkpoint has levels that s4 keeps.

    Raises BadInput for flags that exclude each other, and for a checkpoint that cannot be opened.
    """
    flags = {"--bits": bits is not None, "--calibration": bool(texts), "--calibration_tokens": tokens is not None}
    said = [flag for flag, given in flags.items() if given]
    if calibrated and (quantizer or said):
        excluded = " and ".join(said or ["--quantizer"])
        raise BadInput(
            f"{excluded} cannot change a finished calibration (--calibrated)\nCalibrate again: axc calibrate."
        )
    if quantizer == "rtn" and said:
        raise BadInput(f"{' and '.join(said)} belongs to --quantizer gptq")
    if quantizer or said or calibrated or weight_type != "s4":
        return quantizer == "gptq" or bool(said)
    return first_kept(Checkpoint.open(path), weight_type) is None


def first_kept(checkpoint: Checkpoint, weight_type: str) -> StoredTensor | None:
    """A matrix of the layers that the checkpoint has quantised with levels that `weight_type` keeps."""
    layers = (stored for name, stored in checkpoint.tensors.items() if name not in (EMBEDDING, HEAD))
    return next((stored for stored in layers if keep(weight_type, stored)), None)
