"""Verification of candidate pairs of rows: small copies of the rows are compared in detail."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import cv2
import numpy as np
import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data.duplicates.candidates import (
    DESCRIPTOR,
    PERCEPTUAL,
    Pairs,
    boxes,
    concatenate_pairs,
    unique_pairs,
)
from pipeline.data.duplicates.evaluation import read_part
from pipeline.data.duplicates.hashes import unpack_hashes
from pipeline.data.duplicates.verification import Agreement, compare_unaligned, compare_views, small_copy
from pipeline.data.format.describe import thumbnail
from pipeline.data.prepare.plan import PreparePlan, slice_name

Lines = dict[str, np.ndarray]
"""Columns of equal length."""
SLICE_ROWS = 16_384
"""Rows of a large slice, for estimates."""
ROW_BITS = 0xFFFFFFFF
"""A row number is slice << 32 | row in the slice. Parts of evaluation sets are numbered after the last slice."""


def verify_pairs(plan: PreparePlan, pairs: Pairs) -> Pairs:
    """The pairs that show the same photograph, with `detail` (1.0 if keys or pixels are equal) and `difference` added.

    Two passes over the slices: the first writes small copies of the rows to storage; the second compares each pair, in
    the task for the slice of its second row.
    """
    size = len(pairs["first"])
    same, detail, difference = np.ones(size, bool), np.ones(size, np.float32), np.zeros(size, np.float32)
    doubtful = np.flatnonzero(pairs["kind"] >= PERCEPTUAL)
    if not len(doubtful):
        return pairs | {"detail": detail, "difference": difference}
    rows = np.unique(np.concatenate([pairs["first"][doubtful], pairs["second"][doubtful]]))
    copies: dict[int, list[int]] = {}
    for row in rows.tolist():
        copies.setdefault(row >> 32, []).append(row & ROW_BITS)
    finish_units(plan, {f"copied-{number:05d}": (number, places) for number, places in copies.items()}, _copy_rows)
    shares: dict[int, list[int]] = {}
    for i in doubtful.tolist():
        shares.setdefault(int(pairs["second"][i]) >> 32, []).append(i)
    units = {
        f"verified-{number:05d}": {name: column[share] for name, column in pairs.items()}
        for number, share in shares.items()
    }
    finish_units(plan, units, _compare_rows)
    for share, agreed in zip(shares.values(), plan.receipts.read(list(units)), strict=True):
        same[share], detail[share], difference[share] = agreed["same"], agreed["detail"], agreed["difference"]
    columns = pairs | {"detail": detail, "difference": difference}
    return {name: column[same] for name, column in columns.items()}


def finish_units(plan: PreparePlan, units: dict[str, Any], work: Any, **options: Any) -> None:
    """Processes units of the plan. Raises the first UserError of a unit."""
    outcomes = workqueue.run(units, work, receipts=plan.receipts, context=plan, summary=lambda receipt: None, **options)
    for outcome in outcomes:
        if outcome.error:
            raise outcome.error


def match_in_buckets(
    count: int, lines_of: Callable[[int], Lines], match: Callable[[Lines], Pairs], buckets: int
) -> Pairs:
    """The pairs that `match` finds among the lines with the same "bucket", a column of the lines. A Ray Data job:
    numbers below `count` -> lines of each -> shuffle into buckets -> pairs. Call `workqueue.prepare_shuffle` before."""
    import ray

    def lines(batch: Lines) -> Lines:
        parts = [lines_of(int(number)) for number in batch["number"].tolist()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    work: Any = lines  # Ray's stubs do not support a dict of arrays
    with workqueue.errors_of_tasks():
        numbers = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)
        shuffled = numbers.map_batches(work, batch_size=None).groupby("bucket", num_partitions=buckets)
        matched = shuffled.map_groups(cast("Any", match), batch_format="numpy")
        found = list(matched.iter_batches(batch_size=None, batch_format="numpy"))
    return unique_pairs(concatenate_pairs([batch for batch in found if "first" in batch]))


def places_of_rows(plan: PreparePlan, number: int) -> list[tuple[str, int]]:
    """(split, row in the shards of the split) of every row of a slice, in reading order."""
    (table, _), names = read_hashes(plan, number), list(plan.splits)
    counts = [0] * len(names)
    places = []
    for split in table["split"].tolist():
        places.append((names[split], counts[split]))
        counts[split] += 1
    return places


def read_hashes(plan: PreparePlan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, views) of a slice."""
    return unpack_hashes(storage.read_bytes(plan.hashes_uri(number)))


def pictures_of_rows(
    plan: PreparePlan, number: int, rows: list[int] | None = None
) -> Iterable[tuple[int, str, np.ndarray]]:
    """(row, key, RGB pixels) of rows of a slice, or of a part of an evaluation set; all rows by default."""
    if number >= len(plan.slices):
        part = plan.evaluation_parts[number - len(plan.slices)][1]
        wanted = None if rows is None else set(rows)
        for row, (key, pixels, _) in enumerate(read_part(part, plan.config.max_pixels)):
            if pixels is not None and (wanted is None or row in wanted):
                yield row, key, pixels
        return
    (receipt,), places = plan.receipts.read([slice_name(number)]), places_of_rows(plan, number)
    at = {places[row]: row for row in (range(len(places)) if rows is None else rows)}
    for name in plan.splits:
        dataset = plan.open_rows(receipt["splits"][name], name)
        for i in range(len(dataset.row_groups)):
            first, last = int(dataset.starts[i]), int(dataset.starts[i + 1])
            here = [place for place in range(first, last) if (name, place) in at]
            if here:
                group = dataset.read_row_group(i)
                for place in here:
                    yield at[name, place], group.keys[place - first], thumbnail(dataset, group.images[place - first])


# ---------------------------------------------------------------- small copies


def _copies_uri(plan: PreparePlan, number: int) -> str:
    return storage.join(plan.work, f"copies-{number:05d}.arrow")


def _copy_rows(unit: tuple[int, list[int]], plan: PreparePlan) -> dict[str, Any]:
    """Writes small copies of some rows of a slice."""
    cv2.setNumThreads(1)
    number, rows = unit
    found = [(row, key, small_copy(pixels)) for row, key, pixels in pictures_of_rows(plan, number, rows)]
    columns = {
        "row": pa.array([row for row, *_ in found], pa.int64()),
        "key": pa.array([key for _, key, _ in found], pa.large_string()),
        "picture": pa.array([picture for *_, picture in found], pa.large_binary()),
    }
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    storage.write_bytes(_copies_uri(plan, number), sink.getvalue().to_pybytes())
    return {"rows": len(found)}


def read_copies(plan: PreparePlan, rows: Iterable[int]) -> dict[int, tuple[str, bytes]]:
    """(key, small copy) of rows of any slices."""
    wanted: dict[int, set[int]] = {}
    for row in rows:
        wanted.setdefault(row >> 32, set()).add(row & ROW_BITS)
    copies = {}
    for number, places in wanted.items():
        table = pa.ipc.open_stream(storage.read_bytes(_copies_uri(plan, number))).read_all()
        for i, place in enumerate(table["row"].to_pylist()):
            if place in places:
                copies[number << 32 | place] = table["key"][i].as_py(), table["picture"][i].as_py()
    return copies


# ---------------------------------------------------------------- comparing


def _compare_rows(unit: Pairs, plan: PreparePlan) -> dict[str, list[Any]]:
    """The columns same, detail and difference for each pair. `same` is true for the first alignment that agrees."""
    cv2.setNumThreads(1)
    first, second = unit["first"].tolist(), unit["second"].tolist()
    copies = read_copies(plan, {*first, *second})
    first_box, second_box = boxes(unit["first_box"]), boxes(unit["second_box"])
    accept = plan.config.descriptor_accept
    done: set[tuple[int, int]] = set()
    agreed: dict[str, list[Any]] = {"same": [], "detail": [], "difference": []}
    for i, pair in enumerate(zip(first, second, strict=True)):
        agreement = Agreement(0)
        if pair not in done:
            mine, other = copies[pair[1]][1], copies[pair[0]][1]
            if unit["kind"][i] == DESCRIPTOR:
                agreement = compare_unaligned(mine, other)
            else:
                agreement = compare_views(mine, other, second_box[i], first_box[i], bool(unit["mirrored"][i]))
            if agreement.same:
                done.add(pair)
        accepted = accept is not None and unit["kind"][i] == DESCRIPTOR and unit["similarity"][i] >= accept
        agreed["same"].append(bool(agreement.same or accepted))
        agreed["detail"].append(round(agreement.detail, 3))
        agreed["difference"].append(round(agreement.difference, 1))
    return agreed
