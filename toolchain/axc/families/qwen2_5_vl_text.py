"""The text model of Qwen2.5-VL: that of Qwen2-VL."""

from __future__ import annotations

import dataclasses

from axc.families import qwen2, qwen2_vl_text

FAMILY = dataclasses.replace(
    qwen2_vl_text.FAMILY,
    config=lambda reader: qwen2.read(reader, "qwen2_5_vl_text"),
    inside={"qwen2_5_vl": qwen2_vl_text.FAMILY.inside["qwen2_vl"]},
)
