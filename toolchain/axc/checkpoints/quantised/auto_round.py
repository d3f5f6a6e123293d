"""AutoRound's own quant_method: the packings of GPTQ and AWQ under a name of its own.

https://github.com/intel/auto-round . `packing_format` tells which, and whether zero points are stored less one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axc.checkpoints.quantised import awq, gptq
from axc.checkpoints.quantised.matrix import Matrix, Raw
from axc.checkpoints.settings import Settings, keys

NAME = "AutoRound"
HARMLESS = keys(
    """
    quant_method autoround_version amp batch_size dataset enable_minmax_tuning enable_norm_bias_tuning
    enable_quanted_input gradient_accumulate_steps iters low_gpu_mem_usage low_cpu_mem_usage lr minmax_lr nsamples
    scale_dtype seqlen block_name_to_quantize to_quant_block_names quant_block_list modules_to_not_convert
    modules_in_block_to_quantize quant_nontext_module enable_alg_ext damp_percent desc_act true_sequential lm_head
    static_groups rotation_config not_use_best_mse act_group_size act_sym act_dynamic act_data_type model_free
    """
)
# packing_format -> whether zero points are stored less one; None: packed as AWQ packs
PACKINGS: dict[str, int | None] = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round": 0,
    "auto_round:auto_awq": None,
    "auto_round:awq": None,
}


def matrices(settings: Settings, raw: Raw) -> Iterator[Matrix]:
    read = ("bits", "group_size", "sym", "data_type", "packing_format", "backend", "act_bits", "extra_config")
    settings.refuse_unknown((*HARMLESS, *read))
    key = "packing_format" if settings.values.get("packing_format") is not None else "backend"
    kind = str(settings.values.get(key)).removesuffix(":exllamav2").removesuffix(":tritonv2")
    if kind not in PACKINGS:
        raise settings.refuse(key, f"expected one of {', '.join(PACKINGS)}")
    settings.only("data_type", "int", absent="int")
    settings.only("act_bits", 16, 32, absent=16)
    settings.only("rotation_config", None, {}, absent=None)
    bits, group_size, symmetric = settings.only("bits", 4, 8), settings.group_size(), settings.flag("sym", True)
    _refuse_others(settings, {"bits": bits, "group_size": group_size, "sym": symmetric})
    shift = PACKINGS[kind]
    if shift is None:
        settings.only("bits", awq.BITS)
        return awq.read_modules(raw, group_size, symmetric, f"{NAME} (AWQ)")
    return gptq.read_modules(raw, gptq.Packing(f"{NAME} (GPTQ)", bits, group_size, symmetric, shift))


def _refuse_others(settings: Settings, usual: dict[str, Any]) -> None:
    """`extra_config` may leave modules as floats; others than the usual bits and groups are not read."""
    extra = settings.values.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise settings.refuse("extra_config", "expected an object")
    for module, changes in extra.items():
        own = {**usual, **changes} if isinstance(changes, dict) else {}
        if own.get("bits") not in (16, 32) and any(own.get(key) != value for key, value in usual.items()):
            raise settings.refuse("extra_config", f"that {module!r:.60} has other bits or groups is not read")
