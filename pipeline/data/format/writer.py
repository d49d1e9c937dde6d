"""Writes rows to shards and finishes datasets."""

import contextlib
import functools
import hashlib
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.format.checksum import checksum
from pipeline.data.format.constants import REJECTS, ROW_GROUP_BYTES, SHARD_BYTES, UNLABELLED, Encoding
from pipeline.data.format.manifest import Label, Manifest, Receipt, Reject, Schema, Shard, content_fingerprint
from pipeline.errors import UserError, plural
from pipeline.revision_names import MANIFEST

MAX_ROWS_PER_GROUP = 2048  # bounds memory for tiny images: a row takes a few KB in addition to its bytes


class ShardWriter:
    """Writes `part-<prefix>-NNNN.parquet` files under `uri`. The output is deterministic.

        schema = Schema(encoding="jpeg", image={"size": 256, "quality": 90}, classes=names)
        with ShardWriter(uri, "00007", schema) as writer:
            writer.write(key, jpeg_bytes, label, width, height)
        receipt = writer.receipt

    Image bytes are stored unchanged: encoding `jpeg` takes any format that the loader reads (JPEG, PNG, ...); encoding
    `patches` takes the uint8 matrix N x (P*P*C), as array or bytes. Shards are written atomically. After an exception
    in the block nothing more is written."""

    def __init__(
        self,
        uri: str,
        prefix: str,
        schema: Schema,
        *,
        row_group_bytes: int = ROW_GROUP_BYTES,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.uri, self.prefix = storage.normalise(uri), prefix
        self.schema, self._arrow_schema = schema, schema.arrow()
        self.row_group_bytes, self.shard_bytes = row_group_bytes, shard_bytes
        self.receipt = Receipt()
        # A row group does not exceed its byte budget, but has at least one image.
        fitting = row_group_bytes // schema.image_bytes if schema.image_bytes else MAX_ROWS_PER_GROUP
        self.max_rows = max(1, min(MAX_ROWS_PER_GROUP, fitting))
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
        """Adds a row. width, height: size of the original. pixels: uint8 HWC, added to the channel mean and standard
        deviation of the manifest."""
        data = image.tobytes() if isinstance(image, np.ndarray) else bytes(image)
        if self._rows and self._row_bytes + len(data) > self.row_group_bytes:
            self.end_row_group()
        self._rows.append((key, label, width, height, data))
        self._row_bytes += len(data)
        counts = self.receipt.class_counts
        for k in label if isinstance(label, Sequence) else (label,):
            if not UNLABELLED <= k < len(self.schema.classes):
                raise ValueError(f"{key}: label {k} outside the {plural(len(self.schema.classes), 'class')}")
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
        """Writes the buffered rows as a row group."""
        if not self._rows:
            return
        if self._writer is None:
            self._writer = self._open_shard()
        keys, labels, widths, heights, images = zip(*self._rows, strict=True)
        columns = [list(keys), [list(k) for k in labels] if self.schema.multilabel else list(labels), list(widths)]
        columns += [list(heights), list(images)]
        arrays = [pa.array(column, type=f.type) for column, f in zip(columns, self._arrow_schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._arrow_schema), row_group_size=len(keys))
        fixed = bool(self.schema.image_bytes)
        head = images[0] if fixed else struct.pack("<I", len(images[0])) + images[0]
        self._heads.append((head, self._row_bytes + (0 if fixed else 4 * len(images))))
        self._group_rows.append(len(keys))
        self._rows, self._row_bytes = [], 0
        if os.path.getsize(self._path) >= self.shard_bytes:
            self._finish_shard()

    def _open_shard(self) -> pq.ParquetWriter:
        handle, self._path = tempfile.mkstemp(prefix=".part-", suffix=".tmp", dir=self._local_folder())
        os.close(handle)
        return pq.ParquetWriter(
            self._path,
            self._arrow_schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            store_schema=True,
            # one page per column chunk: the page size limit is that of the row group
            data_page_size=1 << 30,
            max_rows_per_page=MAX_ROWS_PER_GROUP,
            write_batch_size=MAX_ROWS_PER_GROUP,
        )

    def _local_folder(self) -> str | None:
        """Folder for temporary files: next to the target (for an atomic rename), or /tmp for S3."""
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
            os.chmod(self._path, 0o666 & ~_umask())  # mkstemp creates files with mode 0600
            os.replace(self._path, target)
        rows = sum(self._group_rows)
        self.receipt.shards.append(Shard(name=name, rows=rows, bytes=size, sha256=digest, row_groups=row_groups))
        self.receipt.rows += rows
        self._group_rows, self._heads = [], []

    def _locate(self, descriptor: int, name: str) -> list[list[int]]:
        """(rows, start, values, end, checksum) of every row group, verified against the file, because readers rely on
        them."""
        metadata = pq.read_metadata(self._path)
        located = []
        for i, (head, length) in enumerate(self._heads):
            group = metadata.row_group(i)
            first, last = group.column(0), group.column(group.num_columns - 1)
            start = first.data_page_offset
            end = last.data_page_offset + last.total_compressed_size
            values = end - length
            if group.num_rows != self._group_rows[i] or os.pread(descriptor, len(head), values) != head:
                raise RuntimeError(f"{name}: row group {i} is not one plain page; the Parquet writer has changed")
            data = os.pread(descriptor, end - start, start)
            located.append([group.num_rows, start, values, end, checksum(data)])
        return located

    def close(self) -> Receipt:
        """Writes the remaining rows. Returns the receipt."""
        try:
            self.end_row_group()
            self._finish_shard()
        except BaseException:
            self.abort()
            raise
        return self.receipt

    def abort(self) -> None:
        """Removes the unfinished shard."""
        with contextlib.suppress(OSError):  # a full disk, on which the footer cannot be written either
            if self._writer is not None:
                self._writer.close()
        self._writer = None
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._path)


@functools.cache
def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def rejects_table(rejects: Iterable[Reject]) -> bytes:
    """`rejects.parquet`."""
    refused = list(rejects)
    columns = {f.name: pa.array([getattr(reject, f.name) for reject in refused], pa.string()) for f in fields(Reject)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def finish_dataset(uri: str, manifest: Manifest, rejects: Iterable[Reject] = ()) -> Manifest:
    """Finishes a dataset: writes `rejects.parquet`, then `manifest.json`. Raises UserError when there are no rows."""
    if not manifest.rows:
        counts = manifest.rejects | {
            f"duplicate ({why})": count for why, count in manifest.duplicates_by_reason.items()
        }
        why = "; ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "no inputs"
        raise UserError(f"{uri}: no usable images ({why})")
    storage.write_bytes(storage.join(uri, REJECTS), rejects_table(rejects))
    storage.write_bytes(storage.join(uri, MANIFEST), manifest.to_json().encode())
    return manifest


def build_manifest(
    uri: str,
    receipts: Iterable[Receipt],
    schema: Schema,
    *,
    rejects: Sequence[Reject] = (),
    duplicates: Mapping[str, int] | None = None,
    reported: Mapping[str, int] | None = None,
    inputs: int | None = None,
    config: dict[str, Any] | None = None,
    input_fingerprint: str = "",
) -> Manifest:
    """The manifest of the written rows, perhaps none.

    duplicates, reported: by reason, rows that were removed and rows that were only listed. inputs: default is the sum
    of the receipts and rejects. Raises RuntimeError when the counts are inconsistent.
    """
    total, refused = Receipt.total(receipts), list(rejects)
    reasons = dict(sorted(Counter(reject.reason for reject in refused).items()))
    repeated = sum((duplicates or {}).values())
    accounted = total.rows + len(refused) + repeated
    if inputs is not None and inputs != accounted:
        raise RuntimeError(
            f"{uri}: {plural(inputs, 'input')}, but {plural(total.rows, 'row')} + {plural(len(refused), 'reject')} + {plural(repeated, 'duplicate')}"
        )
    mean, std = total.moments()
    return Manifest(
        encoding=schema.encoding,
        image=schema.image,
        multilabel=schema.multilabel,
        rows=total.rows,
        inputs=accounted,
        duplicates=repeated,
        duplicates_by_reason=dict(sorted((duplicates or {}).items())),
        reported_by_reason=dict(sorted((reported or {}).items())),
        rejects=reasons,
        mean=mean,
        std=std,
        fingerprint=content_fingerprint(total.shards, schema.classes),
        input_fingerprint=input_fingerprint,
        config=config or {},
        class_counts=[total.class_counts.get(k, 0) for k in range(len(schema.classes))],
        classes=list(schema.classes),
        shards=total.shards,
    )


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
    **about: Any,
) -> Manifest:
    """Writes a small dataset from rows of (key, image, label, width, height). Other keyword arguments are passed to
    `build_manifest`."""
    schema = Schema(encoding=encoding, image=image or {}, classes=classes, multilabel=multilabel)
    with ShardWriter(uri, "00000", schema, row_group_bytes=row_group_bytes, shard_bytes=shard_bytes) as writer:
        for row in rows:
            writer.write(*row)
    return finish_dataset(uri, build_manifest(uri, [writer.receipt], schema, **about), about.get("rejects", ()))
