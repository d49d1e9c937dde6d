"""A global shuffle of what the units wrote, for archives that are sorted by class (ImageNet's tar of tars is).

Two passes over the shards, in tasks that each hold at most a unit's rows. `scatter` deals the rows of a unit into buckets, one
row group for each; `gather` reads its bucket's row groups, units in random order, shuffles as many at a time as memory may
hold, and writes the final shards. Rows move through storage as byte ranges, and where one goes depends on the seed, its unit
and its number alone. Both passes leave receipts, so a second run skips what is done.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import storage
from pipeline.data.format.shards import Receipt
from pipeline.data.loading.order import bits

if TYPE_CHECKING:
    from pipeline.data.prepare import Plan

DEAL, UNITS, PLACE = 100, 101, 102  # random numbers of their own (pipeline.data.loading.order has the others)
WORK = "_work"  # the folder of receipts, inside the output
MOST_BUCKETS = 128
HELD_BYTES = 512 << 20  # of image bytes that `gather` shuffles at a time


def sorted_by_class(receipts: Sequence[dict[str, Any]]) -> bool:
    """Whether neighbouring rows share their class far more often than shuffled rows would: half-way to always."""
    counts: dict[str, int] = {}
    for receipt in receipts:
        for written in receipt["splits"].values():
            for label, count in written["class_counts"].items():
                counts[label] = counts.get(label, 0) + count
    rows = sum(counts.values())
    by_chance = sum((count / rows) ** 2 for count in counts.values()) if rows else 1.0
    alike = sum(receipt["alike"] for receipt in receipts) / max(rows, 1)
    return len(counts) > 1 and alike > (1 + by_chance) / 2


def scatter(job: tuple[int, "Plan", dict[str, Any]]) -> dict[str, Any]:
    """Deals a unit's rows into buckets: {split: {bucket: the shard, with the row groups that hold them}}."""
    unit, plan, receipt = job
    where = storage.join(plan.work, f"dealt-{unit:05d}.json")
    if storage.exists(where):
        return storage.read_json(where)
    dealt: dict[str, Any] = {}
    for split in plan.splits:
        dataset = plan.written(receipt["splits"][split], split)
        rows = [row for i in range(len(dataset.row_groups)) for row in dataset.read_row_group(i).rows()]
        bucket = (bits(plan.config.seed, DEAL, unit, np.arange(len(rows))) % np.uint64(plan.buckets)).tolist()
        order = sorted(range(len(rows)), key=bucket.__getitem__)
        with plan.writer(
            storage.join(WORK, "dealt", split), unit, row_group_bytes=1 << 62, shard_bytes=1 << 62
        ) as writer:
            for place, i in enumerate(order):
                if place and bucket[i] != bucket[order[place - 1]]:
                    writer.end_row_group()
                writer.write(*rows[i])
        parts: dict[str, Any] = {}
        for shard in writer.receipt.to_dict()["shards"]:  # one, or none of an empty unit
            first = 0
            for group in shard["row_groups"]:
                part = parts.setdefault(str(bucket[order[first]]), shard | {"row_groups": []})
                part["row_groups"].append(group)
                first += group[0]
        dealt[split] = parts
    storage.write_json(where, dealt)
    return dealt


def gather(job: tuple[int, "Plan", dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Writes the shards of one bucket from what `scatter` dealt it, {split: shards by unit}: {split: receipt}."""
    bucket, plan, dealt = job
    where = storage.join(plan.work, f"mixed-{bucket:05d}.json")
    if storage.exists(where):
        return storage.read_json(where)
    mixed = {}
    for split, shards in dealt.items():
        shards = [shards[i] for i in np.argsort(bits(plan.config.seed, UNITS, bucket, np.arange(len(shards))))]
        dataset = plan.written(Receipt().to_dict() | {"shards": shards}, storage.join(WORK, "dealt", split))
        with plan.writer(split, bucket, "s") as writer, ThreadPoolExecutor(16) as pool:
            for number, groups in enumerate(_loads(dataset.row_groups)):
                # many small ranges: on S3 each of them is a wait
                rows = [row for group in pool.map(dataset.read_row_group, groups) for row in group.rows()]
                draws = bits(plan.config.seed, PLACE, bucket, number, np.arange(len(rows)))
                for i in np.argsort(draws, kind="stable").tolist():
                    writer.write(*rows[i])
        mixed[split] = writer.receipt.to_dict()
    storage.write_json(where, mixed)
    return mixed


def _loads(row_groups: np.ndarray) -> Iterator[list[int]]:
    """Consecutive row groups of at most HELD_BYTES together."""
    load: list[int] = []
    held = 0
    for i, size in enumerate((row_groups["end"] - row_groups["start"]).tolist()):
        if load and held + size > HELD_BYTES:
            yield load
            load, held = [], 0
        load.append(i)
        held += size
    if load:
        yield load
