"""Converts pixels to the input of a model: normalisation, axis order, and patches.

Shape suffixes: B batch, C channels, H W pixels, P patch side, N patches.
"""

from collections.abc import Sequence

import torch
from torch import nn


def normalise(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts uint8 pixels to [-1, 1]; floats must already be normalised. Computed
    in float32: bfloat16 would round pixels."""
    if x.dtype == torch.uint8:
        x = x.float() / 127.5 - 1.0
    return x.to(dtype)


@torch.no_grad()
def fold_normalisation(projection: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
    """Changes a projection of pixels normalised with a mean and standard deviation (of pixels in [0, 1], one for each
    channel) so that it computes the same from pixels in [-1, 1]."""
    assert projection.bias is not None
    means, deviations = (torch.tensor(values).to(projection.weight)[:, None, None] for values in (mean, std))
    projection.bias.add_((projection.weight * (0.5 - means) / deviations).sum(dim=(1, 2, 3)))
    projection.weight.mul_(0.5 / deviations)


def channels_last(x: torch.Tensor, channels: int) -> bool:
    """Whether images are (B,H,W,C). Floats are always (B,C,H,W). Raises ValueError for another number of channels."""
    if x.dtype == torch.uint8 and x.shape[-1] == channels:
        return True
    if x.shape[1] == channels:
        return False
    expected = f"(B,H,W,{channels}) uint8, or (B,{channels},H,W) uint8 or float"
    raise ValueError(f"images of shape {tuple(x.shape)}, {x.dtype}; expected {expected}")


def to_images(x: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Converts every accepted image tensor to normalised (B,C,H,W)."""
    return normalise(x.permute(0, 3, 1, 2) if channels_last(x, channels) else x, dtype)


def patchify(x: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    """Images -> (B,N,P*P*C), the sequence of eq. 1: patches in row-major order, each as (row, column, channel). Keeps
    the dtype. Rows and columns that do not fill a patch are dropped, as in a VALID convolution.
    """
    if channels_last(x, channels):
        rows, columns = x.shape[1] // patch, x.shape[2] // patch
        x = x[:, : rows * patch, : columns * patch]
        x = x.reshape(-1, rows, patch, columns, patch, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        x = x[:, :, : rows * patch, : columns * patch]
        x = x.reshape(-1, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, rows * columns, patch * patch * channels)
