"""Further passes over downloads that failed for a reason that may pass, such as a time-out.

A pass is more slices of the plan: each reads one earlier slice again, but only the keys whose rejects are temporary, and
replaces those rejects in the end. `retries.json` in the folder of receipts lists the slices that are read again, so a
stopped pass is continued as everything else is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.data.downloads.config import is_temporary
from pipeline.data.prepare.plan import PreparePlan, SourceSlice, slice_name
from pipeline.data.sources import urls

RETRIES = "retries.json"


def run_passes(plan: PreparePlan, work: Callable[[PreparePlan], int]) -> PreparePlan:
    """Does the slices of the plan and the passes over temporary failures. work: does the slices of a plan that have no
    receipt, and says how many there were. Returns the plan with the slices of all passes.

    A command that finds all slices done makes at least one pass."""
    plan = planned(plan)
    done = work(plan)
    for _ in range(max(plan.config.download.passes, int(not done))):
        more = add_pass(plan)
        if more is plan:
            break
        plan = more
        work(plan)
    return plan


def planned(plan: PreparePlan) -> PreparePlan:
    """The plan with the slices of passes that an earlier command has begun."""
    where = storage.join(plan.work, RETRIES)
    if not _downloads(plan) or not storage.exists(where):
        return plan
    return _extended(plan, storage.read_record(where, ["slices"])["slices"])


def add_pass(plan: PreparePlan) -> PreparePlan:
    """The plan with a slice for each slice with temporary failures; the same plan when there are none."""
    again = pending(plan)
    if not again:
        return plan
    before = [part.again for part in plan.slices if part.again >= 0]
    storage.write_json(storage.join(plan.work, RETRIES), {"slices": [*before, *again]})
    return _extended(plan, again)


def pending(plan: PreparePlan) -> list[int]:
    """The slices with temporary failures that no later slice reads again."""
    if not _downloads(plan):
        return []
    covered = {part.again for part in plan.slices}
    open_slices = [number for number in range(len(plan.slices)) if number not in covered]
    receipts = plan.receipts.read([slice_name(number) for number in open_slices])
    return [number for number, receipt in zip(open_slices, receipts, strict=True) if any(temporary_keys(receipt))]


def temporary_keys(receipt: dict[str, Any]) -> Iterable[str]:
    """The keys of a slice's temporary failures."""
    return (row[0] for rows in receipt["rejects"].values() for row in rows if is_temporary(row[2]))


def without_retried(plan: PreparePlan, receipts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The receipts of all slices, without the rejects that a later slice has read again."""
    covered = {part.again for part in plan.slices}
    settled = []
    for number, receipt in enumerate(receipts):
        if number in covered:
            rejects = {
                name: [row for row in rows if not is_temporary(row[2])] for name, rows in receipt["rejects"].items()
            }
            gone = {name: len(rows) - len(rejects[name]) for name, rows in receipt["rejects"].items()}
            inputs = {name: count - gone.get(name, 0) for name, count in receipt["inputs"].items()}
            receipt = receipt | {"rejects": rejects, "inputs": inputs}
        settled.append(receipt)
    return settled


def _downloads(plan: PreparePlan) -> bool:
    return any(source.kind == urls.NAME for source in plan.sources)


def _extended(plan: PreparePlan, again: Sequence[int]) -> PreparePlan:
    slices = list(plan.slices)
    for number in again:
        part = slices[number]
        slices.append(SourceSlice(part.source, part.first, part.fragments, part.size, again=number))
    return replace(plan, slices=slices)
