"""Translates state dicts between naming schemes, without files or network.

    named = translate(tensors, config)                 # any naming scheme -> this project's names (timm's)
    report = load_tensors(model, named, "ViT-B_16")    # fits them to the model and loads them
    state, config = timm.to_timm(model)                # the reverse; also huggingface.to_huggingface

Each naming scheme is one module. To add one, write a module with the interface of `tensors.Naming`, and add it to
NAMINGS. `pipeline.weights` reads the files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.errors import UserError, shorten
from models.weights import bit, dinov2, google, huggingface, mae, own, siglip, timm, torchvision
from models.weights.fit import LoadReport, fit_weights
from models.weights.foreign import recognize
from models.weights.huggingface import to_huggingface
from models.weights.tensors import Conventions, NamedWeights, WeightNaming, Weights
from models.weights.timm import to_timm
from models.weights.wrappers import unwrap

__all__ = [
    "NAMINGS",
    "Conventions",
    "LoadReport",
    "NamedWeights",
    "Weights",
    "fit_weights",
    "load_tensors",
    "to_huggingface",
    "to_timm",
    "translate",
]

NAMINGS: tuple[WeightNaming, ...] = (bit, google, huggingface, siglip, torchvision, own, mae, dinov2, timm)
"""The first match is used, so special cases come before general ones."""


def translate(tensors: Weights, config: Mapping[str, Any] | None = None) -> NamedWeights:
    """Renames the tensors of any naming scheme to this project's names.

    config: the description that came with the tensors, such as a config.json. Raises UserError for an unknown naming scheme,
    for tensors of several models, and for values that are not finite.
    """
    config = config or {}
    anchors = list(dict.fromkeys(anchor for naming in NAMINGS for anchor in naming.ANCHORS))
    bases = [base for naming in NAMINGS for base in getattr(naming, "BASES", ())]
    tensors, left_out, notes = unwrap(tensors, anchors, bases)
    naming = next((naming for naming in NAMINGS if naming.matches(tensors, config)), None)
    if naming is None:
        what = recognize(tensors)
        raise UserError(
            f"{f'this is {what}' if what else 'not weights of a Vision Transformer'}; its tensors "
            f"({shorten(tensors, 5)}) match no naming scheme of {', '.join(naming.NAME for naming in NAMINGS)}"
        )
    weights = naming.translate(tensors)
    other = [name for name in weights if name.startswith(tuple(getattr(naming, "OTHER_PARTS", ())))]
    weights = {name: tensor for name, tensor in weights.items() if name not in set(other)}
    # torch.isfinite does not take floats of 8 bits
    wide = ((name, tensor.float() if tensor.dtype.itemsize == 1 else tensor) for name, tensor in weights.items())
    not_finite = [name for name, tensor in wide if not torch.isfinite(tensor).all()]
    if not_finite:
        raise UserError(f"not finite: {shorten(not_finite)}")
    return NamedWeights(
        naming=naming.NAME,
        weights=weights,
        conventions=naming.conventions(tensors, config),
        dropped=(*left_out, *other),
        notes=tuple(notes),
    )


def load_tensors(model: nn.Module, named: NamedWeights, source: str, strict_head: bool = False) -> LoadReport:
    """Fits weights to a model and loads them. The model is unchanged after an error. Arguments: `fit_weights`."""
    fitted, report = fit_weights(model, named, source, strict_head)
    model.load_state_dict(fitted, strict=False)
    return report
