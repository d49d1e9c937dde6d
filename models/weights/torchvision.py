"""torchvision's VisionTransformer (vit_b_16, vit_l_32, ...)."""

import re
from collections.abc import Mapping
from typing import Any

from models.weights.tensors import Conventions, Weights, patch_grid, rename

NAME = "torchvision"
ANCHORS = ("conv_proj.weight",)
RENAMES = {
    "class_token": "cls_token",
    "conv_proj.": "patch_embed.proj.",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln.": "norm.",
    "heads.pre_logits.": "pre_logits.fc.",
    "heads.head.": "head.",
}
MODULES = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj.": "attn.proj.",
    **{"mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."},
    **{"mlp.linear_1.": "mlp.fc1.", "mlp.linear_2.": "mlp.fc2."},  # files of torchvision before 0.13
}


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return any(name.endswith(ANCHORS) for name in tensors)


def translate(tensors: Weights) -> Weights:
    weights = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)", name):
            weights[f"blocks.{match[1]}.{rename(match[2], MODULES)}"] = tensor
        else:
            weights[rename(name, RENAMES)] = tensor
    return weights


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    kernel = next(tensor for name, tensor in tensors.items() if name.endswith(ANCHORS))
    return Conventions(
        activation="gelu", ln_eps=1e-6, grid=patch_grid(config.get("image_size"), kernel), cls_position=True
    )
