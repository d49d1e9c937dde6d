"""Finishes the datasets of a task from its receipts, and opens finished splits."""

import json
import re
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.data.format import (
    Dataset,
    Manifest,
    Receipt,
    Reject,
    Schema,
    build_manifest,
    finish_dataset,
    open_dataset,
)
from pipeline.errors import UserError
from pipeline.outputs import refuse_other_files
from pipeline.vtab import archives, tasks
from pipeline.vtab.parts import is_finished, split_uri
from pipeline.vtab.plan import Request, TaskPlan, find_layout, identify
from pipeline.vtab.splits import PARTS, check_split
from pipeline.vtab.tasks import Task

OWN_FILES = re.compile(r"(part-\d{5}-\d{4}|rejects)\.parquet(\.[0-9a-f]{8}\.tmp)?|manifest\.json\.[0-9a-f]{8}\.tmp")
"""Files of an unfinished split, also of a process that was killed while it wrote them."""
Counts = dict[str, dict[str, Any]]  # {split: counts} of one task


def open_split(uri: str, split: str) -> Dataset:
    """One split of a prepared task. uri: OUTPUT/<task>. Raises UserError if the split has not been prepared."""
    check_split(split)
    where = storage.join(uri, split)
    if not storage.exists(storage.join(where, "manifest.json")):
        raise UserError(
            f"{where}: split {split} is not prepared; run jobs/prepare.py vtab "
            f"{storage.normalise(uri).rpartition('/')[2]} --raw FOLDER --splits {split}"
        )
    return open_dataset(where)


def official_count(task: Task, split: str) -> int:
    sizes = dict(zip(("train", "val", "test"), task.counts, strict=True))
    return sum(sizes[pool] if first is None else first for pool, first in PARTS[split])


def counts_table(results: dict[str, Counts]) -> str:
    """A table of the counts and the official counts."""
    lines = [f"{'task':<22}{'split':<16}{'images':>9}{'official':>10}{'rejects':>9}"]
    for task, result in results.items():
        for split, counts in result.items():
            mark = " (miniature)" if counts["miniature"] else ""
            lines.append(
                f"{task:<22}{split:<16}{counts['images']:>9,}{counts['official']:>10,}{counts['rejects']:>9,}{mark}"
            )
    return "\n".join(lines)


def finished_counts(request: Request) -> Counts | None:
    """The counts of a task if all its splits exist. Raises UserError when the output contains other data.

    If the archives of a finished task were deleted, only its name and splits are compared.
    """
    gone = find_layout(request)[0] == "archives" and bool(archives.locate(request.raw, request.entry.dataset)[1])
    identity = {"task": request.task} if gone else identify(request)
    manifests = {}
    for split in request.splits:
        uri = storage.join(request.uri, split)
        if not storage.exists(storage.join(uri, "manifest.json")):
            refuse_other_files(uri, lambda path: bool(OWN_FILES.fullmatch(path)))
            continue
        manifests[split] = open_dataset(uri).manifest
        wanted = {**identity, "split": split}
        there = manifests[split].config.get("vtab") or {}
        if {key: there.get(key) for key in wanted} != wanted:
            raise UserError(
                f"{uri}: already contains another dataset (made from {json.dumps(there)}); choose another --output or remove it"
            )
    if len(manifests) < len(request.splits):
        return None
    return {split: _count(request, split, manifest) for split, manifest in manifests.items()}


def finish_task(plan: TaskPlan, receipts: Sequence[dict[str, Any]]) -> tuple[Counts, dict[str, str]]:
    """Writes the manifests of a task after all its parts are done. Returns (counts by split, problem by split).

    A split without images has no manifest; the other splits are still finished.
    """
    counts, problems = {}, dict(plan.problems)
    for split in plan.examples:
        if is_finished(plan, split):
            counts[split] = _count(plan, split, open_dataset(split_uri(plan, split)).manifest)
            continue
        parts = [receipt[split] for receipt in receipts if split in receipt]
        if not sum(part["receipt"]["rows"] for part in parts):
            problems[split] = f"none of the {len(plan.examples[split]):,} listed images could be read"
            continue
        counts[split] = _count(plan, split, _write_manifest(plan, split, parts))
    return counts, problems


def _write_manifest(plan: TaskPlan, split: str, parts: Sequence[dict[str, Any]]) -> Manifest:
    uri = split_uri(plan, split)
    rejects = [Reject(**reject) for part in parts for reject in part["rejects"]]
    manifest = build_manifest(
        uri,
        [Receipt.from_dict(part["receipt"]) for part in parts],
        Schema(classes=tasks.get(plan.task).classes),
        rejects=rejects,
        inputs=len(plan.examples[split]),
        config={"vtab": {**plan.identity, "split": split}},
    )
    finish_dataset(uri, manifest, rejects)
    known = {shard.name for shard in manifest.shards}
    for file in storage.list_files(uri, recursive=False):  # files of a killed worker
        if file.path.endswith(".parquet") and file.path.startswith(("part-", "shard-")) and file.path not in known:
            storage.remove(file.uri)
    return manifest


def _count(request: Request | TaskPlan, split: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "uri": storage.join(request.output, request.task, split),
        "images": manifest.rows,
        "rejects": sum(manifest.rejects.values()),
        "official": official_count(tasks.get(request.task), split),
        "miniature": manifest.config["vtab"]["miniature"],
        "fingerprint": manifest.fingerprint,
    }
