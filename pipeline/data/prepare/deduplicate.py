"""Removes rows of the corpus that repeat another of its rows."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import storage, workqueue
from pipeline.data.duplicates.candidates import KEY, PIXELS, candidate_keys, match_rows, select_removals
from pipeline.data.prepare.plan import PreparePlan, slice_name

Removals = dict[int, tuple[int, int, int]]
"""{row: (row that it repeats, kind, bits that differ)}; a row is its slice << 32 | its place in the slice."""


def deduplicated_name(number: int) -> str:
    """Name of the receipt of a slice from which duplicates were removed."""
    return f"deduplicated-{number:05d}"


# ---------------------------------------------------------------- finding


def find_duplicates(plan: PreparePlan) -> Removals:
    """The rows to remove. A Ray Data job: slices -> lines to join on -> shuffled into buckets -> pairs that match."""
    near = plan.config.deduplicate == "near"
    count = len(plan.slices)
    if not workqueue.uses_ray():
        pairs = match_rows(_lines(range(count), plan), plan.config.distance)
        return select_removals(pairs)
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
        return {}
    return select_removals({name: np.concatenate([batch[name] for batch in found]) for name in found[0]})


def _lines(numbers: Any, plan: PreparePlan) -> dict[str, np.ndarray]:
    near, exact = plan.config.deduplicate == "near", plan.config.deduplicate != "off"
    parts = [candidate_keys(_hashes(plan, n), int(n), plan.compares_keys, exact, near) for n in numbers]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _hashes(plan: PreparePlan, number: int) -> np.ndarray:
    return np.load(io.BytesIO(storage.read_bytes(plan.hashes_uri(number))))


# ---------------------------------------------------------------- removing


def remove_duplicates(plan: PreparePlan, removals: Removals) -> None:
    """Writes the slices that lose rows again, from their own shards, with a receipt of their own."""
    wanted: dict[int, set[int]] = {}
    for first, _, _ in removals.values():
        wanted.setdefault(first >> 32, set()).add(first & 0xFFFFFFFF)
    keys = {(number << 32) | row: key for number, rows in wanted.items() for row, key in _keys(plan, number, rows)}
    units: dict[str, tuple[int, dict[int, tuple[str, int, int]]]] = {}
    for row, (first, kind, distance) in sorted(removals.items()):
        number = row >> 32
        units.setdefault(deduplicated_name(number), (number, {}))[1][row & 0xFFFFFFFF] = (keys[first], kind, distance)
    outcomes = workqueue.run(units, _keep_rows, receipts=plan.receipts, context=plan, summary=lambda receipt: None)
    for outcome in outcomes:
        if outcome.error:
            raise outcome.error


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


def _keep_rows(unit: tuple[int, dict[int, tuple[str, int, int]]], plan: PreparePlan) -> dict[str, Any]:
    """Copies the rows of a slice that stay; the receipt says which were removed."""
    number, removals = unit
    (receipt,), places = plan.receipts.read([slice_name(number)]), _places(plan, number)
    leaving = {places[row]: why for row, why in removals.items()}
    source = plan.sources[plan.slices[number].source].uri
    for name in plan.splits:
        dataset = plan.open_rows(receipt["splits"][name], name)
        place = 0
        with plan.writer(name, number, "k") as writer:
            for i in range(len(dataset.row_groups)):
                for key, *rest in dataset.read_row_group(i).rows():
                    why = leaving.get((name, place))
                    place += 1
                    if why is None:
                        writer.write(key, *rest)
                        continue
                    match, kind, distance = why
                    if kind == KEY:
                        receipt["rejects"][name].append([key, source, "duplicate key", ""])
                    else:
                        reason = "exact" if kind == PIXELS else "near"
                        record = {"key": key, "reason": reason, "set": "", "match": match, "distance": distance}
                        receipt["duplicates"][name].append(record)
        # mean and deviation stay those measured before the duplicates were removed
        receipt["splits"][name] = writer.receipt.to_dict() | {"pixels": receipt["splits"][name]["pixels"]}
    return receipt
