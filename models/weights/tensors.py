"""Types and helpers of all naming schemes: a state dict under this project's
names, and conventions that tensors do not show."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Weights = dict[str, torch.Tensor]
"""Tensors by name, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conventions:
    """Conventions of the source, as far as known. The tensors do not show them."""

    heads: int | None = None
    """Attention heads."""
    activation: str | None = None
    """Activation of the MLPs, under any library's name ("gelu", "gelu_pytorch_tanh", ...)."""
    ln_eps: float | None = None
    """Epsilon that LayerNorm adds to the variance."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches in the position embeddings."""
    cls_position: bool | None = None
    """Whether the class token has a position embedding of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedWeights:
    """A state dict translated to this project's names."""

    naming: str
    """The naming of the source: "google", "timm", ..."""
    weights: Weights
    conventions: Conventions = field(default_factory=Conventions)
    dropped: tuple[str, ...] = ()
    """Names of source tensors of networks other than the image encoder (a decoder, a text tower)."""
    notes: tuple[str, ...] = ()
    """Notes for the report about a choice among several models."""


class WeightNaming(Protocol):
    """The interface of a module that `models.weights.NAMINGS` lists.

    Two more names are optional: BASES, prefixes that belong to the naming itself and not to a wrapper, and OTHER_PARTS,
    the beginnings (by this project's names) of tensors that belong to other networks in the same file.
    """

    NAME: str
    """Name of the naming scheme in reports and errors."""

    @property
    def ANCHORS(self) -> tuple[str, ...]:
        """Names of the patch embedding's weight. Text before such a name is the prefix of a wrapper."""

    def matches(self, tensors: Weights, config: Mapping[str, Any]) -> bool:
        """Whether tensors without wrapper prefixes, and their config.json, follow this naming scheme."""

    def translate(self, tensors: Weights) -> Weights:
        """The tensors under this project's names; unknown ones keep their names, so that they can be listed."""

    def conventions(self, tensors: Weights, config: Mapping[str, Any]) -> Conventions:
        """The conventions of the source, from its config.json, its tensors, or the rules of this naming scheme."""


def fuse_qkv(weights: Weights) -> Weights:
    """Replaces blocks.N.attn.{q,k,v} by one blocks.N.attn.qkv, rows in that order."""
    for name in [name for name in weights if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        fuse(weights, parts, name.replace(".attn.q.", ".attn.qkv."))
    return weights


def fuse(weights: Weights, parts: list[str], whole: str) -> None:
    """Replaces tensors by their concatenation along axis 0.

    Incomplete or mismatched parts are kept and will be listed as unknown.
    """
    if all(part in weights for part in parts) and len({weights[part].shape[1:] for part in parts}) == 1:
        weights[whole] = torch.cat([weights.pop(part) for part in parts])


def rename(name: str, prefixes: dict[str, str]) -> str:
    """Replaces the first matching prefix of `name`."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def patch_grid(image_size: Any, kernel: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches of images of `image_size` (height and width, or one number for both), if that is known.

    kernel: the patch embedding's (D,C,P,P).
    """
    if isinstance(image_size, (int, float)):
        image_size = (image_size, image_size)
    if not isinstance(image_size, (list, tuple)) or len(image_size) < 2 or kernel.dim() != 4:
        return None
    height, width = image_size[-2:]
    if not all(isinstance(side, (int, float)) and math.isfinite(side) for side in (height, width)):
        return None
    return int(height) // kernel.shape[2], int(width) // kernel.shape[3]


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a configuration; empty when it is missing or not a dictionary."""
    part = config.get(name)
    return part if isinstance(part, dict) else {}
