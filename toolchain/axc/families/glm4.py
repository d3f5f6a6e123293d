"""GLM-4-0414: GLM with additional norms after attention and after the MLP."""

from __future__ import annotations

import dataclasses

from axc.config_json import Reader
from axc.families import blocks, glm
from axc.families.blocks import Rotation, Sources
from axc.families.glm import Config
from axc.graph import Graph

NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def config(reader: Reader) -> Config:
    return glm.read(reader, "glm4")


def weights(config: Config) -> Sources:
    return glm.weights_with(config, *NORMS)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.rms(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    rotation = Rotation(config.rope, positions, interleaved=True)
    attended = blocks.attention(graph, given, normed, prefix, config, rotation)
    x = graph.add(given.x, norm(graph, attended, f"{prefix}post_self_attn_layernorm"))
    down = blocks.gated_mlp(graph, norm(graph, x, f"{prefix}post_attention_layernorm"), prefix)
    graph.output("output", graph.add(x, norm(graph, down, f"{prefix}post_mlp_layernorm")), graph.hidden_type)


FAMILY = dataclasses.replace(glm.FAMILY, config=config, weights=weights, layer=layer)
