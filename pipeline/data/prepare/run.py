"""The phases of `prepare`: plan, claim, evaluation sets, slices, duplicates, shuffle, manifests."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

from pipeline import storage, workqueue
from pipeline.data.duplicates.evaluation import index_evaluation_sets
from pipeline.data.format import Manifest
from pipeline.data.prepare import retry
from pipeline.data.prepare.append import Append, find_bases, find_datasets, finished_before, read_keys
from pipeline.data.prepare.builtin import BUILTIN, write_builtin
from pipeline.data.prepare.change import has_work, lock_datasets
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.prepare.deduplicate import deduplicate
from pipeline.data.prepare.descriptors import check_descriptor
from pipeline.data.prepare.finish import finish_datasets, receipt_names, tidy_output
from pipeline.data.prepare.plan import (
    PreparePlan,
    check_finished,
    claim_output,
    find_finished,
    is_changing,
    make_plan,
    slice_name,
)
from pipeline.data.prepare.record import PrepareRecord
from pipeline.data.prepare.shuffle import needs_shuffle, shuffle_rows
from pipeline.data.prepare.worker import prepare_slice, summarize
from pipeline.errors import plural
from pipeline.logs import Progress
from pipeline.outputs import check_output

logger = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig,
    *,
    tracking_uri: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    append: bool = False,
) -> dict[str, Manifest]:
    """Prepares datasets according to `config`. Returns {split: manifest}, or {"": manifest} without splits.

    append: adds the sources to the finished dataset at the output, as its next revision (append.py).
    Returns a finished dataset immediately. tracking_uri: MLflow server. on_progress: called after every slice with the
    number of inputs and rejects so far. Raises UserError before any work for an invalid configuration or source and for
    an output with other content, and at the end for too many rejects or no usable images."""
    config = check_config(config)
    check_output(config.output)
    watchers = [on_progress] if on_progress else []
    if not append:
        return _prepare(config, None, tracking_uri, watchers)
    datasets = find_datasets(config)
    with lock_datasets(config.output, datasets.values()):  # before the number of the revision is chosen
        return _prepare(config, find_bases(config, datasets), tracking_uri, watchers)


def _prepare(
    config: PrepareConfig, to: Append | None, tracking_uri: str | None, watchers: list[Callable[[int, int], None]]
) -> dict[str, Manifest]:
    found = None if to else find_finished(config)
    raw = storage.join(os.path.dirname(config.output), "raw")
    sources = tuple(write_builtin(uri, raw) if uri in BUILTIN else uri for uri in config.source)
    config = dataclasses.replace(config, source=sources)
    if config.descriptor and found is None:
        check_descriptor(config)
    plan = make_plan(config, to)
    if to is not None:
        finished = None if has_work(config.output) else finished_before(to, plan.input_fingerprint)
        return _log_finished(plan, finished) if finished else _make(plan, tracking_uri, watchers)
    if finished := _find_complete(plan, locked=False):
        return finished
    with lock_datasets(config.output, map(plan.split_uri, found or ())):
        finished = _find_complete(plan, locked=True)  # again, as another process may just have finished it
        return finished or _make(plan, tracking_uri, watchers)


def _find_complete(plan: PreparePlan, locked: bool) -> dict[str, Manifest] | None:
    """The manifests, if the dataset of the plan is finished and there is nothing to retry. Finishes a stopped cleanup,
    if the output is locked."""
    finished, output = find_finished(plan.config), plan.config.output
    if finished is None:
        return None
    check_finished(plan, finished)
    if has_work(output) and not is_changing(output):
        if not locked:
            return None
        if retry.pending(retry.planned(plan)):
            logger.info("prepare: %s is finished; temporarily failed downloads are retried", output)
            return None
        tidy_output(plan, finished)  # the job was stopped during cleanup
    return _log_finished(plan, finished)


def _log_finished(plan: PreparePlan, finished: dict[str, Manifest]) -> dict[str, Manifest]:
    logger.info("prepare: %s is already finished", plan.config.output)
    return finished


def _make(
    plan: PreparePlan, tracking_uri: str | None, watchers: list[Callable[[int, int], None]]
) -> dict[str, Manifest]:
    plan = claim_output(plan)
    if plan.append is not None:
        plan = dataclasses.replace(plan, append=read_keys(plan.append))
    if tracking_uri is None:
        return _run_phases(plan, watchers)
    with PrepareRecord(tracking_uri, plan.config, plan.work, plan.input_fingerprint) as record:
        manifests = _run_phases(plan, [*watchers, record.progress], record)
        record.finish({name: (plan.split_uri(name), manifest) for name, manifest in manifests.items()})
    return manifests


def _run_phases(
    plan: PreparePlan, watchers: list[Callable[[int, int], None]], record: PrepareRecord | None = None
) -> dict[str, Manifest]:
    plan = retry.run_passes(plan, lambda part: prepare_slices(part, watchers))
    if plan.finds_duplicates_of_rows:
        deduplicate(plan)
    names = receipt_names(plan)
    receipts = plan.receipts.read(names)
    shuffled = shuffle_rows(plan, names) if needs_shuffle(plan, receipts) else None
    if record is not None:
        record.wait()
    return finish_datasets(plan, receipts, shuffled)


def prepare_slices(
    plan: PreparePlan,
    watchers: list[Callable[[int, int], None]] | None = None,
    work: Callable[[int, PreparePlan], dict[str, Any]] = prepare_slice,
) -> int:
    """Processes the slices without a receipt. Returns their number. Raises the first UserError of a slice."""
    finished = plan.receipts.finished()
    slices = {slice_name(number): number for number in range(len(plan.slices))}
    todo = {name: number for name, number in slices.items() if name not in finished}
    if len(todo) < len(slices):
        logger.info("prepare: %d of %d units are already done", len(slices) - len(todo), len(slices))
    if not todo:
        return 0
    if plan.config.decontaminate:
        index = index_evaluation_sets(plan.config.decontaminate, plan.config.max_pixels)
        plan = dataclasses.replace(plan, evaluation=index)
        logger.info(
            "prepare: keeping out %s of %s", plural(index.count, "image"), plural(len(index.sets), "evaluation set")
        )
    if plan.append is not None and plan.config.deduplicate != "off":
        index = index_evaluation_sets(list(plan.append.bases.values()), plan.config.max_pixels)
        plan = dataclasses.replace(plan, append=dataclasses.replace(plan.append, index=index))
    outcomes = workqueue.run(
        todo,
        work,
        receipts=plan.receipts,
        context=plan,
        summary=summarize,
        size=lambda number: plan.slices[number].size,
        num_cpus=0.5 if any(source.downloads for source in plan.sources) else 1,  # one waits while another works
    )
    inputs = rejects = 0
    with Progress("prepare", total=sum(plan.slices[number].size for number in todo.values())) as progress:
        for outcome in outcomes:
            if outcome.error:
                raise outcome.error
            inputs, rejects = inputs + outcome.summary[0], rejects + outcome.summary[1]
            rate = inputs / progress.seconds
            note = f"{plural(inputs, 'input')}, {rate:,.0f}/s, {rejects:,} reject{'s' * (rejects != 1)}"
            progress.advance(plan.slices[slices[outcome.name]].size, note)
            for watcher in watchers or ():
                watcher(inputs, rejects)
    return len(todo)
