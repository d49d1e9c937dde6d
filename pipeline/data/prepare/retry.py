"""Further passes over temporary download failures, such as time-outs. A pass adds slices to the plan. Each of them
reads the rows of an earlier slice whose rejects are temporary, and replaces these rejects. `retries.json` in the folder
of receipts lists the slices of all passes, so that a stopped pass can continue."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.data.downloads.config import is_temporary
from pipeline.data.prepare.plan import PreparePlan, SourceSlice, slice_name
from pipeline.data.sources import urls

RETRIES = "retries.json"


def run_passes(plan: PreparePlan, work: Callable[[PreparePlan], int]) -> PreparePlan:
    """Processes the slices of the plan, and the passes over temporary failures. work: processes the slices without a
    receipt and returns their number. Returns the plan with the slices of all passes. If
    all slices are already done, at least one pass is made."""
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
    """The plan with the slices of passes that an earlier command started."""
    where = storage.join(plan.work, RETRIES)
    if not _downloads(plan) or not storage.exists(where):
        return plan
    return _extended(plan, storage.read_record(where, ["slices"])["slices"])


def add_pass(plan: PreparePlan) -> PreparePlan:
    """Adds a slice for each slice with temporary failures; without failures, returns the same plan."""
    again = pending(plan)
    if not again:
        return plan
    before = [part.again for part in plan.slices if part.again >= 0]
    storage.write_json(storage.join(plan.work, RETRIES), {"slices": [*before, *again]})
    return _extended(plan, again)


def pending(plan: PreparePlan) -> list[int]:
    """The slices with temporary failures that no later slice retries."""
    if not _downloads(plan):
        return []
    covered = {part.again for part in plan.slices}
    open_slices = [number for number in range(len(plan.slices)) if number not in covered]
    receipts = plan.receipts.read([slice_name(number) for number in open_slices])
    return [number for number, receipt in zip(open_slices, receipts, strict=True) if any(temporary_keys(receipt))]


def places_again(part: SourceSlice, plan: PreparePlan) -> list[int] | None:
    """The places in its slice of the inputs that a slice of a further pass reads again; None for all."""
    if part.again < 0:
        return None
    (receipt,) = plan.receipts.read([slice_name(part.again)])
    return sorted(receipt["temporary"])


def temporary_keys(receipt: dict[str, Any]) -> Iterable[str]:
    """The keys of a slice's temporary failures."""
    return (row[0] for rows in receipt["rejects"].values() for row in rows if is_temporary(row[2]))


def without_retried(plan: PreparePlan, receipts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The receipts of all slices, without the rejects that a later slice retried."""
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
