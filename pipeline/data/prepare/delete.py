"""Deletes rows by key, for example for takedown requests: creates the next revision of a dataset without them. Only
shards with such a row are rewritten, with the same row groups; all others are shared with the previous revision. Older
revisions keep the deleted rows until `purge` removes them.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage, workqueue
from pipeline.data.duplicates.report import DUPLICATES
from pipeline.data.format import MANIFEST, REJECTS, Manifest, Shard, ShardWriter
from pipeline.data.format.dataset import open_dataset
from pipeline.data.format.deleted import digest_of, read_deleted, write_deleted
from pipeline.data.format.manifest import Receipt, content_fingerprint
from pipeline.data.format.revisions import find_datasets, known_files, publish, revisions, successor
from pipeline.data.format.verify import key_hash
from pipeline.data.prepare.change import DELETE, begin, lock_datasets, refuse_unfinished
from pipeline.data.prepare.config import WORK
from pipeline.errors import UserError, plural
from pipeline.outputs import check_output
from pipeline.revision_names import is_report, name_of, report_name, shard_prefix, split_address
from pipeline.workqueue import Receipts

logger = logging.getLogger(__name__)
SHARDS_AT_ONCE = 16  # shards that a unit of work searches for keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """The result of a deletion for one dataset."""

    uri: str
    revision: int
    rows: int
    deleted: int
    older_revisions: list[int]
    """Older revisions that still have deleted rows."""


def delete_keys(uri: str, keys: str) -> list[Deletion]:
    """Deletes the rows with the keys in a text file, one per line, from a dataset or from all splits in a folder.
    Repeat a stopped deletion to continue it. Raises UserError before any work if no key is in the data, or no rows
    would be left."""
    wanted = _read_keys(keys)
    root, sets = locate_datasets(uri)
    check_output(root)
    with lock_datasets(root, sets):  # before the number of the revision is chosen
        return _delete(root, sets, keys, wanted)


def _delete(root: str, sets: Sequence[str], keys: str, wanted: set[str]) -> list[Deletion]:
    refuse_unfinished(_others(root, sets))
    digest = hashlib.sha256("\n".join(sorted(wanted)).encode()).hexdigest()
    work = storage.join(root, WORK)
    number, bases = begin(root, sets, _read_mark(work, digest).get("revision"))
    found = {one: find_rows(f"{one}@{base.revision}", wanted) for one, base in bases.items()}
    present = {key for rows in found.values() for places in rows.values() for key in places.values()}
    if not present:
        return _nothing_found(sets, digest, keys, wanted)
    for one, rows in found.items():
        if _count(rows) == bases[one].rows:
            raise UserError(f"{one}: all of its images would be deleted; remove the folder instead")
    missing = len(wanted) - len(present)
    if missing:
        logger.warning("%d of the %d keys are not in the data, such as %s", missing, len(wanted), min(wanted - present))
    storage.write_json(storage.join(work, "plan.json"), {DELETE: digest, "revision": number})
    for one, rows in found.items():
        if rows:
            _delete_from(one, bases[one], number, rows, digest, work)
    results = [_result(one, _count(rows)) for one, rows in found.items()]
    storage.remove(work, recursive=True)
    return results


def _others(root: str, sets: Sequence[str]) -> list[str]:
    """The folders in which a stopped command is another one: the splits of the root, or the folder of a split."""
    return [root.rpartition("/")[0]] if root in sets else list(sets)


def _count(rows: dict[int, dict[int, str]]) -> int:
    return sum(map(len, rows.values()))


def _read_keys(uri: str) -> set[str]:
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError as error:
        raise UserError(f"--keys {uri}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--keys {uri}: not a text file in UTF-8, with one key per line") from error
    keys = {line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")} - {""}
    if not keys:
        raise UserError(f"--keys {uri}: has no keys; write one per line")
    return keys


def locate_datasets(uri: str) -> tuple[str, list[str]]:
    """(folder, its datasets): the folder itself, or its splits. Raises UserError if
    there is no dataset, or the address names a revision."""
    root = storage.normalise(uri)
    if split_address(root)[1] is not None:
        raise UserError(f"{uri}: a deletion starts from the newest revision; name the folder {split_address(root)[0]}")
    sets = find_datasets(root)
    if not sets:
        raise UserError(f"{uri}: no dataset here ({MANIFEST} is missing: not prepared, or not finished)")
    return root, sets


def _read_mark(work: str, digest: str) -> dict[str, Any]:
    """The state of this deletion if it was stopped; empty for a new one."""
    where = storage.join(work, "plan.json")
    mark = storage.read_record(where) if storage.exists(where) else {}
    if mark and mark.get(DELETE) != digest:
        raise UserError(
            f"{work.removesuffix('/' + WORK)}: has an unfinished append, deletion or download; repeat the command that "
            f"was stopped first, or remove {work} to abandon it"
        )
    return mark


def _nothing_found(sets: Sequence[str], digest: str, keys: str, wanted: set[str]) -> list[Deletion]:
    for one in sets:
        if any(entry.get("keys") == digest for entry in open_dataset(one).manifest.history):
            logger.info("%s: these keys were deleted before", one)
            return [_result(each, 0) for each in sets]
    example = next(open_dataset(sets[0]).heads()).keys[0]
    raise UserError(
        f"--keys {keys}: none of its {plural(len(wanted), 'key')}, such as {min(wanted)!r}, is in {', '.join(sets)}, whose keys are "
        f"like {example!r}"
    )


# ---------------------------------------------------------------- finding


def find_rows(uri: str, wanted: set[str]) -> dict[int, dict[int, str]]:
    """{shard: {row of the shard: key}} of the rows with these keys. Reads no images."""
    count = len(open_dataset(uri).manifest.shards)
    units = {
        f"find-{first:06d}": range(first, min(first + SHARDS_AT_ONCE, count))
        for first in range(0, count, SHARDS_AT_ONCE)
    }
    found: dict[int, dict[int, str]] = {}
    for outcome in workqueue.run(units, _find_rows, context=(uri, wanted)):
        if outcome.error:
            raise outcome.error
        found |= outcome.summary
    return dict(sorted(found.items()))


def _find_rows(shards: range, context: tuple[str, set[str]]) -> dict[int, dict[int, str]]:
    uri, wanted = context
    dataset = open_dataset(uri, check=False)
    found: dict[int, dict[int, str]] = {}
    for shard in shards:
        row = 0
        for i in (dataset.row_groups["shard"] == shard).nonzero()[0].tolist():
            for key in dataset.head(i).keys:
                if key in wanted:
                    found.setdefault(shard, {})[row] = key
                row += 1
    return found


# ---------------------------------------------------------------- writing anew


def _delete_from(
    folder: str, before: Manifest, number: int, found: dict[int, dict[int, str]], digest: str, work: str
) -> None:
    """Publishes the revision of one dataset without the given rows."""
    base, name = before.revision, folder.rpartition("/")[2]
    units = {f"{DELETE}-{name}-{shard:06d}": (shard, sorted(rows)) for shard, rows in found.items()}
    receipts = Receipts(work)
    outcomes = workqueue.run(
        units, _write_shard, receipts=receipts, context=(folder, base, number), summary=lambda receipt: None
    )
    for outcome in outcomes:
        if outcome.error:
            raise outcome.error
    written = receipts.read(list(units))
    counts = Counter(dict(enumerate(before.class_counts)))
    replaced: dict[int, list[Shard]] = {}
    for (shard, _), receipt in zip(units.values(), written, strict=True):
        replaced[shard] = Receipt.from_dict(receipt["written"]).shards
        counts.subtract({int(label): count for label, count in receipt["removed"].items()})
    kept = [new for i, old in enumerate(before.shards) for new in replaced.get(i, [old])]
    deleted = _count(found)
    hashes = np.array([key_hash(key) for places in found.values() for key in places.values()], np.uint64)
    hashes = np.concatenate([read_deleted(folder, before), hashes])
    manifest = successor(
        before,
        number,
        {"kind": DELETE, "rows": deleted, "keys": digest},
        rows=before.rows - deleted,
        deleted=before.deleted + deleted,
        deleted_sha256=digest_of(hashes),
        shards=kept,
        class_counts=[counts[label] for label in range(len(before.classes))],
        fingerprint=content_fingerprint(kept, before.classes),
    )
    for report in (REJECTS, DUPLICATES):
        old = storage.join(folder, report_name(report, base))
        if storage.exists(old):
            storage.write_bytes(storage.join(folder, report_name(report, number)), storage.read_bytes(old))
    write_deleted(folder, number, hashes)
    publish(folder, manifest)


def _write_shard(unit: tuple[int, list[int]], context: tuple[str, int, int]) -> dict[str, Any]:
    """Writes a shard without some of its rows. Returns a receipt with the new shard (none if no rows are left) and the
    number of removed rows per label."""
    (shard, rows), (folder, base, number) = unit, context
    dataset, left, removed, row = open_dataset(f"{folder}@{base}"), set(rows), Counter[int](), 0
    prefix = f"{shard_prefix(number)}{shard:05d}d"
    with ShardWriter(folder, prefix, dataset.schema, row_group_bytes=1 << 62, shard_bytes=1 << 62) as writer:
        for i in (dataset.row_groups["shard"] == shard).nonzero()[0].tolist():
            for key, image, label, width, height in dataset.read_row_group(i).rows():
                if row in left:
                    removed.update(k for k in (label if isinstance(label, Sequence) else [label]) if k >= 0)
                else:
                    writer.write(key, image, label, width, height)
                row += 1
            writer.end_row_group()
    return {"written": writer.receipt.to_dict(), "removed": {str(label): count for label, count in removed.items()}}


# ---------------------------------------------------------------- older revisions


def older_revisions(folder: str) -> list[int]:
    """Older revisions with deleted rows, which have a shard that is not in the newest revision."""
    everything = revisions(folder)
    newest = everything[max(everything)]
    now = {shard.name for shard in newest.shards}
    return [n for n, manifest in everything.items() if not {shard.name for shard in manifest.shards} <= now]


def _result(folder: str, deleted: int) -> Deletion:
    manifest = open_dataset(folder).manifest
    return Deletion(
        uri=folder,
        revision=manifest.revision,
        rows=manifest.rows,
        deleted=deleted,
        older_revisions=older_revisions(folder),
    )


def purge(uri: str) -> dict[str, list[int]]:
    """Removes the older revisions that have deleted rows, and all files that no other revision uses. Returns {dataset:
    removed revisions}. May be repeated after a stop."""
    root, sets = locate_datasets(uri)
    with lock_datasets(root, sets):
        refuse_unfinished([root, *_others(root, sets)])
        return {folder: _purge(folder) for folder in sets}


def _purge(folder: str) -> list[int]:
    stale = older_revisions(folder)
    for number in stale:  # first, so that no partial revision looks complete
        storage.remove(storage.join(folder, name_of(MANIFEST, number)))
    known = known_files(revisions(folder).values())
    for file in storage.list_files(folder, recursive=False):
        if file.path not in known and (file.path.startswith(("part-", ".part-")) or is_report(file.path)):
            storage.remove(file.uri)
    return stale


def summary(results: Sequence[Deletion], purged: dict[str, list[int]] | None) -> list[str]:
    """The lines of the job's output."""
    lines = []
    for one in results:
        held = (
            f"; @{', @'.join(map(str, one.older_revisions))} still with deleted rows (--purge removes them)"
            if one.older_revisions
            else ""
        )
        lines.append(f"{one.uri}@{one.revision}: deleted={one.deleted} rows={one.rows}{held}")
    for folder, numbers in (purged or {}).items():
        lines.append(f"{folder}: purged {', '.join(f'@{number}' for number in numbers) or 'nothing'}")
    return lines


def to_json(results: Sequence[Deletion], purged: dict[str, list[int]] | None) -> str:
    fields = ("uri", "revision", "rows", "deleted", "older_revisions")
    return json.dumps({"datasets": [{f: getattr(one, f) for f in fields} for one in results], "purged": purged or {}})
