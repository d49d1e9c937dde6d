"""Checks a finished dataset against its manifest."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.format.checksum import checksum
from pipeline.data.format.constants import REJECTS
from pipeline.data.format.dataset import Dataset, open_dataset, wrong_ranges
from pipeline.data.format.deleted import read_deleted, verify_deleted
from pipeline.data.format.manifest import Shard, content_fingerprint
from pipeline.data.format.pages import locate_page
from pipeline.data.format.revisions import find_datasets, known_files, revisions
from pipeline.errors import plural
from pipeline.revision_names import MANIFEST, is_of_later_revision, report_name, split_address

CHUNK = 16 << 20


def verify_folder(uri: str) -> dict[str, list[str]]:
    """{dataset: its problems} of a dataset, or of all datasets in a folder: splits, or the splits of several tasks.

    A folder beside them with shards but without a manifest is a problem, too. Raises UserError when there is no
    dataset."""
    root = storage.normalise(uri)
    if split_address(root)[1] is not None:
        return {root: verify_dataset(root)}
    datasets = find_datasets(root, depth=2)
    if not datasets:
        return {root: verify_dataset(root)}  # raises
    found = {dataset: verify_dataset(dataset) for dataset in datasets}
    for parent in dict.fromkeys(dataset.rpartition("/")[0] for dataset in datasets if dataset != root):
        for name in storage.list_folders(parent):
            folder = storage.join(parent, name)
            if folder not in found and any(
                _is_shard(file.path) for file in storage.list_files(folder, recursive=False)
            ):
                found[folder] = [f"{MANIFEST}: missing, but there are shards: not finished, or damaged"]
    return found


def _is_shard(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def verify_dataset(uri: str, threads: int = 4) -> list[str]:
    """Problems of a dataset, one line each; empty if it is valid.

    Reads all data once. Checks the size and SHA-256 of every shard, the schema and row groups against the footers,
    unique keys, labels, all totals in the manifest, and files that the manifest does not list. Raises UserError when
    there is no dataset at `uri`."""
    dataset = open_dataset(uri, check=False)
    manifest = dataset.manifest
    problems = list(wrong_ranges(dataset))
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda i: _verify_shard(dataset, i), range(len(manifest.shards))):
            problems.extend(found)
    everything = revisions(dataset.uri)
    known, newest = known_files(everything.values()), max(everything)
    for file in storage.list_files(dataset.uri, recursive=False):
        if file.path.endswith(".parquet") and file.path not in known and not is_of_later_revision(file.path, newest):
            problems.append(f"{file.path}: not in the manifest")
    if [entry.get("revision") for entry in manifest.history][-1:] != (
        [manifest.revision] if manifest.revision > 1 else []
    ):
        problems.append(f"{MANIFEST}: revision is {manifest.revision}, which does not match the last entry of history")
    inputs = manifest.rows + sum(manifest.rejects.values()) + manifest.duplicates + manifest.deleted
    if manifest.inputs != inputs:
        problems.append(f"{MANIFEST}: inputs is {manifest.inputs}, its parts add up to {inputs}")
    if sum(manifest.duplicates_by_reason.values()) != manifest.duplicates:
        problems.append(f"{MANIFEST}: duplicates is {manifest.duplicates}, not the sum of duplicates_by_reason")
    if manifest.fingerprint != content_fingerprint(manifest.shards, manifest.classes):
        problems.append(f"{MANIFEST}: the fingerprint does not match the shards and classes")
    problems.extend(_verify_rejects(dataset))
    problems.extend(verify_deleted(dataset.uri, manifest))
    if not problems:  # keys and labels are only read from valid shards
        problems.extend(_verify_rows(dataset))
    return problems


def _verify_shard(dataset: Dataset, i: int) -> Iterator[str]:
    shard, uri = dataset.manifest.shards[i], dataset.shard_uri(i)
    digest, size = hashlib.sha256(), 0
    try:
        with storage.open_file(uri) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
            if size != shard.bytes:
                yield f"{shard.name}: {size:,} bytes, the manifest says {shard.bytes:,}"
            elif digest.hexdigest() != shard.sha256:
                yield f"{shard.name}: the checksum differs from the manifest's: the content has changed"
            file.seek(0)
            parquet = pq.ParquetFile(file, pre_buffer=False)
            if not parquet.schema_arrow.equals(dataset.schema.arrow()):
                yield f"{shard.name}: the schema is not that of {dataset.encoding} shards"
            groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            if groups != [group[0] for group in shard.row_groups]:
                yield f"{shard.name}: {plural(len(groups), 'row group')} of {plural(sum(groups), 'row')}, the manifest says {plural(shard.rows, 'row')}"
            else:
                yield from _verify_ranges(shard, file, parquet.metadata)
    except FileNotFoundError:
        yield f"{shard.name}: missing"
    except (pa.ArrowException, OSError) as error:
        yield f"{shard.name}: not a readable Parquet file ({error})"


def _verify_ranges(shard: Shard, file: IO[bytes], metadata: pq.FileMetaData) -> Iterator[str]:
    """Compares the byte ranges and checksums in the manifest with the footer and the bytes of the shard."""
    for number, (_, start, values, end, expected) in enumerate(shard.row_groups):
        group = metadata.row_group(number)
        first, last = group.column(0), group.column(group.num_columns - 1)
        if (start, end) != (first.data_page_offset, last.data_page_offset + last.total_compressed_size):
            yield f"{shard.name}: row group {number} is not at {start}, {end} as in the manifest"
            continue
        file.seek(start)
        data = file.read(end - start)
        if checksum(data) != expected:
            yield f"{shard.name}: the checksum of row group {number} differs from the manifest's"
            continue
        with contextlib.suppress(ValueError, IndexError):  # a damaged page, already reported by its checksum
            begin, _ = locate_page(memoryview(data), last.data_page_offset - start)
            if values != start + begin:
                yield f"{shard.name}: the images of row group {number} do not start at {values} as in the manifest"


def _verify_rejects(dataset: Dataset) -> Iterator[str]:
    name = report_name(REJECTS, dataset.manifest.revision)
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(dataset.uri, name))))
        reasons = table["reason"].value_counts().to_pylist()
        counts = {entry["values"]: entry["counts"] for entry in reasons}
        if counts != dataset.manifest.rejects:
            yield f"{name}: {counts}, the manifest says {dataset.manifest.rejects}"
    except FileNotFoundError:
        yield f"{name}: missing"
    except (pa.ArrowException, KeyError) as error:
        yield f"{name}: not readable ({error})"


def read_report(uri: str, name: str, revision: int) -> list[dict[str, Any]]:
    """The rows of a report (rejects.parquet, duplicates.parquet) of a revision; empty if there is no such report."""
    try:
        data = storage.read_bytes(storage.join(uri, report_name(name, revision)))
    except FileNotFoundError:
        return []
    return pq.read_table(io.BytesIO(data)).to_pylist()


def _verify_rows(dataset: Dataset) -> Iterator[str]:
    keys = np.empty(len(dataset), np.uint64)  # 64-bit hashes: 300 million keys in 2.4 GB
    counts = np.zeros(len(dataset.classes) + 1, np.int64)  # the last one counts unlabelled rows
    row = 0
    for head in dataset.heads():
        for key in head.keys:
            keys[row] = key_hash(key)
            row += 1
        labels = np.concatenate([np.array(k, np.int64) for k in head.labels]) if dataset.multilabel else head.labels
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(dataset.classes):
            yield f"row {row}: a label outside the {plural(len(dataset.classes), 'class')}"
            return
        counts += np.bincount(np.where(labels < 0, len(dataset.classes), labels), minlength=len(counts))
    keys.sort()
    repeated = int((keys[1:] == keys[:-1]).sum())
    if repeated:
        yield f"not unique: {plural(repeated, 'key')}"
    if back := int(np.isin(keys, read_deleted(dataset.uri, dataset.manifest)).sum()):
        yield f"{plural(back, 'row')} with deleted keys"
    if counts[:-1].tolist() != dataset.manifest.class_counts:
        yield f"{MANIFEST}: class counts differ from the rows"


def key_hash(key: str) -> int:
    """A 64-bit hash of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
