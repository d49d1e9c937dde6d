"""Predictions for a test set, and their storage as Parquet with page checksums."""

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.transfer.protocols import L2_GRID

CONFUSION_CLASSES = 20
"""Maximum number of classes for which a confusion matrix is stored."""


@dataclass(slots=True)
class Predictions:
    """Predictions for a whole dataset, in its order. `labels` is (N,), or (N,M) padded with -1 for multi-label data."""

    keys: list[str]
    labels: np.ndarray
    classes: np.ndarray

    def correct(self) -> np.ndarray:
        """bool (N,): whether the predicted class is (one of) the labels."""
        labels = self.labels if self.labels.ndim == 2 else self.labels[:, None]
        return np.any(labels == self.classes[:, None], axis=1)

    def labelled(self) -> np.ndarray:
        """bool (N,): whether the image has a label; others, as in ImageNet-ReaL, do not count."""
        labels = self.labels if self.labels.ndim == 2 else self.labels[:, None]
        return np.any(labels >= 0, axis=1)

    def accuracy(self, without: frozenset[str] = frozenset()) -> float:
        """Top-1 in percent over the labelled images whose key is not in `without`; NaN if there are no such images."""
        counts = self.labelled()
        if without:
            counts &= np.array([key not in without for key in self.keys])
        return 100.0 * float(self.correct()[counts].mean()) if counts.any() else math.nan

    def with_labels(self, labels: np.ndarray) -> "Predictions":
        return replace(self, labels=labels)

    def confusion(self, classes: int) -> list[list[int]] | None:
        """Counts by label (row) and prediction (column); None for multi-label data. A head may have more classes than
        its task: then the last row and column are all its other classes."""
        if self.labels.ndim > 1:
            return None
        known = self.labelled()
        guesses = np.minimum(self.classes[known], classes)
        size = max(classes, int(guesses.max(initial=-1)) + 1)
        counts = np.zeros((size, size), np.int64)
        np.add.at(counts, (self.labels[known], guesses), 1)
        return counts.tolist()

    def small_confusion(self, classes: int) -> list[list[int]] | None:
        """`confusion` for at most CONFUSION_CLASSES classes, otherwise None."""
        return self.confusion(classes) if classes <= CONFUSION_CLASSES else None

    def by_class(self, classes: int) -> list[tuple[int, int]] | None:
        """(images, correct images) of each class; None for multi-label data."""
        if self.labels.ndim > 1:
            return None
        known = self.labels[self.labelled()]
        right = known[self.correct()[self.labelled()]]
        images, correct = (np.bincount(values, minlength=classes).tolist() for values in (known, right))
        return list(zip(images, correct, strict=True))


def pack_predictions(found: Predictions) -> bytes:
    labels = found.labels[:, None] if found.labels.ndim == 1 else found.labels
    lists = pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1), pa.int64()), labels.shape[1])
    sink = io.BytesIO()
    table = pa.table({"key": found.keys, "labels": lists, "prediction": found.classes})
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def unpack_predictions(data: bytes) -> Predictions:
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    labels = np.array(table["labels"].to_pylist(), np.int64)
    classes = table["prediction"].to_numpy()
    return Predictions(table["key"].to_pylist(), labels[:, 0] if labels.shape[1] == 1 else labels, classes)


@dataclass(slots=True)
class Hits:
    """The test images that few-shot probes classified correctly: {shots: bool (l2, N)}.

    All l2 of L2_GRID are kept, because the choice of l2 may depend on all tasks together.
    """

    keys: list[str]
    labelled: np.ndarray
    correct: dict[int, np.ndarray]

    def accuracy(self, shots: int, l2: int, without: frozenset[str] = frozenset()) -> float:
        """Top-1 in percent for L2_GRID[l2], over the labelled images whose key is not in `without`."""
        counts = self.labelled
        if without:
            counts = counts & np.array([key not in without for key in self.keys])
        return 100.0 * float(self.correct[shots][l2][counts].mean()) if counts.any() else math.nan


def pack_hits(hits: Hits) -> bytes:
    """Serialises hits as Parquet, with one bit per l2: 4 bytes per image and number of shots."""
    columns: dict[str, Any] = {"key": hits.keys, "labelled": hits.labelled}
    for shots, correct in hits.correct.items():
        bits = np.packbits(correct, axis=0).T
        columns[f"shots-{shots}"] = pa.array(map(bytes, bits), pa.binary(bits.shape[1]))
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    return sink.getvalue()


def unpack_hits(data: bytes) -> Hits:
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    correct = {}
    for name in table.column_names[2:]:
        packed = np.frombuffer(b"".join(table[name].to_pylist()), np.uint8).reshape(len(table), -1)
        correct[int(name.removeprefix("shots-"))] = np.unpackbits(packed, axis=1, count=len(L2_GRID)).T.astype(bool)
    return Hits(table["key"].to_pylist(), table["labelled"].to_numpy(zero_copy_only=False), correct)
