"""Parameters and forward FLOPs of a model, counted on torch's meta device without allocating memory."""

import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import create_model

# Operations that multiply with weights; all other counted operations belong to attention.
WITH_WEIGHTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)


def parameters(config: dict) -> int:
    """Number of parameters of `create_model(**config)`; nothing is allocated."""
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def flops(config: dict, computed: bool = False, patch_keep_rate: float = 1.0) -> int:
    """Forward FLOPs of one image, 2 x multiply-accumulates; a training step takes three times as many.

    Counted by running the model on torch's meta device, so all options are included. The default is the number of the
    architecture, as in papers. `computed=True` counts the operations of `forward`: with a class token, the last block
    computes only the output of this token, which saves 6% for B/16. Use it for the utilisation of the hardware.
    patch_keep_rate: fraction of patches that the model receives (token dropping).
    """
    return _count(tuple(sorted(config.items())), computed, patch_keep_rate)[0]


def attention_flops(config: dict, patch_keep_rate: float = 1.0) -> int:
    """The FLOPs of `flops(config, computed=True)` in the products of queries and
    keys and of attention weights and values."""
    return _count(tuple(sorted(config.items())), True, patch_keep_rate)[1]


def token_features(config: dict, patch_keep_rate: float = 1.0) -> int:
    """Features of all tokens of one image, summed over the transformer blocks: T x D x blocks."""
    model = _on_meta(config)
    return (max(1, round(patch_keep_rate * model.grid**2)) + model.prefix) * model.shape.width * len(model.blocks)


@functools.lru_cache(maxsize=64)
def _count(config: tuple, computed: bool, patch_keep_rate: float) -> tuple[int, int]:
    """(all FLOPs, FLOPs of attention)"""
    model = _on_meta(dict(config)).eval().requires_grad_(False)  # the counter's hooks fail on parameters with gradients
    size, channels = model.config["image_size"], model.config["channels"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image = torch.empty(1, channels, size, size, device="meta")
        kept = {}
        if patch_keep_rate < 1:
            kept["positions"] = torch.empty(
                1, max(1, round(patch_keep_rate * model.grid**2)), dtype=torch.long, device="meta"
            )
        model(image, **kept) if computed else model.head(model.features(image, **kept, every_token=True))
    total = counter.get_total_flops()
    by_operation = counter.get_flop_counts()["Global"]
    return total, total - sum(by_operation.get(operation, 0) for operation in WITH_WEIGHTS)


def _on_meta(config: dict):
    with torch.device("meta"):
        return create_model(**config)
