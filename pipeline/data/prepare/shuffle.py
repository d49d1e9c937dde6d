"""Global shuffle of the rows of all slices, for archives that are sorted by class (such as ImageNet's tar of tars).

Two passes over the shards, in tasks that need memory for at most the rows of a slice. `scatter` distributes the rows of
a slice over buckets, one row group per bucket. `gather` reads the row groups of a bucket in random order of slices,
shuffles as many as fit in memory, and writes the final shards. Rows are exchanged through storage as byte ranges. The
bucket and position of a row depend only on the seed, the slice and the row number. Both passes write receipts, so a
second run skips finished work."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline import storage, workqueue
from pipeline.data.format import Receipt
from pipeline.data.loading.order import bits
from pipeline.data.prepare.config import WORK
from pipeline.data.prepare.plan import PreparePlan

# Purposes of random numbers (see pipeline.data.loading.order): bucket of a row, order of slices, order of rows.
BUCKET, SLICES, PLACE = 100, 101, 102
MAX_BUCKETS = 128
HELD_BYTES = 512 << 20  # image bytes that `gather` shuffles at a time
SCATTERED = storage.join(WORK, "scattered")  # folder of the shards between the passes
logger = logging.getLogger(__name__)


def needs_shuffle(plan: PreparePlan, receipts: Sequence[dict[str, Any]]) -> bool:
    """Whether a second pass has to shuffle the rows. Listed files are shuffled before they are read."""
    if (
        not plan.config.shuffle
        or plan.config.shuffle_archives == "never"
        or all(source.one_image_per_fragment for source in plan.sources)
    ):
        return False
    return plan.config.shuffle_archives == "always" or (not plan.labels.multilabel and sorted_by_class(receipts))


def sorted_by_class(receipts: Sequence[dict[str, Any]]) -> bool:
    """Whether neighbouring rows have the same class much more often than in a shuffled order (threshold: half-way to
    always)."""
    counts: dict[str, int] = {}
    for receipt in receipts:
        for written in receipt["splits"].values():
            for label, count in written["class_counts"].items():
                counts[label] = counts.get(label, 0) + count
    rows = sum(counts.values())
    by_chance = sum((count / rows) ** 2 for count in counts.values()) if rows else 1.0
    alike = sum(receipt["alike"] for receipt in receipts) / max(rows, 1)
    return len(counts) > 1 and alike > (1 + by_chance) / 2


def shuffle_rows(plan: PreparePlan, names: Sequence[str]) -> list[dict[str, Any]]:
    """Shuffles the rows of all slices. `names` are those of the slices' receipts.

    Returns the receipts of the shards that replace those of the slices: {split: receipt} for each bucket.
    """
    logger.info("prepare: shuffling the archives over all shards")
    scattered = {f"scattered-{number:05d}": (number, name) for number, name in enumerate(names)}
    _finish_units(scattered, scatter, plan)
    receipts = plan.receipts.read(list(scattered))
    units = {}
    for bucket in range(_buckets(plan)):
        parts = {split: [r[split][str(bucket)] for r in receipts if str(bucket) in r[split]] for split in plan.splits}
        units[f"shuffled-{bucket:05d}"] = (bucket, parts)
    _finish_units(units, gather, plan)
    return plan.receipts.read(list(units))


def _finish_units(units: Mapping[str, Any], work: Any, plan: PreparePlan) -> None:
    outcomes = workqueue.run(units, work, receipts=plan.receipts, context=plan, summary=lambda receipt: None)
    for outcome in outcomes:
        if outcome.error:
            raise outcome.error


def _buckets(plan: PreparePlan) -> int:
    return min(len(plan.slices), MAX_BUCKETS)


def scatter(unit: tuple[int, str], plan: PreparePlan) -> dict[str, Any]:
    """Distributes the rows of a slice over buckets: {split: {bucket: the shard, with the row groups of the bucket}}."""
    number, name = unit
    (receipt,) = plan.receipts.read([name])
    scattered: dict[str, Any] = {}
    for split in plan.splits:
        dataset = plan.open_rows(receipt["splits"][split], split)
        rows = [row for i in range(len(dataset.row_groups)) for row in dataset.read_row_group(i).rows()]
        draws = bits(plan.config.seed, BUCKET, number, np.arange(len(rows)))
        bucket = (draws % np.uint64(_buckets(plan))).tolist()
        order = sorted(range(len(rows)), key=bucket.__getitem__)
        with plan.writer(
            storage.join(SCATTERED, split), number, row_group_bytes=1 << 62, shard_bytes=1 << 62
        ) as writer:
            for place, i in enumerate(order):
                if place and bucket[i] != bucket[order[place - 1]]:
                    writer.end_row_group()
                writer.write(*rows[i])
        parts: dict[str, Any] = {}
        for shard in writer.receipt.to_dict()["shards"]:  # one, or none of an empty slice
            first = 0
            for group in shard["row_groups"]:
                part = parts.setdefault(str(bucket[order[first]]), shard | {"row_groups": []})
                part["row_groups"].append(group)
                first += group[0]
        scattered[split] = parts
    return scattered


def gather(unit: tuple[int, dict[str, list[dict[str, Any]]]], plan: PreparePlan) -> dict[str, Any]:
    """Writes the shards of one bucket from the output of `scatter`, {split: shards by slice}. Returns {split:
    receipt}."""
    bucket, scattered = unit
    shuffled = {}
    for split, shards in scattered.items():
        shards = [shards[i] for i in np.argsort(bits(plan.config.seed, SLICES, bucket, np.arange(len(shards))))]
        dataset = plan.open_rows(Receipt().to_dict() | {"shards": shards}, storage.join(SCATTERED, split))
        with plan.writer(split, bucket, "s") as writer, ThreadPoolExecutor(16) as pool:
            for number, groups in enumerate(_loads(dataset.row_groups)):
                # read in parallel, because many small ranges are slow on S3
                rows = [row for group in pool.map(dataset.read_row_group, groups) for row in group.rows()]
                draws = bits(plan.config.seed, PLACE, bucket, number, np.arange(len(rows)))
                for i in np.argsort(draws, kind="stable").tolist():
                    writer.write(*rows[i])
        shuffled[split] = writer.receipt.to_dict()
    return shuffled


def _loads(row_groups: np.ndarray) -> Iterator[list[int]]:
    """Divides row groups into consecutive groups of at most HELD_BYTES each."""
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
