"""Files of DINO and DINOv2: timm's names, with registers, blocks in chunks, and the heads of self-distillation."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.weights import timm
from models.weights.tensors import Conventions, Weights, rename

NAME = "dinov2"
ANCHORS = timm.ANCHORS
OTHER_PARTS = ("dino_head.", "ibot_head.", "head.mlp.", "head.last_layer", "mask_token")
MARKS = ("register_tokens", "dino_head.", "ibot_head.", "head.last_layer")


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    chunked = any(re.match(r"blocks\.\d+\.\d+\.", name) for name in tensors)
    return "patch_embed.proj.weight" in tensors and (chunked or any(name.startswith(MARKS) for name in tensors))


def translate(tensors: Weights) -> Weights:
    """DINOv2's training code puts the blocks into chunks: blocks.CHUNK.BLOCK.rest, with BLOCK counted over all chunks."""
    return {
        rename(re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name), {"register_tokens": "reg_token"}): tensor
        for name, tensor in tensors.items()
    }


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    return replace(timm.conventions(tensors, config), ln_eps=1e-6, cls_position=True)
