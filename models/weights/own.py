"""This project's own checkpoints: a folder whose config.json holds the model's options under "model"."""

from collections.abc import Mapping
from typing import Any

from models.variants import parse_variant
from models.weights import timm
from models.weights.tensors import Conventions, Weights

NAME = "checkpoint"
ANCHORS = timm.ANCHORS


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("model"), dict)


def translate(tensors: Weights) -> Weights:
    return timm.translate(tensors)


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    options = config["model"]
    variant = options.get("variant")
    heads = options.get("heads") or (parse_variant(variant).heads if isinstance(variant, str) else None)
    return Conventions(heads=heads, activation=options.get("gelu"), ln_eps=options.get("ln_eps"))
