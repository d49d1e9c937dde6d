"""Reports on removed duplicates: `duplicates.parquet` and the contact sheet `duplicates.png`."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.codecs import decode_stored

DUPLICATES, PAIRS = "duplicates.parquet", "duplicates.png"
SHEET_PAIRS = 24


def by_reason(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts of duplicates by reason (exact, near, descriptor) and by where they
    match (the corpus or an evaluation set)."""
    return dict(Counter(f"{record['reason']} {record['set'] or 'in the corpus'}" for record in records))


def duplicates_table(records: Sequence[dict[str, Any]]) -> bytes:
    """The content of `duplicates.parquet`: key, reason (exact, near, descriptor), set and key of the match, number of
    different bits, similarity of descriptors, and after alignment the correlation of
    detail (1.0 if exact) and the largest difference."""
    fields = {
        "key": pa.string(),
        "reason": pa.string(),
        "set": pa.string(),
        "match": pa.string(),
        "distance": pa.int32(),
        "similarity": pa.float32(),
        "detail": pa.float32(),
        "difference": pa.float32(),
    }
    columns = {name: pa.array([record[name] for record in records], kind) for name, kind in fields.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def attach_pictures(records: Sequence[dict[str, Any]], pictures: Sequence[tuple[bytes, bytes]]) -> None:
    """Adds both images (encoded) to the least certain near matches in `records`, for the contact sheet."""
    near = [i for i, record in enumerate(records) if record["reason"] != "exact"]
    for i in sorted(near, key=lambda i: records[i]["detail"])[:SHEET_PAIRS]:
        records[i]["pictures"] = [base64.b64encode(data).decode() for data in pictures[i]]


def contact_sheet(records: Sequence[dict[str, Any]]) -> bytes | None:
    """The least certain near matches as pairs of images, as PNG; None if there are none."""
    shown = sorted((r for r in records if "pictures" in r), key=lambda r: r["detail"])[:SHEET_PAIRS]
    pairs = []
    for record in shown:
        mine, other = (decode_stored(base64.b64decode(text)).copy() for text in record["pictures"])
        pairs.append((mine, other, f"{record['detail']:.2f}: {record['key'][-18:]} | {record['match'][-18:]}"))
    return pair_sheet(pairs) if pairs else None


def pair_sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> bytes:
    """Pairs of images side by side with a title, as PNG."""
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
