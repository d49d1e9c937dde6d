"""Computes descriptors of a corpus and of evaluation sets with the user's
network, and finds pairs of similar descriptors."""

import hashlib
import io
from typing import Any

import numpy as np

from pipeline import storage, workqueue
from pipeline.data.duplicates.candidates import Pairs, unique_pairs
from pipeline.data.duplicates.descriptors import (
    BATCH,
    LIST_ROWS,
    PROBES,
    TRAINING,
    Descriptor,
    find_centres,
    match_vectors,
    nearest_lists,
    read_script,
)
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.prepare.pairs import SLICE_ROWS, Lines, finish_units, match_in_buckets, pictures_of_rows
from pipeline.data.prepare.plan import PreparePlan
from pipeline.libraries import import_library

MAX_SAMPLE = 1_000_000  # vectors that k-means is trained on


def check_descriptor(config: PrepareConfig) -> None:
    """Raises UserError if the network cannot be used. Runs the network on two small images, before any work."""
    import_library("faiss")
    Descriptor(str(config.descriptor), config.descriptor_size, config.descriptor_mean, config.descriptor_std, gpu=False)


def describe_rows(plan: PreparePlan) -> None:
    """Writes the descriptors of every slice and of every part of the evaluation
    sets, by batch inference in Ray actors."""
    count = len(plan.slices) + len(plan.evaluation_parts)
    units = {name: number for number, name in enumerate(_described(plan, count))}
    finish_units(plan, units, DescribeRows, num_gpus=plan.config.descriptor_gpus)


class DescribeRows:
    """An actor that holds the network and computes the descriptors of one slice at a time."""

    def __init__(self, plan: PreparePlan) -> None:
        import torch

        config, self.plan = plan.config, plan
        if not config.descriptor_gpus:
            torch.set_num_threads(1)
        self.descriptor = Descriptor(
            str(config.descriptor),
            config.descriptor_size,
            config.descriptor_mean,
            config.descriptor_std,
            gpu=config.descriptor_gpus > 0,
        )

    def __call__(self, number: int) -> dict[str, Any]:
        rows: list[int] = []
        parts = [np.empty((0, self.descriptor.dimensions), np.float16)]
        waiting: list[np.ndarray] = []
        for row, _, pixels in pictures_of_rows(self.plan, number):
            rows.append(row)
            waiting.append(np.ascontiguousarray(pixels).copy())
            if len(waiting) == BATCH:
                parts.append(self.descriptor(waiting))
                waiting = []
        if waiting:
            parts.append(self.descriptor(waiting))
        sink = io.BytesIO()
        np.save(sink, (np.int64(number) << 32) | np.array(rows, np.int64))
        np.save(sink, np.concatenate(parts))
        storage.write_bytes(_vectors_uri(self.plan, number), sink.getvalue())
        return {"rows": len(rows)}


def _vectors_uri(plan: PreparePlan, number: int) -> str:
    return storage.join(plan.work, f"descriptors-{number:05d}.npy")


def read_vectors(plan: PreparePlan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, vectors) of a slice, or of a part of an evaluation set."""
    source = io.BytesIO(storage.read_bytes(_vectors_uri(plan, number)))
    return np.load(source), np.load(source)


def pairs_of_descriptors(plan: PreparePlan) -> Pairs:
    """Pairs of rows with similar descriptors. On Ray, a bucket is a list of similar vectors."""
    numbers = range(len(plan.slices) + len(plan.evaluation_parts))
    options: dict[str, Any] = {
        "similarity": plan.config.descriptor_similarity,
        "corpus": len(plan.slices) << 32,
        "inside": plan.finds_near_duplicates,
    }
    if not workqueue.uses_ray():
        rows, vectors = (np.concatenate(part) for part in zip(*(read_vectors(plan, n) for n in numbers), strict=True))
        return unique_pairs(match_vectors(rows, vectors, **options))
    centres = _centres(plan, len(numbers))
    buckets = max(1, min(len(centres), 1024))
    workqueue.prepare_shuffle(len(numbers) * SLICE_ROWS * PROBES * 2 * centres.shape[1], buckets)
    import ray

    shared = [ray.put(centres)]

    def lines_of(number: int) -> Lines:
        rows, vectors = read_vectors(plan, number)
        which, lists = nearest_lists(vectors, ray.get(shared[0]))
        return {"row": rows[which], "bucket": lists, "vector": vectors[which]}

    def match(lines: Lines) -> Pairs:
        return match_vectors(lines["row"], lines["vector"], **options)

    return match_in_buckets(len(numbers), lines_of, match, buckets)


def _centres(plan: PreparePlan, count: int) -> np.ndarray:
    """The centres of the lists, from an evenly spaced sample of the rows."""
    rows = sum(receipt["rows"] for receipt in plan.receipts.read(_described(plan, count)))
    lists = -(-rows // LIST_ROWS)
    wanted = min(rows, MAX_SAMPLE, lists * TRAINING) if lists > 1 else 1
    every = max(1, rows // max(1, wanted))
    sample = [read_vectors(plan, number)[1][::every] for number in range(count if lists > 1 else 1)]
    return find_centres(np.concatenate(sample), rows)


def _described(plan: PreparePlan, count: int) -> list[str]:
    """Receipt names of slices and parts. The names include the network, so another network starts again."""
    digest = hashlib.sha256(read_script(str(plan.config.descriptor))).hexdigest()[:12]
    return [f"described-{digest}-{number:05d}" for number in range(count)]
