"""Small datasets of tinted images, whose class is their brightest channel, and the batches of a loader."""

from typing import Any

import cv2
import numpy as np
import torch

from pipeline.data import Dataset, Loader
from pipeline.data.format import write_dataset
from pipeline.data.patches import patchify
from tests.images import tinted

CLASSES = ["red", "green", "blue"]


def write_tinted(uri: str, count: int, side: int, **options: int) -> str:
    """`count` PNG pictures of `side` pixels; options as for `write_dataset`."""
    generator = np.random.default_rng(0)

    def rows():
        for i in range(count):
            png = cv2.imencode(".png", tinted(generator, side, side, i % 3))[1].tobytes()
            yield f"{i:04d}", png, i % 3, side, side

    write_dataset(uri, rows(), classes=CLASSES, **options)
    return uri


def write_tinted_patches(uri: str, count: int, side: int, *, seed: int, noise: int, tint: int) -> str:
    """`count` images in 4x4 patches; a smaller `tint` relative to `noise` makes the classes harder to distinguish."""
    generator = np.random.default_rng(seed)

    def rows():
        for i in range(count):
            pixels = tinted(generator, side, side, i % 3, noise=noise, tint=tint)
            yield f"{seed}-{i}", patchify(pixels, 4), i % 3, side, side

    image = {"height": side, "width": side, "patch_size": 4, "channels": 3}
    write_dataset(uri, rows(), classes=CLASSES, encoding="patches", image=image)
    return uri


def first_batches(dataset: Dataset, steps: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Plain copies of the first `steps` batches of a loader; None: of the epoch."""
    batches: list[dict[str, Any]] = []
    with Loader(dataset, **options) as loader:
        for batch in loader:
            batches.append({k: v.clone() if isinstance(v, torch.Tensor) else list(v) for k, v in batch.items()})
            if len(batches) == steps:
                break
    return batches
