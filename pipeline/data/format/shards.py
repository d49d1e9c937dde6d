"""The shard format: how images lie on disk, and the manifest that makes a folder of shards a dataset.

A dataset is a folder, local or s3://, of `part-*.parquet` files, `rejects.parquet`, and `manifest.json`, which is written
last: a folder without it is unfinished. Shards are ordinary Parquet (pandas, pyarrow and Hugging Face `datasets` open
them) written so that a row group can be used without a Parquet reader:

- columns `key`, `label`, `width`, `height`, `image`, in this order, all required, uncompressed, plainly encoded, and one
  page per column chunk. A row group is therefore one byte range, and the image column in it is one header followed by
  the bare values: fixed-size rows for encoding `patches`, (uint32 length, bytes) pairs for encoding `jpeg`;
- the manifest holds those byte ranges, so a reader makes one range request per row group and never reads a footer,
  and patches can be memory-mapped in place.
"""

import functools
import gc
import hashlib
import json
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.varint import read_varint
from pipeline.errors import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.parquet"
MAX_ROWS_PER_GROUP = 2048  # a writer's memory is bounded for tiny images, too: a row costs some KB beside its bytes
ROW_GROUP_BYTES = 16 << 20
MOST_ROW_GROUP_BYTES = 1 << 30  # Arrow's binary arrays end at 2 GiB, and an image comes on top
SHARD_BYTES = 512 << 20
UNLABELLED = -1
SHARD_NAME = re.compile(r"[\w-][\w.-]*")

Encoding = Literal["jpeg", "patches"]
Label = int | Sequence[int]

# One row group: shard number, group number in it, rows, first byte, first byte of the image values, end byte.
ROW_GROUP = np.dtype(
    [("shard", "i4"), ("group", "i4"), ("rows", "i4"), ("start", "i8"), ("values", "i8"), ("end", "i8")]
)


# ---------------------------------------------------------------- manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file. `row_groups` has a line (rows, start, values, end) per row group: byte offsets in the file."""

    name: str
    rows: int
    bytes: int
    sha256: str
    row_groups: list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says; see the field comments. Order in the file is the order here, shards last."""

    schema: int = SCHEMA_VERSION
    encoding: Encoding
    image: dict[str, Any]  # jpeg: {"size", "quality"}; patches: {"height", "width", "patch_size", "channels"}
    multilabel: bool = False
    rows: int
    inputs: int  # rows + rejects + duplicates, checked
    duplicates: int = 0  # rows removed as duplicates, inside the corpus or of an evaluation set
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> count
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None
    fingerprint: str  # of the content: what a training run was trained on
    input_fingerprint: str = ""  # of the source listing
    config: dict[str, Any] = field(default_factory=dict)
    class_counts: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Patches per image, N (encoding patches)."""
        return (self.image["height"] // self.image["patch_size"]) * (self.image["width"] // self.image["patch_size"])

    @property
    def token_bytes(self) -> int:
        """Bytes per patch, P*P*C (encoding patches)."""
        return self.image["patch_size"] ** 2 * self.image["channels"]

    def to_json(self) -> str:
        """One line per field and per shard: readable, diffable, and compact at 300,000 row groups."""

        def line(value: Any) -> str:
            return json.dumps(value, ensure_ascii=False)

        lines = [f"{line(f.name)}: {line(getattr(self, f.name))}" for f in fields(self) if f.name != "shards"]
        shards = ",\n  ".join(line({f.name: getattr(shard, f.name) for f in fields(shard)}) for shard in self.shards)
        return "{\n " + ",\n ".join([*lines, f'"shards": [\n  {shards}\n ]']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST) -> "Manifest":
        """Raises UserError for another schema version or for what is not a manifest."""
        collecting = gc.isenabled()
        gc.disable()  # of 300,000 short lists it would look at each again and again: two thirds of the time
        try:
            values = json.loads(text)
            version = values.get("schema")
            if version != SCHEMA_VERSION:
                raise UserError(
                    f"{where}: schema version {version}, this program reads {SCHEMA_VERSION}; prepare it again"
                )
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            for shard in values["shards"]:
                if not SHARD_NAME.fullmatch(shard.name):  # names are joined to the dataset's address
                    raise ValueError(f"{shard.name!r} is no name of a shard")
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{where}: not a dataset manifest ({error})") from error
        finally:
            if collecting:
                gc.enable()


# ---------------------------------------------------------------- writing


def schema(
    encoding: Encoding, image: dict[str, Any], classes: Sequence[str], multilabel: bool, version: int = SCHEMA_VERSION
) -> pa.Schema:
    """The Arrow schema of a shard, with the versioned description in its metadata."""
    label = pa.list_(pa.field("element", pa.int32(), nullable=False)) if multilabel else pa.int32()
    width = -1
    if encoding == "patches":
        p, c = image["patch_size"], image["channels"]
        if image["height"] % p or image["width"] % p:
            raise UserError(f"patch size {p} does not divide an image of {image['height']}x{image['width']}")
        width = image["height"] * image["width"] * c
    description = {"schema": version, "encoding": encoding, "image": image, "classes": list(classes)}
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", label, nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("image", pa.binary(width), nullable=False),
        ],
        metadata={"vit_pipeline": json.dumps(description, ensure_ascii=False)},
    )


@dataclass(kw_only=True, slots=True)
class Receipt:
    """What one writer wrote: enough to build the manifest without opening a shard again. `pixels` holds the number of
    pixels measured and, per channel, their sum and sum of squares (values in [0, 1])."""

    shards: list[Shard] = field(default_factory=list)
    rows: int = 0
    class_counts: dict[int, int] = field(default_factory=dict)
    pixels: list[float] = field(default_factory=lambda: [0.0] * 7)

    def to_dict(self) -> dict[str, Any]:
        shards = [{f.name: getattr(shard, f.name) for f in fields(shard)} for shard in self.shards]
        counts = {str(label): count for label, count in sorted(self.class_counts.items())}
        return {"shards": shards, "rows": self.rows, "class_counts": counts, "pixels": self.pixels}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Receipt":
        return cls(
            shards=[Shard(**shard) for shard in values["shards"]],
            rows=values["rows"],
            class_counts={int(label): count for label, count in values["class_counts"].items()},
            pixels=values["pixels"],
        )


class ShardWriter:
    """Writes `part-<prefix>-NNNN.parquet` files under `uri`; the same rows always give the same bytes.

        with ShardWriter(uri, "00007", encoding="jpeg", image={"size": 256, "quality": 90}, classes=names) as writer:
            writer.write(key, jpeg_bytes, label, width, height)
        receipt = writer.receipt

    Image bytes are stored as they are: encoding `jpeg` takes any format that the loader reads (JPEG, PNG, ...); encoding
    `patches` takes the uint8 matrix N x (P*P*C), as array or bytes. A shard appears under its name complete or not at
    all. Leaving the block by an exception writes nothing more.
    """

    def __init__(
        self,
        uri: str,
        prefix: str,
        *,
        encoding: Encoding,
        image: dict[str, Any],
        classes: Sequence[str],
        multilabel: bool = False,
        row_group_bytes: int = ROW_GROUP_BYTES,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.uri, self.prefix = storage.normalise(uri), prefix
        self.schema = schema(encoding, image, classes, multilabel)
        self.row_group_bytes, self.shard_bytes = row_group_bytes, shard_bytes
        self.multilabel, self.num_classes = multilabel, len(classes)
        self.receipt = Receipt()
        width = self.schema.field("image").type.byte_width if encoding == "patches" else 0
        # A row group never outgrows its byte budget, whatever the size of one image (but holds at least one).
        self.max_rows = max(1, min(MAX_ROWS_PER_GROUP, row_group_bytes // width)) if width else MAX_ROWS_PER_GROUP
        self._rows: list[tuple[str, Any, int, int, bytes]] = []
        self._row_bytes = 0
        self._path = ""
        self._writer: pq.ParquetWriter | None = None
        self._group_rows: list[int] = []
        self._heads: list[tuple[bytes, int]] = []  # per row group: first stored image bytes, length of the values

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(
        self,
        key: str,
        image: bytes | memoryview | np.ndarray,
        label: Label,
        width: int,
        height: int,
        pixels: np.ndarray | None = None,
    ) -> None:
        """Adds a row. `width` and `height` are the original's; `pixels` (uint8 HWC), when given, enters the channel mean
        and standard deviation of the manifest."""
        data = image.tobytes() if isinstance(image, np.ndarray) else bytes(image)
        if self._rows and self._row_bytes + len(data) > self.row_group_bytes:
            self.end_row_group()
        self._rows.append((key, label, width, height, data))
        self._row_bytes += len(data)
        counts = self.receipt.class_counts
        for k in label if isinstance(label, Sequence) else (label,):
            if not UNLABELLED <= k < self.num_classes:
                raise ValueError(f"{key}: label {k} outside the {self.num_classes} classes")
            counts[k] = counts.get(k, 0) + 1
        if pixels is not None:
            self.measure(pixels)
        if len(self._rows) >= self.max_rows:
            self.end_row_group()

    def measure(self, pixels_HWC: np.ndarray) -> None:
        """Adds an image to the channel mean and standard deviation of the manifest."""
        import cv2

        mean, std = (statistic.ravel() / 255 for statistic in cv2.meanStdDev(pixels_HWC))
        n = pixels_HWC.shape[0] * pixels_HWC.shape[1]
        total = self.receipt.pixels
        total[0] += n
        for c in range(3):
            m, s = float(mean[c % len(mean)]), float(std[c % len(mean)])
            total[1 + c] += n * m
            total[4 + c] += n * (s * s + m * m)

    def end_row_group(self) -> None:
        """Writes the rows collected so far as a row group; rows that follow begin another."""
        if not self._rows:
            return
        if self._writer is None:
            handle, self._path = tempfile.mkstemp(prefix=".part-", suffix=".tmp", dir=self._local_folder())
            os.close(handle)
            self._writer = pq.ParquetWriter(
                self._path,
                self.schema,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                store_schema=True,
                # one page per column chunk: no limit below the row group itself
                data_page_size=1 << 30,
                max_rows_per_page=MAX_ROWS_PER_GROUP,
                write_batch_size=MAX_ROWS_PER_GROUP,
            )
        keys, labels, widths, heights, images = zip(*self._rows, strict=True)
        columns = [list(keys), [list(k) for k in labels] if self.multilabel else list(labels), list(widths)]
        columns += [list(heights), list(images)]
        arrays = [pa.array(column, type=f.type) for column, f in zip(columns, self.schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema), row_group_size=len(keys))
        fixed = pa.types.is_fixed_size_binary(self.schema.field("image").type)
        head = images[0] if fixed else struct.pack("<I", len(images[0])) + images[0]
        self._heads.append((head, self._row_bytes + (0 if fixed else 4 * len(images))))
        self._group_rows.append(len(keys))
        self._rows, self._row_bytes = [], 0
        if os.path.getsize(self._path) >= self.shard_bytes:
            self._finish_shard()

    def _local_folder(self) -> str | None:
        """Where a shard is written before it gets its name: beside the target (for an atomic rename), or /tmp for S3."""
        if storage.is_remote(self.uri):
            return None
        os.makedirs(self.uri, exist_ok=True)
        return self.uri

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        name = f"part-{self.prefix}-{len(self.receipt.shards):04d}.parquet"
        with open(self._path, "rb") as file:
            row_groups = self._locate(file.fileno(), name)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        target = storage.join(self.uri, name)
        if storage.is_remote(self.uri):
            storage.copy_file(self._path, target)
            os.remove(self._path)
        else:
            os.chmod(self._path, 0o666 & ~_umask())  # mkstemp's 0600 would shut out other users of the dataset
            os.replace(self._path, target)
        rows = sum(self._group_rows)
        self.receipt.shards.append(Shard(name=name, rows=rows, bytes=size, sha256=digest, row_groups=row_groups))
        self.receipt.rows += rows
        self._group_rows, self._heads = [], []

    def _locate(self, descriptor: int, name: str) -> list[list[int]]:
        """(rows, start, values, end) of every row group, checked against the file: readers rely on them blindly."""
        metadata = pq.read_metadata(self._path)
        located = []
        for i, (head, length) in enumerate(self._heads):
            group = metadata.row_group(i)
            first, last = group.column(0), group.column(group.num_columns - 1)
            end = last.data_page_offset + last.total_compressed_size
            values = end - length
            if group.num_rows != self._group_rows[i] or os.pread(descriptor, len(head), values) != head:
                raise RuntimeError(f"{name}: row group {i} is not one plain page; the Parquet writer has changed")
            located.append([group.num_rows, first.data_page_offset, values, end])
        return located

    def close(self) -> Receipt:
        """Writes what is left and returns the receipt."""
        self.end_row_group()
        self._finish_shard()
        return self.receipt

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            os.remove(self._path)


@functools.cache
def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that did not become a row: its key, the file it came from, why (one of a small set), and details."""

    key: str
    source: str
    reason: str
    detail: str = ""


def rejects_table(rejects: Iterable[Reject]) -> bytes:
    """`rejects.parquet`."""
    refused = list(rejects)
    columns = {f.name: pa.array([getattr(reject, f.name) for reject in refused], pa.string()) for f in fields(Reject)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def finish_dataset(
    uri: str,
    receipts: Iterable[Receipt],
    *,
    encoding: Encoding,
    image: dict[str, Any],
    classes: Sequence[str],
    multilabel: bool = False,
    rejects: Iterable[Reject] = (),
    duplicates: int = 0,
    inputs: int | None = None,
    config: dict[str, Any] | None = None,
    input_fingerprint: str = "",
) -> Manifest:
    """Makes a folder of shards a dataset: writes `rejects.parquet`, then `manifest.json`.

    `inputs` defaults to what the receipts and rejects add up to. Raises UserError when no row is left, RuntimeError when
    the counts do not add up.
    """
    total = Receipt()
    for receipt in receipts:
        total.shards.extend(receipt.shards)
        total.rows += receipt.rows
        for label, count in receipt.class_counts.items():
            total.class_counts[label] = total.class_counts.get(label, 0) + count
        total.pixels = [a + b for a, b in zip(total.pixels, receipt.pixels, strict=True)]
    reasons: dict[str, int] = {}
    refused = list(rejects)
    for reject in refused:
        reasons[reject.reason] = reasons.get(reject.reason, 0) + 1
    if not total.rows:
        why = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "there was no input"
        raise UserError(f"{uri}: not one usable image ({why})")
    accounted = total.rows + len(refused) + duplicates
    if inputs is not None and inputs != accounted:
        raise RuntimeError(
            f"{uri}: {inputs} inputs, but {total.rows} rows + {len(refused)} rejects + {duplicates} duplicates"
        )
    content = [[shard.name, shard.sha256] for shard in total.shards]
    mean = std = None
    n = total.pixels[0]
    if n:
        mean = [round(s / n, 6) for s in total.pixels[1:4]]
        std = [
            round(max(0.0, q / n - (s / n) ** 2) ** 0.5, 6)
            for s, q in zip(total.pixels[1:4], total.pixels[4:], strict=True)
        ]
    manifest = Manifest(
        encoding=encoding,
        image=image,
        multilabel=multilabel,
        rows=total.rows,
        inputs=accounted,
        duplicates=duplicates,
        rejects=dict(sorted(reasons.items())),
        mean=mean,
        std=std,
        fingerprint=hashlib.sha256(json.dumps([content, list(classes)]).encode()).hexdigest()[:16],
        input_fingerprint=input_fingerprint,
        config=config or {},
        class_counts=[total.class_counts.get(k, 0) for k in range(len(classes))],
        classes=list(classes),
        shards=total.shards,
    )
    storage.write_bytes(storage.join(uri, REJECTS), rejects_table(refused))
    storage.write_bytes(storage.join(uri, MANIFEST), manifest.to_json().encode())
    return manifest


def write_dataset(
    uri: str,
    rows: Iterable[tuple[str, bytes | np.ndarray, Label, int, int]],
    *,
    classes: Sequence[str],
    encoding: Encoding = "jpeg",
    image: dict[str, Any] | None = None,
    multilabel: bool = False,
    row_group_bytes: int = ROW_GROUP_BYTES,
    shard_bytes: int = SHARD_BYTES,
    **finish: Any,
) -> Manifest:
    """A small dataset in one go, from rows of (key, image, label, width, height). Keyword arguments left over go to
    `finish_dataset`."""
    image = image or {}
    writer = ShardWriter(
        uri,
        "00000",
        encoding=encoding,
        image=image,
        classes=classes,
        multilabel=multilabel,
        row_group_bytes=row_group_bytes,
        shard_bytes=shard_bytes,
    )
    with writer:
        for row in rows:
            writer.write(*row)
    return finish_dataset(
        uri, [writer.receipt], encoding=encoding, image=image, classes=classes, multilabel=multilabel, **finish
    )


# ---------------------------------------------------------------- reading


class RowGroup(NamedTuple):
    """One row group, decoded: `labels` is int32 (rows,), or a list of int lists for multi-label; `images` is a list of
    byte views (jpeg) or a uint8 array (rows, N, P*P*C) that lies in the buffer it was read from (patches)."""

    keys: list[str]
    labels: Any
    widths: np.ndarray
    heights: np.ndarray
    images: Any

    def rows(self) -> Iterator[tuple[str, Any, Label, int, int]]:
        """(key, image, label, width, height) of each row, as `ShardWriter.write` takes them."""
        labels = self.labels if isinstance(self.labels, list) else self.labels.tolist()
        yield from zip(self.keys, self.images, labels, self.widths.tolist(), self.heights.tolist(), strict=True)


def parse_row_group(buffer: bytes | memoryview, group: np.void, manifest: Manifest, images: bool = True) -> RowGroup:
    """The columns of one row group from its bytes [start, end), or [start, values) without images; no Parquet footer.

    Raises UserError for bytes that are none.
    """
    try:
        return _parse(buffer, group, manifest, images)
    except (ValueError, IndexError, OverflowError, StopIteration, struct.error) as error:
        name = manifest.shards[int(group["shard"])].name
        raise UserError(
            f"{name}: row group {group['group']} is damaged ({error}); jobs/prepare.py verify says more"
        ) from error


def _parse(buffer: bytes | memoryview, group: np.void, manifest: Manifest, images: bool) -> RowGroup:
    view = memoryview(buffer)
    rows, split = int(group["rows"]), int(group["values"] - group["start"])
    position, columns = 0, []
    for _ in range(4):  # key, label, width, height
        position, length = _page(view, position)
        columns.append(view[position : position + length])
        position += length
    keys = [str(value, "utf-8") for value in _byte_arrays(columns[0], rows)]
    widths, heights = (np.frombuffer(column, np.int32, rows) for column in columns[2:])
    labels = _lists(columns[1], rows) if manifest.multilabel else np.frombuffer(columns[1], np.int32, rows)
    if not images:
        return RowGroup(keys, labels, widths, heights, None)
    values = view[split:]
    if manifest.encoding == "jpeg":
        return RowGroup(keys, labels, widths, heights, _byte_arrays(values, rows))
    patches = np.frombuffer(values, np.uint8).reshape(rows, manifest.tokens, manifest.token_bytes)
    return RowGroup(keys, labels, widths, heights, patches)


def _page(view: memoryview, position: int) -> tuple[int, int]:
    """(start, length) of the values of the page whose header begins at `position`.

    The header is Parquet's PageHeader in Thrift's compact protocol: (1) type, (2) uncompressed size, (3) compressed
    size, (5) data page header, a struct of integers; each field is a byte (id delta << 4 | type) and a value.
    """
    size, last, depth = 0, [0], 1
    while depth:
        head = view[position]
        position += 1
        if head == 0:  # end of struct
            last.pop()
            depth -= 1
            continue
        last[-1] += head >> 4
        kind = head & 0x0F
        if kind == 12:  # struct
            last.append(0)
            depth += 1
        elif kind in (4, 5, 6):  # zigzag integers
            value, position = read_varint(view, position)
            if depth == 1 and last[0] == 3:
                size = value >> 1
        elif kind not in (1, 2):  # booleans have no value byte
            raise ValueError("not a plain data page")
    return position, size


def _byte_arrays(view: memoryview, rows: int) -> list[memoryview]:
    """Parquet's PLAIN byte arrays: a little-endian uint32 length before each value."""
    values, position, length = [], 0, struct.Struct("<I").unpack_from
    for _ in range(rows):
        start = position + 4
        position = start + length(view, position)[0]
        values.append(view[start:position])
    return values


def _levels(view: memoryview, most: int) -> tuple[np.ndarray, int]:
    """Repetition or definition levels of maximum 1 (Parquet's RLE / bit-packed hybrid) and the bytes they take.

    A run states its own length: one beyond `most` levels is damage, which would fill the memory.
    """
    end = 4 + struct.unpack_from("<I", view, 0)[0]
    position, runs = 4, []
    while position < end:
        header, position = read_varint(view, position)
        if header >> 1 > most:
            raise ValueError(f"{header >> 1} levels")
        if header & 1:  # bit-packed groups of eight
            size = header >> 1
            runs.append(np.unpackbits(np.frombuffer(view, np.uint8, size, position), bitorder="little"))
            position += size
        else:
            runs.append(np.full(header >> 1, view[position], np.uint8))
            position += 1
    return np.concatenate(runs), end


def _lists(view: memoryview, rows: int) -> list[list[int]]:
    """A required list<required int32> column: repetition 0 starts a row, definition 0 is an empty list."""
    most = rows + len(view)  # a value has four bytes, an empty list none
    repeats, used = _levels(view, most)
    defined, more = _levels(view[used:], most)
    values = iter(np.frombuffer(view[used + more :], np.int32).tolist())
    lists: list[list[int]] = []
    for repeat, present in zip(repeats.tolist(), defined.tolist(), strict=False):
        if not repeat:
            if len(lists) == rows:
                break  # bit-packed runs are padded to a multiple of eight
            lists.append([])
        if present:
            lists[-1].append(next(values))
    return lists


@functools.lru_cache(maxsize=256)
def _map(path: str, sha256: str) -> memoryview:
    """A local shard, memory-mapped; the checksum in the key keeps a dataset written anew at the same path apart."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Dataset:
    """A finished dataset, opened for reading. Cheap to pickle and to open: one request for the manifest.

    `row_groups` is a structured array (shard, group, rows, start, values, end), in dataset order; `starts` (groups + 1,)
    are the cumulative rows, so row i lies in group `np.searchsorted(starts, i, "right") - 1`.
    """

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri, self.manifest = uri, manifest
        self.classes = manifest.classes
        self.encoding = manifest.encoding
        self.multilabel = manifest.multilabel
        counts = [len(shard.row_groups) for shard in manifest.shards]
        table = np.array([group for shard in manifest.shards for group in shard.row_groups], np.int64).reshape(-1, 4)
        self.row_groups = np.empty(len(table), ROW_GROUP)
        self.row_groups["shard"] = np.repeat(np.arange(len(counts)), counts)
        self.row_groups["group"] = np.concatenate([np.arange(n) for n in counts]) if counts else []
        for column, name in enumerate(("rows", "start", "values", "end")):
            self.row_groups[name] = table[:, column]
        self.starts = np.concatenate([[0], np.cumsum(self.row_groups["rows"], dtype=np.int64)])

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        return f"Dataset({self.uri!r}, {len(self)} x {self.encoding}, {len(self.classes)} classes)"

    def shard_uri(self, shard: int) -> str:
        return storage.join(self.uri, self.manifest.shards[shard].name)

    def row_group_bytes(self, i: int) -> memoryview:
        """The bytes of row group i: a view of the memory-mapped file, or one range request to S3.

        Raises UserError when the shard is gone or shorter than the manifest says.
        """
        return self._bytes(i, int(self.row_groups[i]["start"]), int(self.row_groups[i]["end"]))

    def _bytes(self, i: int, start: int, end: int) -> memoryview:
        number = int(self.row_groups[i]["shard"])
        shard, uri = self.manifest.shards[number], self.shard_uri(number)
        try:
            if storage.is_remote(uri):
                data = memoryview(storage.read_bytes(uri, start, end))
            else:
                data = _map(uri, shard.sha256)[start:end]
        except FileNotFoundError as error:
            raise UserError(
                f"{uri}: the shard is missing; `jobs/prepare.py verify {self.uri}` lists what is"
            ) from error
        if len(data) != end - start:
            raise UserError(f"{uri}: the shard is truncated ({len(data)} of {end - start} bytes at {start})")
        return data

    def read_row_group(self, i: int) -> RowGroup:
        return parse_row_group(self.row_group_bytes(i), self.row_groups[i], self.manifest)

    def read(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Rows by position, in the order asked for: dicts of key, image, label, width, height.

        `image` is the stored file (bytes) for encoding jpeg, the uint8 array (N, P*P*C) for encoding patches. Each row group
        is read once. Raises IndexError for a position outside the dataset.
        """
        wanted = [int(i) for i in indices]
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise IndexError(f"{self.uri} has {len(self)} rows; asked for {min(wanted)}..{max(wanted)}")
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

    def heads(self) -> Iterator[RowGroup]:
        """Every row group without its images (`images` is None), in dataset order: keys, labels and original sizes for one
        small read each, several in flight on S3."""

        def head(i: int) -> RowGroup:
            group = self.row_groups[i]
            data = self._bytes(i, int(group["start"]), int(group["values"]))
            return parse_row_group(data, group, self.manifest, images=False)

        if not storage.is_remote(self.uri):
            yield from map(head, range(len(self.row_groups)))
            return
        with ThreadPoolExecutor(16) as pool:
            for first in range(0, len(self.row_groups), 256):  # bounded: a plain map would queue the whole dataset
                yield from pool.map(head, range(first, min(first + 256, len(self.row_groups))))

    def table(self, columns: Sequence[str] = ("key", "label")) -> pa.Table:
        """`key`, `label`, `width` or `height` of the whole dataset as an Arrow table, in dataset order."""
        types = {f.name: f.type for f in schema(self.encoding, self.manifest.image, (), self.multilabel)}
        place = {"key": 0, "label": 1, "width": 2, "height": 3}
        chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
        for head in self.heads():
            for name in columns:
                chunks[name].append(pa.array(head[place[name]], types[name]))
        return pa.table({name: pa.chunked_array(chunk, types[name]) for name, chunk in chunks.items()})


def open_dataset(uri: str | os.PathLike) -> Dataset:
    """Opens a finished dataset. Raises UserError when there is none at `uri`, or its format is another version."""
    uri = storage.normalise(uri)
    where = storage.join(uri, MANIFEST)
    try:
        text = storage.read_bytes(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{uri}: no dataset here ({MANIFEST} is missing: not prepared, or not finished)") from error
    manifest = Manifest.from_json(text, where)
    try:
        return Dataset(uri, manifest)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: its row groups are no table of numbers ({error})") from error
