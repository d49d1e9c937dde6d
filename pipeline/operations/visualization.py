"""Figures of a trained Vision Transformer: the three panels of figure 7 of the paper, and attention rollout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.inspect import attention_distance, attention_rollout, embedding_filters, position_similarity
from models.vit import VisionTransformer
from pipeline import storage
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Figures and numbers of a model."""

    figures: dict[str, Figure]
    """Figures by name: filters, positions, distance, rollout, as far as the model supports them."""
    missing: dict[str, str]
    """The reason for each missing figure."""
    distance: np.ndarray
    """Mean attention distance in pixels, (depth, heads)."""

    def numbers(self) -> dict[str, Any]:
        """The part of numbers.json that comes from the model."""
        rows = self.distance.round(2).tolist()
        layers = {f"layer {i + 1}": row for i, row in enumerate(rows)}
        return {"mean_attention_distance": layers, "missing": self.missing}


def sample_uri(config: Mapping[str, Any]) -> str | None:
    """The validation set in the config.json of a checkpoint, if it still exists."""
    pretrain = config.get("pretrain")
    runtime = pretrain.get("runtime") if isinstance(pretrain, dict) else None
    validation = runtime.get("validation") if isinstance(runtime, dict) else None
    if isinstance(validation, str) and storage.exists(storage.join(validation, "manifest.json")):
        return validation
    return None


def inspect_model(model: VisionTransformer, images: torch.Tensor) -> Inspection:
    """Draws filters, positions, distance and rollout.

    images: uint8 (B,H,W,C) at the model's resolution; the paper averages attention distance over 128.
    """
    drawn: dict[str, Figure] = {}
    missing: dict[str, str] = {}
    for name, draw in {"filters": draw_filters, "positions": draw_positions}.items():
        try:
            drawn[name] = draw(model)
        except UserError as error:
            missing[name] = str(error)
    distance = attention_distance(model, images)
    drawn["distance"] = draw_distance(distance, model.config)
    some = images[
        np.unique(np.linspace(0, len(images) - 1, 8).round())
    ]  # spread over the set, because the first eight may have the same class
    drawn["rollout"] = draw_rollout(some, attention_rollout(model, some))
    return Inspection(figures=drawn, missing=missing, distance=distance)


def draw_filters(model: VisionTransformer) -> Figure:
    """The first principal components of the embedding filters, each scaled to the full colour range."""
    components, share = embedding_filters(model)
    columns = 7
    rows = -(-len(components) // columns)
    figure = _figure(5.6, 0.8 * rows + 0.6)
    grid = figure.add_gridspec(rows, columns, left=0.02, right=0.98, bottom=0.02, top=1 - 0.5 / figure.get_figheight(), wspace=0.06, hspace=0.06)  # fmt: skip
    for i, component in enumerate(components):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        picture = 0.5 + 0.5 * component / np.abs(component).max()  # zero is grey
        axes.imshow(
            picture.squeeze(), cmap="gray" if picture.shape[-1] == 1 else None, vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_axis_off()
    figure.suptitle(
        f"Embedding filters: first {len(components)} principal components\n({share.sum():.0%} of the variance)",
        fontsize=10, y=1 - 0.06 / figure.get_figheight(), va="top",
    )  # fmt: skip
    return figure


def draw_positions(model: VisionTransformer) -> Figure:
    """One tile per patch: similarity of its position embedding to all others. Grids above 14x14 are subsampled."""
    similarity = position_similarity(model)
    # The paper's colours range from -1 to 1. In a small model all positions may be similar, and the tiles would have
    # one colour.
    low = -1.0 if similarity.min() < 0 else np.floor(10 * similarity.min()) / 10
    grid = model.grid
    shown = np.arange(0, grid, -(-grid // 14))
    side = max(4.0, min(7.0, 0.55 * len(shown)))
    figure = _figure(side + 1.3, side + 0.7)
    tiles = figure.add_gridspec(
        len(shown), len(shown), left=0.11, right=0.8, bottom=0.11, top=0.9, wspace=0.08, hspace=0.08
    )
    image = None
    for i, row in enumerate(shown):
        for j, column in enumerate(shown):
            axes = figure.add_subplot(tiles[i, j])
            image = axes.imshow(similarity[row, column], vmin=low, vmax=1, cmap="viridis", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if j == 0:
                axes.set_ylabel(str(row + 1), fontsize=7, rotation=0, ha="right", va="center", labelpad=3)
            if i == len(shown) - 1:
                axes.set_xlabel(str(column + 1), fontsize=7, labelpad=3)
    assert image is not None
    bar = figure.colorbar(image, cax=figure.add_axes((0.825, 0.11, 0.025, 0.79)))
    bar.set_label("cosine similarity", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.text(0.455, 0.03, "input patch column", ha="center", fontsize=8)
    figure.text(0.025, 0.5, "input patch row", va="center", rotation=90, fontsize=8)
    figure.suptitle("Position embedding similarity", fontsize=10, x=0.455, y=0.945)
    return figure


def draw_distance(distance: np.ndarray, config: dict[str, Any]) -> Figure:
    """One dot per layer and head."""
    depth, heads = distance.shape
    figure = _figure(4.6, 3.6)
    axes = figure.add_axes((0.14, 0.14, 0.83, 0.75))
    colours = _palette(heads)
    for head in range(heads):
        label = f"head {head + 1}" if head < 3 else ("..." if head == 3 else None)
        axes.scatter(
            np.arange(1, depth + 1), distance[:, head], s=14, color=colours[head], label=label, linewidths=0, alpha=0.9
        )
    axes.set_ylim(0, max(1.0, float(distance.max())) * 1.08)
    axes.set_xlim(0.5, depth + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("network depth (layer)", fontsize=9)
    axes.set_ylabel("mean attention distance (pixels)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7, loc="lower right", frameon=False, handletextpad=0.2)
    axes.set_title(f"{config['variant']}, {config['image_size']} px", fontsize=10)
    return figure


def draw_rollout(images: torch.Tensor, rollout: np.ndarray) -> Figure:
    """Each image next to the same image weighted by its rollout."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = _figure(2.9 * columns, 1.5 * rows + 0.35)
    grid = figure.add_gridspec(rows, 2 * columns, left=0.01, right=0.99, bottom=0.01, top=1 - 0.32 / figure.get_figheight(), wspace=0.04, hspace=0.06)  # fmt: skip
    size = images.shape[1]
    masks = torch.nn.functional.interpolate(
        torch.from_numpy(rollout)[:, None], size=(size, size), mode="bilinear", align_corners=False
    )
    for i, (image, mask) in enumerate(zip(images.numpy(), masks[:, 0].numpy(), strict=True)):
        # Saturate at the 98th percentile, so that a single bright patch does not darken the rest of the image.
        light = np.clip(mask / max(float(np.quantile(mask, 0.98)), 1e-12), 0, 1)
        lit = image / 255 * (0.12 + 0.88 * light)[:, :, None]
        for j, picture in enumerate((image / 255, lit)):
            axes = figure.add_subplot(grid[i // columns, 2 * (i % columns) + j])
            axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            if i < columns:
                axes.set_title(("input", "attention")[j], fontsize=8, pad=2)
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=160)


def _palette(count: int) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0.05, 0.92, count))
