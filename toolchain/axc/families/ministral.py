"""Ministral: Mistral under a name of its own, with windows in the layers that layer_types names."""

from __future__ import annotations

import dataclasses

from axc.families import mistral

FAMILY = dataclasses.replace(mistral.FAMILY, config=lambda reader: mistral.read(reader, "ministral"))
