"""Ministral: Mistral under another model_type, with windows in the layers given by layer_types."""

from __future__ import annotations

import dataclasses

from axc.families import mistral

FAMILY = dataclasses.replace(mistral.FAMILY, inside={}, config=lambda reader: mistral.read(reader, "ministral"))
