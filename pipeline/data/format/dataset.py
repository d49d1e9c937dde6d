"""A finished dataset, opened for reading."""

import functools
import mmap
import operator
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.format.checksum import checksum
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.pages import RowGroup, parse_row_group
from pipeline.data.format.revisions import read_manifest
from pipeline.errors import UserError, plural
from pipeline.revision_names import MANIFEST

# One row group: shard number, group number in it, rows, first byte, first byte of the image values, end byte, checksum.
ROW_GROUP = np.dtype(
    [
        ("shard", "i4"),
        ("group", "i4"),
        ("rows", "i4"),
        ("start", "i8"),
        ("values", "i8"),
        ("end", "i8"),
        ("checksum", "u4"),
    ]
)


@functools.lru_cache(maxsize=256)
def _map(path: str, sha256: str) -> memoryview:
    """A memory-mapped local shard. sha256: cache key that distinguishes a rewritten dataset at the same path."""
    with storage.open_regular(path) as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Dataset:
    """A finished dataset, opened for reading. Opening takes one request for the manifest; pickling is cheap.

        dataset = open_dataset("s3://bucket/photos/train")
        len(dataset), dataset.classes          # 1281167, ["n01440764", ...]
        dataset[7]                             # {"key": ..., "image": bytes, "label": 3, "width": 500, "height": 375}
        dataset[-3:]                           # a list of such rows

    Reading a single row reads a whole row group: use `read` for several rows, `Loader` for training.

    `row_groups` is a structured array (shard, group, rows, start, values, end, checksum), in dataset order; `starts`
    (groups + 1,) are the cumulative rows, so row i lies in group `np.searchsorted(starts, i, "right") - 1`. The
    checksum of a row group is checked when it is decoded for the first time."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri, self.manifest, self.schema = uri, manifest, manifest.schema
        self.classes = manifest.classes
        self.encoding = manifest.encoding
        self.multilabel = manifest.multilabel
        counts = [len(shard.row_groups) for shard in manifest.shards]
        table = np.array([group for shard in manifest.shards for group in shard.row_groups], np.int64).reshape(-1, 5)
        self.row_groups = np.empty(len(table), ROW_GROUP)
        self.row_groups["shard"] = np.repeat(np.arange(len(counts)), counts)
        self.row_groups["group"] = np.concatenate([np.arange(n) for n in counts]) if counts else []
        for column, name in enumerate(("rows", "start", "values", "end", "checksum")):
            self.row_groups[name] = table[:, column]
        self.starts = np.concatenate([[0], np.cumsum(self.row_groups["rows"], dtype=np.int64)])
        self._intact = np.zeros(len(table), bool)  # row groups whose checksum was verified

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: Any) -> Any:
        """Row `index` as returned by `read`; negative indices count from the end. A slice returns a list of rows."""
        if isinstance(index, slice):
            return self.read(range(*index.indices(len(self))))
        i = operator.index(index)
        return self.read([i + len(self) if i < 0 else i])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterates over all rows in order. Each row group is read once."""
        for first, stop in pairwise(self.starts.tolist()):
            yield from self.read(range(first, stop))

    def __repr__(self) -> str:
        return f"Dataset({self.uri!r}, {len(self)} x {self.encoding}, {plural(len(self.classes), 'class')})"

    def shard_uri(self, shard: int) -> str:
        return storage.join(self.uri, self.manifest.shards[shard].name)

    def check_shards(self) -> None:
        """Compares the names and sizes of the shards with a listing of the folder, except on a web server, which cannot list.
        Raises UserError for a shard that is missing or has another size."""
        if not storage.can_list(self.uri):
            return
        there = {file.path: file.size for file in storage.list_files(self.uri, recursive=False)}
        for shard in self.manifest.shards:
            found = there.get(shard.name)
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found:,} bytes instead of {shard.bytes:,}"
                uri = storage.join(self.uri, shard.name)
                raise UserError(
                    f"{uri}: the shard {what}; `jobs/prepare.py verify {self.uri}` lists all problems; restore it, or prepare the data again"
                )

    def row_group_bytes(self, i: int) -> memoryview:
        """The bytes of row group i: a view of the memory-mapped file, or the result of one range request to S3.

        Raises UserError when the shard is missing or truncated.
        """
        return self._bytes(i, int(self.row_groups[i]["start"]), int(self.row_groups[i]["end"]))

    def _bytes(self, i: int, start: int, end: int) -> memoryview:
        number = int(self.row_groups[i]["shard"])
        shard, uri = self.manifest.shards[number], self.shard_uri(number)
        try:
            if storage.is_remote(uri):
                data = memoryview(storage.read_range(uri, start, end))
            else:
                data = _map(uri, shard.sha256)[start:end]
        except FileNotFoundError as error:
            raise UserError(
                f"{uri}: the shard is missing; `jobs/prepare.py verify {self.uri}` lists all problems; "
                "restore it, or prepare the data again"
            ) from error
        if len(data) != end - start:
            raise UserError(f"{uri}: the shard is truncated ({len(data)} of {end - start} bytes at {start})")
        return data

    def is_intact(self, i: int, data: bytes | memoryview) -> bool:
        """Whether `data` matches the checksum of row group i. The result is cached."""
        if not self._intact[i]:
            self._intact[i] = checksum(data) == self.row_groups[i]["checksum"]
        return bool(self._intact[i])

    def decode_row_group(self, i: int, data: bytes | memoryview) -> RowGroup:
        """Decodes the bytes of row group i. Raises UserError naming the shard for a wrong checksum or labels outside
        the classes."""
        if not self.is_intact(i, data):
            raise self._damaged(i, "its checksum differs from the manifest's")
        return self._parse(i, data)

    def _parse(self, i: int, data: bytes | memoryview, images: bool = True) -> RowGroup:
        group = self.row_groups[i]
        try:
            return parse_row_group(data, int(group["rows"]), int(group["values"] - group["start"]), self.schema, images)
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise self._damaged(i, str(error)) from error

    def _damaged(self, i: int, why: str) -> UserError:
        shard, group = int(self.row_groups[i]["shard"]), self.row_groups[i]["group"]
        return UserError(
            f"{self.shard_uri(shard)}: row group {group} is damaged ({why}); `jobs/prepare.py verify {self.uri}` lists "
            "the damage; prepare the data again"
        )

    def read_row_group(self, i: int) -> RowGroup:
        return self.decode_row_group(i, self.row_group_bytes(i))

    def read(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Rows by position, in the given order: dicts with key, image, label, width, height.

        `image` is the stored file (bytes) for encoding jpeg, the uint8 array (N, P*P*C) for encoding patches. Each row
        group is read once. Raises IndexError for a position outside the dataset."""
        wanted = [int(i) for i in indices]
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise IndexError(f"{self.uri} has {plural(len(self), 'row')}; requested {min(wanted)}..{max(wanted)}")
        homes = np.searchsorted(self.starts, wanted, "right") - 1
        rows: list[Any] = [None] * len(wanted)
        for home in np.unique(homes):
            group = self.read_row_group(home)
            for position in np.flatnonzero(homes == home):
                i = wanted[position] - int(self.starts[home])
                image = group.images[i]
                rows[position] = {
                    "key": group.keys[i],
                    "image": bytes(image) if self.encoding == "jpeg" else image.copy(),
                    "label": list(group.labels[i]) if self.multilabel else int(group.labels[i]),
                    "width": int(group.widths[i]),
                    "height": int(group.heights[i]),
                }
        return rows

    def head(self, i: int) -> RowGroup:
        """Row group i without images (`images` is None): keys, labels and original sizes."""
        data = self._bytes(i, int(self.row_groups[i]["start"]), int(self.row_groups[i]["values"]))
        return self._parse(i, data, images=False)

    def heads(self) -> Iterator[RowGroup]:
        """All row groups without images (`images` is None), in dataset order: keys, labels and original sizes. Needs
        one small read per row group; reads from S3 run in parallel."""

        if not storage.is_remote(self.uri):
            yield from map(self.head, range(len(self.row_groups)))
            return
        with ThreadPoolExecutor(16) as pool:
            for first in range(
                0, len(self.row_groups), 256
            ):  # bounded: a single map would queue reads of the whole dataset
                yield from pool.map(self.head, range(first, min(first + 256, len(self.row_groups))))

    def table(self, columns: Sequence[str] = ("key", "label")) -> pa.Table:
        """`key`, `label`, `width` or `height` of the whole dataset as an Arrow table, in dataset order."""
        types = {f.name: f.type for f in self.schema.arrow()}
        place = {"key": 0, "label": 1, "width": 2, "height": 3}
        chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
        for head in self.heads():
            for name in columns:
                chunks[name].append(pa.array(head[place[name]], types[name]))
        return pa.table({name: pa.chunked_array(chunk, types[name]) for name, chunk in chunks.items()})


def open_dataset(uri: str | os.PathLike, check: bool = True) -> Dataset:
    """Opens a finished dataset. Raises UserError when there is none at `uri`, when its format has another version, and,
    unless check=False, when the byte ranges in the manifest are impossible."""
    uri, manifest = read_manifest(os.fspath(uri))
    where = storage.join(uri, MANIFEST)
    try:
        dataset = Dataset(uri, manifest)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: its row groups are not a table of numbers ({error})") from error
    for problem in wrong_ranges(dataset) if check else ():
        raise UserError(f"{where}: {problem}; prepare the data again")
    return dataset


def wrong_ranges(dataset: Dataset) -> Iterator[str]:
    """Problems with the byte ranges in the manifest, which the loader uses without reading footers."""
    manifest, groups = dataset.manifest, dataset.row_groups
    of_shard = groups["shard"]
    ends = np.array([shard.bytes for shard in manifest.shards], np.int64)
    bad = (groups["rows"] < 1) | (groups["start"] < 0) | (groups["values"] <= groups["start"])
    bad |= groups["end"] < groups["values"]
    if dataset.schema.image_bytes:
        bad |= groups["end"] - groups["values"] != groups["rows"].astype(np.int64) * dataset.schema.image_bytes
    if len(groups):
        bad |= groups["end"] > ends[of_shard]
        bad[1:] |= (of_shard[1:] == of_shard[:-1]) & (groups["start"][1:] < groups["end"][:-1])
    for i in np.flatnonzero(bad)[:10]:
        shard, (number, rows, start, values, end) = manifest.shards[of_shard[i]], groups[i].item()[1:6]
        yield (
            f"{shard.name}: row group {number} of {plural(rows, 'row')} cannot be at {start}, {values}, {end} "
            f"of {shard.bytes} bytes"
        )
    counts = np.bincount(of_shard, groups["rows"], len(manifest.shards)).astype(np.int64).tolist()
    for shard, count in zip(manifest.shards, counts, strict=True):
        if shard.rows != count:
            yield f"{shard.name}: {plural(shard.rows, 'row')}, its row groups add up to {count}"
    if manifest.rows != sum(counts):
        yield f"rows is {manifest.rows}, its shards add up to {sum(counts)}"
