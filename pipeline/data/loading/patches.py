"""Converts images to and from the N x (P*P*C) patch matrix of the ViT paper (eq. 1), and chooses patches to keep.

Patches are ordered row by row over the grid; pixels in a patch are ordered (row, column, channel). Any dtype is
allowed. Legend: B batch, H height, W width, C channels, N patches, P patch size, D = P*P*C.
"""

import numpy as np

from pipeline.data.loading.order import TOKENS, bits


def patchify(image_HWC: np.ndarray, patch_size: int, out: np.ndarray | None = None) -> np.ndarray:
    """(..., H, W, C) -> (..., N, D), in one copy, into `out` if given. Raises ValueError unless P divides H and W."""
    *batch, height, width, channels = image_HWC.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch size {patch_size} does not divide an image of {height}x{width}")
    rows, columns = height // patch_size, width // patch_size
    grid = image_HWC.reshape(*batch, rows, patch_size, columns, patch_size * channels)
    if out is None:
        out = np.empty((*batch, rows * columns, patch_size * patch_size * channels), image_HWC.dtype)
    target = out.reshape(*batch, rows, columns, patch_size, patch_size * channels)
    np.copyto(target, grid.swapaxes(-3, -2))
    return out


def unpatchify(patches_ND: np.ndarray, height: int, width: int, patch_size: int) -> np.ndarray:
    """(..., N, D) -> (..., H, W, C): the inverse of `patchify`."""
    *batch, _, size = patches_ND.shape
    rows, columns, channels = height // patch_size, width // patch_size, size // patch_size**2
    grid = patches_ND.reshape(*batch, rows, columns, patch_size, patch_size * channels)
    return np.ascontiguousarray(grid.swapaxes(-3, -2)).reshape(*batch, height, width, channels)


def kept_tokens(seed: int, epoch: int | np.ndarray, samples: np.ndarray, num_tokens: int, keep: float) -> np.ndarray:
    """The indices of the patches that each sample keeps: int64 (B, n), ascending, n = round(keep * N), at least 1.

    The result depends only on (seed, epoch, sample index) and is uniform over all subsets of n patches. epoch: one, or that of
    each sample.
    """
    n = max(1, round(keep * num_tokens))
    epochs = np.broadcast_to(epoch, np.shape(samples))[:, None]
    draws = bits(seed, TOKENS, epochs, np.asarray(samples)[:, None], np.arange(num_tokens))
    return np.sort(np.argsort(draws, axis=1, kind="stable")[:, :n], axis=1).astype(np.int64)
