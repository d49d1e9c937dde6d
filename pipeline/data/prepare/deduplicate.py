"""Finds rows of the corpus that duplicate another row, or an image of an evaluation set by descriptor."""

import dataclasses
from typing import Any

import numpy as np

from pipeline import workqueue
from pipeline.data.duplicates.candidates import (
    Pairs,
    Removal,
    candidate_lines,
    concatenate_pairs,
    match_rows,
    select_removals,
    unique_pairs,
)
from pipeline.data.duplicates.evaluation import parts_of_set
from pipeline.data.duplicates.hashes import ROW, SQUARE_KEYS, SQUARES, VIEW, WHOLE_KEYS
from pipeline.data.prepare.descriptors import describe_rows, pairs_of_descriptors
from pipeline.data.prepare.pairs import SLICE_ROWS, Lines, match_in_buckets, read_hashes, verify_pairs
from pipeline.data.prepare.plan import PreparePlan
from pipeline.data.prepare.remove import remove_duplicates

LINES, LINE_BYTES = len(WHOLE_KEYS) + SQUARES * len(SQUARE_KEYS), 53  # maximum lines per image; bytes per line


def deduplicate(plan: PreparePlan) -> None:
    """Removes or reports duplicate rows, as configured."""
    if plan.config.descriptor:
        parts = [(uri, part) for uri in plan.config.decontaminate for part in parts_of_set(uri)]
        plan = dataclasses.replace(plan, evaluation_parts=parts)
    remove_duplicates(plan, find_duplicates(plan))


def find_duplicates(plan: PreparePlan) -> dict[int, Removal]:
    """{row: why it is removed}: one row of every candidate pair that verification confirms."""
    pairs = propose_pairs(plan)
    if plan.config.descriptor:
        describe_rows(plan)
        pairs = unique_pairs(concatenate_pairs([pairs, pairs_of_descriptors(plan)]))
    return select_removals(verify_pairs(plan, pairs))


def propose_pairs(plan: PreparePlan) -> Pairs:
    """Candidate pairs of rows. On Ray, a bucket has the lines of many join keys."""
    near, count = plan.finds_near_duplicates, len(plan.slices)
    if not workqueue.uses_ray():
        return unique_pairs(match_rows(_lines(range(count), plan), plan.config.distance))
    # Buckets of one to two million lines: slices have at most some ten thousand rows.
    buckets = max(4, count if near else min(count, max(64, count // 8)))
    workqueue.prepare_shuffle(count * SLICE_ROWS * (LINES if near else 2) * LINE_BYTES, buckets)

    def lines_of(number: int) -> Lines:
        lines = _lines([number], plan)
        return lines | {"bucket": (lines["join"] >> np.uint64(40)) % np.uint64(buckets)}

    def match(lines: Lines) -> Pairs:
        return unique_pairs(match_rows(lines, plan.config.distance))

    return match_in_buckets(count, lines_of, match, buckets)


def _lines(numbers: Any, plan: PreparePlan) -> dict[str, np.ndarray]:
    exact = plan.config.deduplicate != "off"
    options: dict[str, Any] = {"keys": plan.finds_equal_keys, "exact": exact, "near": plan.finds_near_duplicates}
    parts = [candidate_lines(*read_hashes(plan, number), int(number), **options) for number in numbers]
    parts = parts or [candidate_lines(np.empty(0, ROW), np.empty(0, VIEW), 0, **options)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
