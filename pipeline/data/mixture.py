"""Combines several weighted data sets into one.

    data = open_data("s3://bucket/photos/train=0.7,s3://bucket/paintings/train=0.3")
    data.names, data.shares                # ["photos", "paintings"], [7/10, 3/10]
    Loader(data, batch_size=4096)          # 70% of the images in any part of the training are photos

A mixture is a `Dataset`: its rows are the concatenated rows of its data sets, with keys `name/key`. Its classes are
those of the first data set, followed by the new ones of each further data set; equal names are the same class.
mixed_order.py has the order of the samples.
"""

import bisect
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline import address
from pipeline.data.format.dataset import Dataset, open_dataset
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.pages import RowGroup
from pipeline.errors import UserError, plural


class Mixture(Dataset):
    """Data sets and their shares of the images (sum 1). Raises UserError for incompatible data sets."""

    def __init__(self, uri: str, parts: Sequence[Dataset], shares: Sequence[Fraction]) -> None:
        self.parts, self.shares = list(parts), list(shares)
        self.names = address.names([part.uri for part in parts])
        _check_alike(self.parts)
        super().__init__(uri, _manifest(self.parts, self.shares))
        self._first_groups = np.cumsum([0, *(len(part.row_groups) for part in parts)]).tolist()
        self._first_shards = np.cumsum([0, *(len(part.manifest.shards) for part in parts)]).tolist()
        index = {name: i for i, name in enumerate(self.classes)}
        self._labels = [np.array([*(index[name] for name in part.classes), -1], np.int32) for part in parts]

    def __repr__(self) -> str:
        return f"Mixture({self.uri!r}, {len(self)} x {self.encoding}, {plural(len(self.classes), 'class')})"

    def _part(self, row_group: int) -> tuple[int, Dataset, int]:
        """The number of a row group's data set, the data set, and the number of the row group in it."""
        number = bisect.bisect_right(self._first_groups, row_group) - 1
        return number, self.parts[number], row_group - self._first_groups[number]

    def shard_uri(self, shard: int) -> str:
        number = bisect.bisect_right(self._first_shards, shard) - 1
        return self.parts[number].shard_uri(shard - self._first_shards[number])

    def check_shards(self) -> None:
        for part in self.parts:
            part.check_shards()

    def _parse(self, i: int, data: bytes | memoryview, images: bool = True) -> RowGroup:
        number, part, group_of_part = self._part(i)
        group = part._parse(group_of_part, data, images)
        labels: Any = self._labels[number]
        if self.multilabel:
            labels = [labels[row].tolist() for row in group.labels]
        else:
            labels = labels[group.labels]  # -1, no label, is the last entry
        return group._replace(keys=[f"{self.names[number]}/{key}" for key in group.keys], labels=labels)

    def _damaged(self, i: int, why: str) -> UserError:
        _, part, group_of_part = self._part(i)
        return part._damaged(group_of_part, why)

    @property
    def rows(self) -> list[np.ndarray]:
        """The row counts of the row groups of each data set."""
        return [part.row_groups["rows"] for part in self.parts]

    @property
    def share_texts(self) -> dict[str, str]:
        """{fingerprint of a data set: its share as a fraction}"""
        return {part.manifest.fingerprint: str(share) for part, share in zip(self.parts, self.shares, strict=True)}


def open_data(text: str) -> Dataset:
    """Opens training data: one data set, or a `Mixture` ("a=0.7,b=0.3"). Raises UserError."""
    if not address.is_mixture(text):
        try:
            return open_dataset(text)
        except UserError as error:
            if hint := address.hint(text):
                raise type(error)(f"{error}{hint}") from error
            raise
    shares = address.shares(text)
    return Mixture(address.normalise(text), [open_dataset(uri) for uri, _ in shares], [share for _, share in shares])


def smallest(data: Dataset) -> int:
    """The number of rows of the smallest data set of a mixture, or of a single data set."""
    return min(map(len, data.parts)) if isinstance(data, Mixture) else len(data)


def check_samples(data: Dataset, lanes: int) -> None:
    """Raises UserError for a data set with fewer rows than lanes."""
    for part in data.parts if isinstance(data, Mixture) else [data]:
        if len(part) < lanes:
            raise UserError(
                f"{part.uri}: {plural(len(part), 'sample')} cannot fill {plural(lanes, 'lane')}; set lanes to a smaller divisor of the batch"
            )


def _check_alike(parts: Sequence[Dataset]) -> None:
    """Raises UserError that names two data sets whose rows cannot be in the same batch."""
    for first, other in itertools.combinations(parts, 2):
        both = f"{first.uri} and {other.uri} cannot be mixed"
        if first.encoding != other.encoding:
            raise UserError(
                f"{both}: their encodings are {first.encoding} and {other.encoding}; prepare both with one --encoding"
            )
        if first.encoding == "patches" and first.manifest.image != other.manifest.image:
            raise UserError(
                f"{both}: their patches are {_geometry(first)} and {_geometry(other)}; prepare both with the same "
                "--size and --patch-size, or with --encoding jpeg, which allows different sizes"
            )
        if first.multilabel != other.multilabel:
            several, one = (first, other) if first.multilabel else (other, first)
            raise UserError(f"{both}: {several.uri} has several labels per image, {one.uri} has one")
        if bool(first.classes) != bool(other.classes):
            without = other if first.classes else first
            raise UserError(f"{both}: {without.uri} has no classes; prepare it with labels, or remove it")
        if first.manifest.fingerprint == other.manifest.fingerprint:
            raise UserError(f"{both}: they are the same data; name it once, with the sum of the weights")


def _geometry(dataset: Dataset) -> str:
    return "{height}x{width}x{channels} in patches of {patch_size}".format(**dataset.manifest.image)


def _manifest(parts: Sequence[Dataset], shares: Sequence[Fraction]) -> Manifest:
    """The manifest of the mixture. The fingerprint covers the contents, order and shares of the data sets."""
    manifests = [part.manifest for part in parts]
    classes = list(dict.fromkeys(name for manifest in manifests for name in manifest.classes))
    counts = dict.fromkeys(classes, 0)
    for manifest in manifests:
        for name, count in zip(manifest.classes, manifest.class_counts, strict=True):
            counts[name] += count
    return Manifest(
        encoding=manifests[0].encoding,
        image=manifests[0].image,
        multilabel=manifests[0].multilabel,
        rows=sum(manifest.rows for manifest in manifests),
        inputs=sum(manifest.inputs for manifest in manifests),
        fingerprint=address.mixture_fingerprint([manifest.fingerprint for manifest in manifests], shares),
        classes=classes,
        class_counts=list(counts.values()),
        shards=[shard for manifest in manifests for shard in manifest.shards],
    )
