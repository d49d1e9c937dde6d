"""Units of work -> receipts on storage: whatever a stopped job has finished is not done again.

A *unit* is a picklable description of some work, under a name of its own; its *receipt* is the JSON that says what came of
it. The receipt is written last, so a unit without one is done (again) from its start, and a unit with one never.

    receipts = Receipts("s3://bucket/photos/_work")
    for outcome in run({"unit-00000": unit, ...}, work, receipts=receipts, context=plan):
        if outcome.error: ...
    everything = receipts.read(names)

`work` is a function `work(unit, context) -> receipt`, or a class `Work(context)` whose instances are called with one unit and
live in an actor each (a model on a GPU). Units run on Ray Data, which joins Ray when there is work (`pipeline.cluster`); large
data never passes through Ray's object store, since units read and write storage themselves.
"""

import contextlib
import inspect
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline import cluster, logs, storage
from pipeline.errors import UserError

TASK_SIZE = 256 << 20  # input bytes that one task holds at most when it takes several units: some seconds of work
TASK_UNITS = 4  # units that one task takes at most

_ray_allowed = True


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Until the block ends, all work of this process is done here, one unit after the other: for tests and for a debugger."""
    global _ray_allowed
    before, _ray_allowed = _ray_allowed, False
    try:
        yield
    finally:
        _ray_allowed = before


def uses_ray() -> bool:
    """Whether work may go to Ray: not inside `without_ray`."""
    return _ray_allowed


class Receipts:
    """The receipts in a folder: one file `NAME.json` for every finished unit."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def uri(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.json")

    def finished(self) -> set[str]:
        """Names of the units that have a receipt, from one listing."""
        files = storage.list_files(self.folder, recursive=False)
        return {file.path.removesuffix(".json") for file in files if file.path.endswith(".json")}

    def write(self, name: str, receipt: Any) -> None:
        storage.write_json(self.uri(name), receipt)

    def read(self, names: Sequence[str]) -> list[Any]:
        """The receipts of `names`, in their order. Raises FileNotFoundError for a unit that is not finished."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda name: storage.read_json(self.uri(name)), names))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a unit: the summary of its receipt, or the error that kept it from having one."""

    name: str
    summary: Any = None
    error: UserError | None = None
    records: list[logging.LogRecord] = field(default_factory=list)
    """What the worker logged."""


def run(
    units: Mapping[str, Any],
    work: Callable[..., Any],
    *,
    receipts: Receipts | None = None,
    context: Any = None,
    summary: Callable[[Any], Any] = lambda receipt: receipt,
    size: Callable[[Any], int] | None = None,
    workers: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    in_process: bool = False,
) -> Iterator[Outcome]:
    """Works through the units that have no receipt yet; yields an Outcome for each as it ends, in no particular order.

    context: what all units need; sent to every node once. summary: what of a receipt comes back to the driver.
    size: input bytes of a unit; small ones then share a task. workers: actors, for a class; None: one per unit, at most what
    the cluster has room for. in_process: here, one after the other, without Ray.
    A UserError of a unit is its outcome and does not stop the others; any other exception ends the generator.
    """
    finished = receipts.finished() if receipts is not None else set()
    todo = {name: unit for name, unit in units.items() if name not in finished}
    if not todo:
        return
    if in_process or not _ray_allowed:
        call = _bind(work, context)
        for name, unit in todo.items():
            yield _outcome(name, unit, call, receipts, summary, capture=False)
        return
    for outcome in _run_on_ray(todo, work, receipts, context, summary, size, workers, num_cpus, num_gpus):
        logs.replay(outcome.records)
        yield outcome


def map_tasks(function: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """`map`, in order, as Ray tasks; one or two arguments run here, since they are not worth a process.

    For looking at many files before the work is known. An exception is raised as it was in the task.
    """
    if len(arguments) <= 2 or not _ray_allowed:
        return [function(argument) for argument in arguments]
    import ray

    cluster.connect()
    try:
        return ray.get([ray.remote(function).remote(argument) for argument in arguments])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


# ---------------------------------------------------------------- one unit


def _bind(work: Any, context: Any) -> Callable[[Any], Any]:
    constructor: Any = work
    if inspect.isclass(work):
        return constructor(context)
    return lambda unit: work(unit, context)


def _outcome(
    name: str,
    unit: Any,
    call: Callable[[Any], Any],
    receipts: Receipts | None,
    summary: Callable[[Any], Any],
    capture: bool = True,
) -> Outcome:
    try:
        if receipts is not None and storage.exists(receipts.uri(name)):  # another job with the same output was faster
            return Outcome(name=name, summary=summary(storage.read_json(receipts.uri(name))))
        if capture:
            with logs.captured() as records:
                receipt = call(unit)
        else:
            records, receipt = [], call(unit)
        if receipts is not None:
            try:
                receipts.write(name, receipt)
            except OSError as error:
                raise UserError(
                    f"{receipts.folder}: cannot be written ({error}); make room and run it again"
                ) from error
        return Outcome(name=name, summary=summary(receipt), records=records)
    except UserError as error:
        return Outcome(name=name, error=error)


# ---------------------------------------------------------------- all units, on Ray Data


def data_context() -> Any:
    """Joins Ray; returns Ray Data's context with Ray Data's own progress bars and notes switched off."""
    import ray

    cluster.connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


def _run_on_ray(
    todo: dict[str, Any],
    work: Callable[..., Any],
    receipts: Receipts | None,
    context: Any,
    summary: Callable[[Any], Any],
    size: Callable[[Any], int] | None,
    workers: int | None,
    num_cpus: float,
    num_gpus: float,
) -> Iterator[Outcome]:
    import pyarrow as pa
    import ray

    data_context()
    names = list(todo)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    sizes = [size(unit) for unit in todo.values()] if size else [TASK_SIZE] * len(names)
    blocks = [
        pa.table({"name": [names[i] for i in share], "unit": [pickle.dumps(todo[names[i]]) for i in share]})
        for share in shares(sizes, cpus)
    ]
    # In a list, because Ray replaces a bare reference among the arguments by a copy of the value for every actor.
    arguments = {"work": work, "context": [ray.put(context)], "receipts": receipts, "summary": summary}
    rows = ray.data.from_arrow(blocks)
    if inspect.isclass(work):
        actor: Any = _Actor
        count = min(workers or len(names), len(names))
        done = rows.map_batches(
            actor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_kwargs=arguments,
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
    else:
        task: Any = _task
        done = rows.map_batches(
            task, batch_size=None, batch_format="pyarrow", fn_kwargs=arguments, num_cpus=num_cpus, num_gpus=num_gpus
        )
    for row in done.iter_rows():
        yield pickle.loads(row["outcome"])


def shares(sizes: Sequence[int], cpus: int) -> list[list[int]]:
    """The units of each task, as positions in `sizes`.

    Ray Data takes up to 0.3 s to start the next task on a free CPU. So while many units are left a task takes several small
    ones, and at the end one each, so that all CPUs end together. cpus: 0 on a cluster that has none yet: its autoscaler counts
    tasks.
    """
    tasks, first = [], 0
    while first < len(sizes):
        several = (len(sizes) - first) // (2 * cpus) if cpus else 1
        share = list(range(first, min(len(sizes), first + max(1, min(TASK_UNITS, several)))))
        while len(share) > 1 and sum(sizes[i] for i in share) > TASK_SIZE:
            share.pop()
        tasks.append(share)
        first += len(share)
    return tasks


class _Actor:
    """Keeps an instance of the work's class for many units."""

    def __init__(self, work: Any, context: list[Any], receipts: Receipts | None, summary: Callable[[Any], Any]) -> None:
        import ray

        self.call = _bind(work, ray.get(context[0]))
        self.receipts, self.summary = receipts, summary

    def __call__(self, batch: Any) -> Any:
        return _work_through(batch, self.call, self.receipts, self.summary)


def _task(batch: Any, work: Any, context: list[Any], receipts: Receipts | None, summary: Callable[[Any], Any]) -> Any:
    import ray

    return _work_through(batch, _bind(work, ray.get(context[0])), receipts, summary)


def _work_through(
    batch: Any, call: Callable[[Any], Any], receipts: Receipts | None, summary: Callable[[Any], Any]
) -> Any:
    """A table of units -> a table of outcomes. A UserError travels as a value: Ray Data would wrap it beyond recognition."""
    import pyarrow as pa

    outcomes = [
        _outcome(name, pickle.loads(unit), call, receipts, summary)
        for name, unit in zip(batch["name"].to_pylist(), batch["unit"].to_pylist(), strict=True)
    ]
    return pa.table({"outcome": [pickle.dumps(outcome) for outcome in outcomes]})
