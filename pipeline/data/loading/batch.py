"""A batch while it is filled, and its labels as a tensor."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from pipeline.data.format import RowGroup
from pipeline.data.loading.mixed_order import MixedOrder
from pipeline.data.loading.order import Order


@dataclass(kw_only=True, slots=True)
class Batch:
    """One rank's share of a step while it is being filled; its n rows are ordered by lane."""

    order: Order | MixedOrder
    step: int
    per_lane: int  # rows of each lane
    groups: list[int]  # row group of each row
    rows: list[int]  # position of each row in its row group
    samples: np.ndarray  # index of each row in the dataset, int64 (n,)
    epochs: np.ndarray  # of the data set that each row is of, int64 (n,)
    sources: dict[int, Future[RowGroup]]  # row groups in memory or being read
    images: torch.Tensor
    pixels: np.ndarray  # the same memory as `images`
    kept: np.ndarray | None  # indices of the patches kept, int64 (n, kept)
    lam: float
    labels: list[Any]
    keys: list[str]
    tasks: list[Future[None]] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.samples)


def label_tensor(labels: list[Any], multilabel: bool) -> torch.Tensor:
    """Labels as int64 (b,), or for multi-label data (b, M) padded with -1, where M
    >= 1 is the largest number of labels."""
    if not multilabel:
        return torch.tensor(labels, dtype=torch.int64)
    lengths = np.fromiter(map(len, labels), np.int64, len(labels))
    padded = np.full((len(labels), max(1, int(lengths.max(initial=1)))), -1, np.int64)
    # One assignment for the batch: this runs in the thread that launches the training step.
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(labels), np.int64)
    return torch.from_numpy(padded)
