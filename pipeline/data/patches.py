"""Converts images to and from the N x (P*P*C) patch matrix of the ViT paper (eq. 1).

Patches are ordered row by row over the grid; pixels in a patch are ordered (row, column, channel). Any dtype is
allowed. Legend: B batch, H height, W width, C channels, N patches, P patch size, D = P*P*C.
"""

import numpy as np


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
