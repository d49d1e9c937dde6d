"""Removes rows of the corpus that repeat another of its rows."""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data.duplicates.candidates import (
    KEY,
    LOOK,
    MIRRORED,
    Pairs,
    Removal,
    candidate_keys,
    match_rows,
    select_removals,
    unique_pairs,
)
from pipeline.data.duplicates.hashes import ROW
from pipeline.data.duplicates.report import attach_pictures
from pipeline.data.duplicates.verification import compare_views, small_copy
from pipeline.data.format.describe import thumbnail
from pipeline.data.prepare.plan import PreparePlan, slice_name

Removals = dict[int, Removal]
"""By row: its slice << 32 | its place in the slice."""
ROW_BITS = 0xFFFFFFFF
NEAR = ("near", "report")  # values of --deduplicate that search for near duplicates


def deduplicated_name(number: int) -> str:
    """Name of the receipt of a slice from which duplicates were removed."""
    return f"deduplicated-{number:05d}"


# ---------------------------------------------------------------- finding


def find_duplicates(plan: PreparePlan) -> Removals:
    """The rows to remove: pairs that hash alike, those of them that the second look confirms, one row of each."""
    return select_removals(verify_pairs(plan, propose_pairs(plan)))


def propose_pairs(plan: PreparePlan) -> Pairs:
    """Pairs of rows that may be duplicates. A Ray Data job: slices -> lines to join on -> shuffled into buckets -> pairs."""
    near = plan.config.deduplicate in NEAR
    count = len(plan.slices)
    if not workqueue.uses_ray():
        return unique_pairs(match_rows(_lines(range(count), plan), plan.config.distance))
    import ray

    context = workqueue.data_context()
    # Buckets of at most a million lines: 57 lines a row when near, else 2, and slices of at most some ten thousand rows.
    buckets = max(4, count if near else min(count, max(64, count // 8)))
    # What a task of the shuffle holds, up to Ray's gibibyte: as little as leaves some ten thousand objects to keep account of,
    # one for every task and bucket.
    about = count * 16_384 * (57 if near else 2) * 41
    context.shuffle_input_batch_bytes = min(1 << 30, max(4 << 20, about * buckets // 50_000))
    slices = ray.data.from_items([{"slice": number} for number in range(count)], override_num_blocks=count)

    def lines(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        joined = _lines(batch["slice"].tolist(), plan)
        return joined | {"bucket": (joined["join"] >> np.uint64(40)) % np.uint64(buckets)}

    def pairs_of(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return match_rows(group, plan.config.distance)

    work: Any = lines  # Ray's stubs know no typed dict of arrays
    match: Any = pairs_of
    shuffled = slices.map_batches(work, batch_size=None).groupby("bucket", num_partitions=buckets)
    found = list(shuffled.map_groups(match, batch_format="numpy").iter_batches(batch_size=None, batch_format="numpy"))
    found = [batch for batch in found if "first" in batch]
    if not found:
        return match_rows(_lines((), plan), 0)
    return unique_pairs({name: np.concatenate([batch[name] for batch in found]) for name in found[0]})


def _lines(numbers: Any, plan: PreparePlan) -> dict[str, np.ndarray]:
    near, exact = plan.config.deduplicate in NEAR, plan.config.deduplicate != "off"
    parts = [candidate_keys(_hashes(plan, n), int(n), plan.compares_keys, exact, near) for n in numbers]
    parts = parts or [candidate_keys(np.empty(0, ROW), 0, True, True, True)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _hashes(plan: PreparePlan, number: int) -> np.ndarray:
    return np.load(io.BytesIO(storage.read_bytes(plan.hashes_uri(number))))


# ---------------------------------------------------------------- the second look


def verify_pairs(plan: PreparePlan, pairs: Pairs) -> Pairs:
    """The pairs without those that only look alike; `detail` is added, 1.0 where keys or pixels are the same.

    Two passes over the slices: small copies of the rows in question, written where every task can read them; then the
    comparison of each pair, with the slice of its second row.
    """
    detail = np.ones(len(pairs["first"]), np.float32)
    doubtful = np.flatnonzero(pairs["kind"] >= LOOK)
    if not len(doubtful):
        return pairs | {"detail": detail}
    rows = np.unique(np.concatenate([pairs["first"][doubtful], pairs["second"][doubtful]]))
    copies: dict[int, list[int]] = {}
    for row in rows.tolist():
        copies.setdefault(row >> 32, []).append(row & ROW_BITS)
    _finish_units(plan, {f"copied-{number:05d}": (number, places) for number, places in copies.items()}, _copy_rows)
    shares: dict[int, list[int]] = {}
    for i in doubtful.tolist():
        shares.setdefault(int(pairs["second"][i]) >> 32, []).append(i)
    units = {
        f"verified-{number:05d}": [
            (int(pairs["first"][i]), int(pairs["second"][i]), bool(pairs["kind"][i] == MIRRORED)) for i in share
        ]
        for number, share in shares.items()
    }
    _finish_units(plan, units, _compare_rows)
    for share, agreed in zip(shares.values(), plan.receipts.read(list(units)), strict=True):
        detail[share] = agreed
    return {name: column[detail > 0] for name, column in (pairs | {"detail": detail}).items()}


def _finish_units(plan: PreparePlan, units: dict[str, Any], work: Any) -> None:
    for outcome in workqueue.run(units, work, receipts=plan.receipts, context=plan, summary=lambda receipt: None):
        if outcome.error:
            raise outcome.error


def _copies_uri(plan: PreparePlan, number: int) -> str:
    return storage.join(plan.work, f"copies-{number:05d}.arrow")


def _copy_rows(unit: tuple[int, list[int]], plan: PreparePlan) -> dict[str, Any]:
    """Writes small copies of some rows of a slice."""
    number, rows = unit
    (receipt,), places = plan.receipts.read([slice_name(number)]), _places(plan, number)
    wanted = {places[row]: row for row in rows}
    found: dict[int, bytes] = {}
    for name in plan.splits:
        dataset = plan.open_rows(receipt["splits"][name], name)
        for i in range(len(dataset.row_groups)):
            first, last = int(dataset.starts[i]), int(dataset.starts[i + 1])
            here = [place for place in range(first, last) if (name, place) in wanted]
            if here:
                pictures = dataset.read_row_group(i).images
                found |= {wanted[name, p]: small_copy(thumbnail(dataset, pictures[p - first])) for p in here}
    table = pa.table(
        {"row": pa.array(list(found), pa.int64()), "picture": pa.array(list(found.values()), pa.large_binary())}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    storage.write_bytes(_copies_uri(plan, number), sink.getvalue().to_pybytes())
    return {"rows": len(found)}


def _read_copies(plan: PreparePlan, rows: Iterable[int]) -> dict[int, bytes]:
    """Small copies of rows of any slices."""
    wanted: dict[int, set[int]] = {}
    for row in rows:
        wanted.setdefault(row >> 32, set()).add(row & ROW_BITS)
    copies = {}
    for number, places in wanted.items():
        table = pa.ipc.open_stream(storage.read_bytes(_copies_uri(plan, number))).read_all()
        for i, place in enumerate(table["row"].to_pylist()):
            if place in places:
                copies[number << 32 | place] = table["picture"][i].as_py()
    return copies


def _compare_rows(unit: list[tuple[int, int, bool]], plan: PreparePlan) -> list[float]:
    """The correlation of detail of each pair that shows one photograph, 0.0 of each that does not."""
    cv2.setNumThreads(1)
    copies = _read_copies(plan, {row for first, second, _ in unit for row in (first, second)})
    agreed = []
    for first, second, mirrored in unit:
        agreement = compare_views(copies[second], copies[first], mirrored=mirrored)
        agreed.append(round(agreement.detail, 3) if agreement.same else 0.0)
    return agreed


# ---------------------------------------------------------------- removing


def remove_duplicates(plan: PreparePlan, removals: Removals) -> None:
    """Writes the slices that lose rows again, from their own shards, with a receipt of their own."""
    wanted: dict[int, set[int]] = {}
    for removal in removals.values():
        wanted.setdefault(removal.first >> 32, set()).add(removal.first & ROW_BITS)
    keys = {(number << 32) | row: key for number, rows in wanted.items() for row, key in _keys(plan, number, rows)}
    units: dict[str, tuple[int, dict[int, tuple[str, Removal]]]] = {}
    for row, removal in sorted(removals.items()):
        number = row >> 32
        units.setdefault(deduplicated_name(number), (number, {}))[1][row & ROW_BITS] = (keys[removal.first], removal)
    _finish_units(plan, units, _keep_rows)


def _places(plan: PreparePlan, number: int) -> list[tuple[str, int]]:
    """(split, row in its shards) of every row of a slice, in the order in which they were read."""
    table, names = _hashes(plan, number), list(plan.splits)
    counts = [0] * len(names)
    places = []
    for split in table["split"].tolist():
        places.append((names[split], counts[split]))
        counts[split] += 1
    return places


def _keys(plan: PreparePlan, number: int, rows: set[int]) -> Iterator[tuple[int, str]]:
    (receipt,), places = plan.receipts.read([slice_name(number)]), _places(plan, number)
    keys = {
        name: [key for head in plan.open_rows(receipt["splits"][name], name).heads() for key in head.keys]
        for name in plan.splits
    }
    for row in rows:
        split, place = places[row]
        yield row, keys[split][place]


def _keep_rows(unit: tuple[int, dict[int, tuple[str, Removal]]], plan: PreparePlan) -> dict[str, Any]:
    """Copies the rows of a slice that stay; the receipt says which were removed, or with `report` would have been."""
    number, removals = unit
    (receipt,), places = plan.receipts.read([slice_name(number)]), _places(plan, number)
    reporting = plan.config.deduplicate == "report"
    at = {places[row]: row for row in removals}
    source = plan.sources[plan.slices[number].source].uri
    receipt["reported"] = {}
    for name in plan.splits:
        records, rows = [], []
        dataset = plan.open_rows(receipt["splits"][name], name)
        place = 0
        with plan.writer(name, number, "k") as writer:
            for i in range(len(dataset.row_groups)):
                for key, *rest in dataset.read_row_group(i).rows():
                    row = at.get((name, place))
                    place += 1
                    match, removal = removals[row] if row is not None else ("", None)
                    if removal is not None and removal.kind == KEY:
                        receipt["rejects"][name].append([key, source, "duplicate key", ""])
                        continue
                    if row is not None and removal is not None:
                        records.append(removal.record(key, match))
                        rows.append(row)
                    if removal is None or reporting:
                        writer.write(key, *rest)
        _attach_copies(plan, number, removals, records, rows)
        receipt["reported" if reporting else "duplicates"].setdefault(name, []).extend(records)
        # mean and deviation stay those measured before the duplicates were removed
        receipt["splits"][name] = writer.receipt.to_dict() | {"pixels": receipt["splits"][name]["pixels"]}
    return receipt


def _attach_copies(
    plan: PreparePlan,
    number: int,
    removals: dict[int, tuple[str, Removal]],
    records: list[dict[str, Any]],
    rows: list[int],
) -> None:
    """Gives the least certain near matches their pictures; `rows` are the places of `records` in the slice."""
    near = {
        i: (number << 32 | row, removals[row][1].first) for i, row in enumerate(rows) if records[i]["reason"] == "near"
    }
    copies = _read_copies(plan, {row for pair in near.values() for row in pair})
    pictures = [(b"", b"")] * len(rows)
    for i, (mine, other) in near.items():
        pictures[i] = (copies[mine], copies[other])
    attach_pictures(records, pictures)
