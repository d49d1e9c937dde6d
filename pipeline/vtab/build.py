"""Builds one dataset per split, OUTPUT/<task>/<split>/, from raw archives.

1. check_requests   checks names, outputs and missing files; skips finished tasks                   (this module)
2. plan_tasks       verifies and lists every data set and computes the splits                       (plan.py)
3. build_part       reads images of one part of an archive and writes shards                        (parts.py)
4. finish_task      manifests                                                                       (finish.py)

Finished work is not repeated. A task or a split that cannot be built does not stop the others.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage, workqueue
from pipeline.errors import Unavailable, UserError, plural
from pipeline.lease import Lease
from pipeline.logs import Progress
from pipeline.outputs import check_output
from pipeline.vtab import archives
from pipeline.vtab.finish import Counts, finish_task, finished_counts
from pipeline.vtab.parts import ArchivePart, build_part, count_rows, cut_parts
from pipeline.vtab.plan import Request, TaskPlan, by_dataset, find_layout, plan_tasks
from pipeline.vtab.splits import check_split

logger = logging.getLogger(__name__)

VTAB_1K = ("train800", "val200", "train800val200", "test")
WORK = ".work"  # folder of the receipts of finished parts


@dataclass(kw_only=True, slots=True)
class Preparation:
    """A request: finished tasks, tasks to build, and tasks that cannot be built.

    counts: {task: {split: counts}} of finished tasks, in the requested order. problems: one line per task or split that
    cannot be built."""

    output: str
    tasks: tuple[str, ...]
    counts: dict[str, Counts] = field(default_factory=dict)
    todo: list[Request] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Incomplete(UserError):
    """Raised when some tasks or splits could not be built. `counts` has the others."""

    def __init__(self, preparation: Preparation) -> None:
        super().__init__("\n".join(preparation.problems))
        self.counts = preparation.counts


def prepare(
    names: Sequence[str],
    raw: str,
    output: str,
    *,
    splits: Sequence[str] = VTAB_1K,
    download: bool = False,
    verify: bool = True,
) -> dict[str, Counts]:
    """Builds `splits` of the tasks `names` from the archives under `raw`: {task: {split: counts}}.

    download: download missing files that have a URL. verify=False skips checksums and official counts, and missing
    images become rejects. Raises UserError before any work when no part of the request can be built, and Incomplete
    after all other work when a task or a split cannot be built."""
    preparation = check_requests(names, raw, output, splits=splits, download=download, verify=verify)
    with lock_output(preparation):
        build_datasets(preparation)
    if preparation.problems:
        raise Incomplete(preparation)
    return preparation.counts


def check_requests(
    names: Sequence[str],
    raw: str,
    output: str,
    *,
    splits: Sequence[str] = VTAB_1K,
    download: bool = False,
    verify: bool = True,
) -> Preparation:
    """Checks names, outputs and files; arguments as for `prepare`.

    Raises UserError for a wrong name, for an output with other data, and when all unfinished tasks lack files.
    """
    raw, output = storage.normalise(raw), storage.normalise(output)
    check_output(output)
    for split in splits:
        check_split(split)
    requests = [Request(task=name, raw=raw, output=output, splits=tuple(splits), verify=verify) for name in names]
    preparation = Preparation(output=output, tasks=tuple(names))
    for request in requests:
        counts = finished_counts(request)
        if counts is None:
            preparation.todo.append(request)
        else:
            preparation.counts[request.task] = counts
    missing = _missing_files(preparation.todo, raw, download)
    preparation.todo = [request for request in preparation.todo if request.entry.dataset not in missing]
    preparation.problems = list(missing.values())
    if missing and not preparation.todo and not preparation.counts:
        raise UserError("\n".join(preparation.problems))
    return preparation


def lock_output(preparation: Preparation) -> contextlib.AbstractContextManager[Any]:
    """The lock of the output. Entering raises InUse while another process builds data sets there."""
    if not preparation.todo:
        return contextlib.nullcontext()
    remedy = "repeat the command when that one has ended"
    return Lease(preparation.output, "prepare vtab", doing="being written", remedy=remedy)


def build_datasets(preparation: Preparation) -> None:
    """Builds the tasks of a request and adds the counts and problems to it. Connects to Ray if there is work."""
    if not preparation.todo:
        return
    plans: list[TaskPlan] = []
    problems: dict[str, str] = {}
    for planned, failed in workqueue.map_tasks(plan_tasks, by_dataset(preparation.todo)):
        plans += planned
        problems |= failed
    receipts = workqueue.Receipts(storage.join(preparation.output, WORK))
    parts = {part.name: part for plan in plans for part in cut_parts(plan)}
    problems |= _build_parts(parts, receipts)
    for plan in plans:
        if plan.task not in problems:
            names = [name for name, part in parts.items() if part.task == plan.task]
            preparation.counts[plan.task], split_problems = finish_task(plan, receipts.read(names))
            preparation.problems += _explain_splits(plan, split_problems)
            _remove_receipts(receipts, plan.task)
    if storage.exists(receipts.folder) and not receipts.finished():
        storage.remove(receipts.folder, recursive=True)
    preparation.problems += [f"{task}: {problem}" for task, problem in problems.items()]
    preparation.counts = {task: counts for task in preparation.tasks if (counts := preparation.counts.get(task))}


def _build_parts(parts: dict[str, ArchivePart], receipts: workqueue.Receipts) -> dict[str, str]:
    """Processes the parts. Returns {task: first problem}. Raises Unavailable if the store is away."""
    problems: dict[str, str] = {}
    tasks = len({part.task for part in parts.values()})
    logger.info("%s, %s of archives", plural(tasks, "task"), plural(len(parts), "part"))
    with Progress("vtab", total=len(parts)) as progress:
        for outcome in workqueue.run(parts, build_part, receipts=receipts, summary=count_rows):
            task = parts[outcome.name].task
            if isinstance(outcome.error, Unavailable):
                raise outcome.error
            if outcome.error:  # the other parts of an incomplete archive report the same
                problems.setdefault(task, str(outcome.error))
                progress.advance(1, f"{task}: failed")
            else:
                progress.advance(1, f"{task}: {plural(outcome.summary, 'image')}")
    return problems


def _explain_splits(plan: TaskPlan, problems: dict[str, str]) -> list[str]:
    rest = [split for split in (*plan.examples, *plan.problems) if split not in problems]
    remedy = f"; --splits {' '.join(rest)} skips it" if rest else ""
    return [f"{plan.task}, split {split}: {problem}{remedy}" for split, problem in problems.items()]


def _remove_receipts(receipts: workqueue.Receipts, task: str) -> None:
    for name in receipts.finished():
        if name.rsplit("-", 2)[0] == task:
            storage.remove(receipts.uri(name))


# ---------------------------------------------------------------- missing files


def _missing_files(requests: Sequence[Request], raw: str, download: bool) -> dict[str, str]:
    """{data set: its missing files}. With `download`, files that have a URL are downloaded first."""
    problems = {}
    for group in by_dataset([request for request in requests if find_layout(request)[0] == "archives"]):
        dataset = group[0].entry.dataset
        try:
            missing = archives.locate(raw, dataset)[1]
            if download and missing:
                for file in missing:
                    if file.url:
                        archives.download(raw, dataset, file)
                missing = archives.locate(raw, dataset)[1]
        except UserError as error:
            problems[dataset] = f"{', '.join(request.task for request in group)}: {error}"
            continue
        if missing:
            hint = (
                "; --download downloads those that have a URL" if not download and any(f.url for f in missing) else ""
            )
            files = "".join(f"\n  {storage.join(raw, dataset)}/{archives.describe_file(file)}" for file in missing)
            count = f"{len(missing)} files are missing" if len(missing) > 1 else "1 file is missing"
            problems[dataset] = f"{', '.join(request.task for request in group)}: {count}{hint}:{files}"
    return problems
