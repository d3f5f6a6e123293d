"""AutoRound's own quant_method, with the packings of GPTQ, AWQ and fp8.

https://github.com/intel/auto-round . `packing_format` names the packing, and whether zero points are stored minus 1.
"""

from __future__ import annotations

from collections.abc import Iterator

from axc.checkpoints.quantised import awq, fp8, gptq
from axc.checkpoints.quantised.matrix import Matrix, Raw
from axc.checkpoints.settings import AUTO_ROUND, Settings, keys

NAME = "AutoRound"
TENSORS = (*gptq.TENSORS, *fp8.TENSORS)
HARMLESS = (*AUTO_ROUND, *keys("quant_method desc_act damp_percent true_sequential lm_head static_groups"))
FLOAT8, FLOAT8_KEYS = "auto_round:fp8", keys("activation_scheme fmt weight_block_size")
# packing_format -> whether zero points are stored minus 1; None: AWQ's packing
PACKINGS: dict[str, int | None] = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round": 0,
    "auto_round:auto_awq": None,
    "auto_round:awq": None,
}


def matrices(settings: Settings, raw: Raw) -> Iterator[Matrix]:
    read = keys("bits group_size sym data_type packing_format backend act_bits extra_config rotation_config")
    settings.refuse_unknown((*HARMLESS, *FLOAT8_KEYS, *read))
    key = "packing_format" if settings.values.get("packing_format") is not None else "backend"
    kind = str(settings.values.get(key)).removesuffix(":exllamav2").removesuffix(":tritonv2")
    settings.only("rotation_config", None, {}, absent=None)
    if kind == FLOAT8:
        settings.only("data_type", "fp", "float")
        settings.only("bits", 8)
        return fp8.read_modules(raw, fp8.block(settings))
    if kind not in PACKINGS:
        raise settings.refuse(key, f"expected one of {', '.join((*PACKINGS, FLOAT8))}")
    settings.only("data_type", "int", absent="int")
    settings.only("act_bits", 16, 32, absent=16)
    extra = settings.values.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise settings.refuse("extra_config", "expected an object")
    usual = settings.only("bits", 4, 8), settings.group_size()
    others, symmetric = gptq.overrides(settings, "extra_config", list(extra.values()))
    shift = PACKINGS[kind]
    if shift is None:
        settings.only("bits", awq.BITS)
        if any(other != usual for other in others):
            raise settings.refuse("extra_config", "other bits or groups of some modules are not read of this packing")
        return awq.read_modules(raw, usual[1], symmetric, f"{NAME} (AWQ)")
    return gptq.read_modules(raw, gptq.Packing(f"{NAME} (GPTQ)", *usual, symmetric, shift, None, others))
