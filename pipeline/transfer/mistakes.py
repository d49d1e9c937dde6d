"""Mistakes of a classifier: the most confused pairs of classes, and misclassified test images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.transfer.predictions import Predictions

MAX_PAIRS, MAX_IMAGES = 12, 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The number of images of one class that were classified as another class."""

    label: str
    prediction: str
    count: int
    images: int
    """Number of images with that label."""

    @property
    def share(self) -> float:
        return self.count / self.images


def most_confused(found: Predictions, classes: Sequence[str]) -> list[Pair]:
    """At most twelve pairs, the most frequent first. Empty for multi-label data."""
    if found.labels.ndim > 1:
        return []
    known = found.labels >= 0
    labels, guesses = found.labels[known], found.classes[known]
    wrong = labels != guesses
    counts = Counter(zip(labels[wrong].tolist(), guesses[wrong].tolist(), strict=True))
    totals = np.bincount(labels, minlength=len(classes))
    return [
        Pair(label=_name(classes, label), prediction=_name(classes, guess), count=count, images=int(totals[label]))
        for (label, guess), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_PAIRS]
    ]


def misclassified(found: Predictions) -> np.ndarray:
    """Positions of at most 24 misclassified images, taken from the confused pairs
    in turn, the most frequent pairs first."""
    if found.labels.ndim > 1:
        return np.zeros(0, np.int64)
    wrong = np.flatnonzero((found.labels >= 0) & (found.labels != found.classes))
    pairs = list(zip(found.labels[wrong].tolist(), found.classes[wrong].tolist(), strict=True))
    frequency, turn = Counter(pairs), Counter[tuple[int, int]]()
    order = []
    for position, pair in zip(wrong.tolist(), pairs, strict=True):
        order.append((turn[pair], -frequency[pair], position))
        turn[pair] += 1
    return np.array([position for *_, position in sorted(order)[:MAX_IMAGES]], np.int64)


def describe_mistake(found: Predictions, position: int, classes: Sequence[str]) -> str:
    """The label and the prediction of one image, such as "cat → dog"."""
    label, guess = int(found.labels[position]), int(found.classes[position])
    return f"{_name(classes, label)} → {_name(classes, guess)}"


def _name(classes: Sequence[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else str(index)
