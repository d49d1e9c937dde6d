"""Google's BiT ResNet .npz: "resnet/block1/unit01/a/standardized_conv2d/kernel" (arXiv 1912.11370)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from models.errors import UserError, shorten
from models.weights.google import convolution, leaf_name, to_arrays
from models.weights.tensors import Conventions, Weights

NAME = "bit"
ANCHORS: tuple[str, ...] = ()


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return any(name.startswith("resnet/") for name in tensors)


def translate(tensors: Weights) -> Weights:
    """Raises UserError for arrays that have the wrong number of axes."""
    weights: Weights = {}
    misshapen = []
    for name, array in to_arrays(tensors).items():
        try:
            new, array = _renamed(name, array)
            weights[new] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        except (ValueError, IndexError):
            misshapen.append(f"{name} is {array.shape}")
    if misshapen:
        raise UserError(f"wrong shape: {shorten(misshapen)}")
    return weights


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    return Conventions()


def _renamed(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    *path, module, leaf = name.removeprefix("resnet/").split("/")
    where = "/".join(path)
    if match := re.fullmatch(r"block(\d+)/unit(\d+)/([abc])(/proj)?", where):
        index = "abc".index(match[3]) + 1
        part = "downsample.conv" if match[4] else f"{'norm' if module == 'group_norm' else 'conv'}{index}"
        new = f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 1}.{part}"
    else:
        new = {"root_block": "stem.conv", "": "norm", "head": "head"}.get(where, name)
    array = array.reshape(-1, array.shape[-1]).T if new == "head" and leaf == "kernel" else convolution(array)
    return f"{new}.{leaf_name(leaf)}", array
