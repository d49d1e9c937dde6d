"""Position embeddings: fixed 2-D sine-cosine embeddings, and resizing of learned ones to another grid."""

import torch
import torch.nn.functional as F


def sincos2d(grid: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine embeddings (1, grid*grid, width), float32: [sin x, cos x, sin y, cos y], base 10000.

    As in MoCo v3 (arXiv 2104.02057) and Google's later ViT code. `width` must be a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine position embeddings need a width divisible by 4, not {width}")
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4 - 1))
    y, x = torch.meshgrid(*(torch.arange(grid, dtype=torch.float64),) * 2, indexing="ij")
    x_angle, y_angle = x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency
    return torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1).float()[None]


def resize(
    embedding: torch.Tensor, new_grid: int, prefix: int, old_grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """(1, prefix + rows*columns, D) -> (1, prefix + new_grid**2, D), bilinear with aligned corners; the prefix rows are
    unchanged.

    old_grid: (rows, columns) of the embedding, square by default. Google's code calls scipy.ndimage.zoom(order=1), which
    is linear interpolation with the corner points aligned: `align_corners=True` here. The half-pixel convention (False)
    gives visibly different embeddings. Raises ValueError if the embedding does not have the size of `old_grid`.
    """
    tokens, patches = embedding[:, :prefix], embedding[:, prefix:]
    if old_grid is None:
        side = round(patches.shape[1] ** 0.5)
        old_grid = (side, side)
    if old_grid[0] * old_grid[1] != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} position embeddings do not form a grid of {old_grid[0]}x{old_grid[1]}")
    if old_grid == (new_grid, new_grid):
        return embedding
    plane = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=(new_grid, new_grid), mode="bilinear", align_corners=True)
    return torch.cat([tokens, plane.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)], dim=1)
