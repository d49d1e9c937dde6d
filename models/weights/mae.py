"""The files of masked autoencoders (arXiv 2111.06377): timm's names, with a decoder in addition to the encoder."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.weights import timm
from models.weights.tensors import Conventions, Weights

NAME = "mae"
ANCHORS = timm.ANCHORS
OTHER_PARTS = ("decoder_", "mask_token")


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return "patch_embed.proj.weight" in tensors and any(name.startswith("decoder_") for name in tensors)


def translate(tensors: Weights) -> Weights:
    return timm.translate(tensors)


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    return replace(timm.conventions(tensors, config), ln_eps=1e-6, cls_position=True)
