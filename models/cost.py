"""What a model costs: its parameters and the FLOPs of a forward pass, counted on torch's meta device without memory."""

import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import create_model


def parameters(config: dict) -> int:
    """Number of parameters of `create_model(**config)`; nothing is allocated."""
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def flops(config: dict, computed: bool = False, patch_keep_rate: float = 1.0) -> int:
    """Forward FLOPs of one image, 2 x multiply-accumulates; a training step takes three times as many.

    Counted by running the model on torch's meta device, so it holds for every option. The default is the architecture's
    own number, the one that papers print. `computed=True` counts what `forward` really does: with a class token the last
    block answers only that token's query, which saves 6% of B/16. Use it for the utilisation of the hardware.
    patch_keep_rate: share of the patches that the model sees (token dropping).
    """
    return _count(tuple(sorted(config.items())), computed, patch_keep_rate)


@functools.lru_cache(maxsize=64)
def _count(config: tuple, computed: bool, patch_keep_rate: float) -> int:
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
    return counter.get_total_flops()


def _on_meta(config: dict):
    with torch.device("meta"):
        return create_model(**config)
