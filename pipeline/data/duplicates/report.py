"""What was removed as a duplicate, and of what: `duplicates.parquet` and the contact sheet `duplicates.png`."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import images

DUPLICATES, PAIRS = "duplicates.parquet", "duplicates.png"


def duplicates_table(records: Sequence[dict[str, Any]]) -> bytes:
    """`duplicates.parquet`: key, reason (exact, near), the set and key it matches, distance in bits."""
    fields = {
        "key": pa.string(),
        "reason": pa.string(),
        "set": pa.string(),
        "match": pa.string(),
        "distance": pa.int32(),
    }
    columns = {name: pa.array([record[name] for record in records], kind) for name, kind in fields.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def pair_sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> bytes:
    """Pairs of pictures side by side with a title, as PNG."""
    from matplotlib.figure import Figure

    columns = 4
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.9 * lines), dpi=90, layout="constrained")
    axes = np.atleast_2d(figure.subplots(lines, 2 * columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for i, (left, right, title) in enumerate(pairs):
        axes[2 * i].imshow(left)
        axes[2 * i + 1].imshow(right)
        axes[2 * i].set_title(title, fontsize=7, loc="left")
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def small_picture(pixels_HWC: np.ndarray, side: int = 96) -> np.ndarray:
    """For a contact sheet: the longer side at most `side`."""
    height, width = pixels_HWC.shape[:2]
    scale = min(1.0, side / max(height, width))
    return images.shrink(pixels_HWC, max(1, round(width * scale)), max(1, round(height * scale)))
