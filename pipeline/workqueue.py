"""Resumable work: units of work with receipts on storage, so that a stopped job does not repeat finished units.

A *unit* is a picklable description of some work, with a unique name. Its *receipt* is a JSON file with the result. The
receipt is written last: a unit without a receipt is done from its start, and a unit with a receipt is skipped.

    receipts = Receipts("s3://bucket/photos/_work")
    for outcome in run({"unit-00000": unit, ...}, work, receipts=receipts, context=plan):
        if outcome.error: ...
    everything = receipts.read(names)

`work` is a function `work(unit, context) -> receipt`, or a class `Work(context)` whose instances are actors that are
called with one unit at a time (for example with a model on a GPU). Units run on Ray Data, which connects to Ray when
there is work (`pipeline.cluster`). Units read and write storage themselves, so
large data does not pass through Ray's object store."""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import cluster, host_memory, logs, metrics, storage
from pipeline.errors import JobFailed, UserError
from pipeline.stores import expect_answers

TASK_SIZE = 256 << 20  # maximum input bytes of a task with several units; some seconds of work
TASK_UNITS = 4  # maximum number of units per task
MAX_SHUFFLE_OBJECTS = 50_000  # of a shuffle: one for every task and bucket, each costs the driver some KB
ACTOR_RESTARTS = 5  # restarts per actor; by default Ray Data restarts a dead actor forever, silently

# A receipt is {"sha256": "...", "receipt": ...}, where sha256 is the checksum of the text of the receipt.
_BEFORE, _BETWEEN, _DIGITS = b'{"sha256": "', b'", "receipt": ', 64

_ray_allowed = True


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Runs all work inside the block in this process, one unit after another, for tests and debugging."""
    global _ray_allowed
    before, _ray_allowed = _ray_allowed, False
    try:
        yield
    finally:
        _ray_allowed = before


def uses_ray() -> bool:
    """Whether work may use Ray; False inside `without_ray`."""
    return _ray_allowed


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


class Receipts:
    """The receipts in a folder, with one file `NAME.json` for every finished unit."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def uri(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.json")

    def finished(self) -> set[str]:
        """Names of the units with a receipt, from one listing."""
        files = storage.list_files(self.folder, recursive=False)
        return {file.path.removesuffix(".json") for file in files if file.path.endswith(".json")}

    def write(self, name: str, receipt: Any) -> None:
        text = json.dumps(receipt).encode()
        storage.write_bytes(self.uri(name), b"%s%s%s%s}\n" % (_BEFORE, _checksum(text), _BETWEEN, text))

    def read(self, names: Sequence[str]) -> list[Any]:
        """The receipts of `names`, in order. Raises FileNotFoundError for an unfinished unit. Removes a damaged receipt
        and raises UserError; the next run then repeats its unit."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self._read, names))

    def _read(self, name: str) -> Any:
        data = storage.read_bytes(self.uri(name))
        start = len(_BEFORE) + _DIGITS
        text = data[start + len(_BETWEEN) : -2]
        if data != b"%s%s%s%s}\n" % (_BEFORE, _checksum(text), _BETWEEN, text):
            storage.remove(self.uri(name))
            raise UserError(f"{self.uri(name)}: damaged receipt, now removed; repeat the command to redo this unit")
        return json.loads(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of a unit: the summary of its receipt, or its error."""

    name: str
    summary: Any = None
    error: UserError | None = None
    records: list[logging.LogRecord] = field(default_factory=list)
    """Log records of the worker."""


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
) -> Iterator[Outcome]:
    """Runs the units without a receipt. Yields the Outcome of each unit when it ends, in any order.

    context: data for all units, which is sent to every node once. summary: extracts the part of a receipt that is
    returned to the driver. size: input bytes of a unit; small units share a task. workers: number of actors, for a
    class; None: one per unit, at most as many as fit on the cluster. num_cpus, num_gpus: resources of each task or
    actor. Inside `without_ray` the units run in this process. The UserError of a unit becomes its outcome and does not
    stop the others. Any other exception ends the generator: JobFailed if processes died repeatedly."""
    finished = receipts.finished() if receipts is not None else set()
    todo = {name: unit for name, unit in units.items() if name not in finished}
    if not todo:
        return
    job = _Job(work, receipts, summary)
    if not _ray_allowed:
        call = job.bind(context)
        for name, unit in todo.items():
            yield job.outcome(name, unit, call)
        return
    sizes = [size(unit) for unit in todo.values()] if size else [TASK_SIZE] * len(todo)
    resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    done, failed = len(units) - len(todo), 0
    where = receipts.folder if receipts is not None else work.__name__
    for outcome in _run_on_ray(todo, sizes, job, context, resources, workers or len(todo)):
        logs.replay(outcome.records)
        done, failed = (done, failed + 1) if outcome.error else (done + 1, failed)
        counts = {metrics.UNITS: len(units), metrics.UNITS_DONE: done, metrics.UNITS_FAILED: failed}
        metrics.publish(counts, run=where)
        yield outcome


def map_tasks(function: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """Maps a function over arguments with Ray tasks, in order, for example to scan many files. One or two arguments are
    processed in this process. Raises the exceptions of the tasks."""
    if len(arguments) <= 2 or not _ray_allowed:
        return [function(argument) for argument in arguments]
    import ray

    cluster.connect()
    with errors_of_tasks():
        return ray.get([ray.remote(function).remote(argument) for argument in arguments])


def run_growing(
    root: Any,
    work: Callable[[Any, Any, bool], dict[str, Any]],
    *,
    receipts: Receipts,
    context: Any = None,
    tasks: int = 16,
    num_cpus: float = 1,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs a unit and the units that it and they leave, with at most `tasks` Ray tasks at a time, and yields (name,
    receipt) of each unit, also of those that an earlier run finished.

    work: `work(unit, context, idle) -> receipt`; receipt["rest"] has the units that are left. Units are values of JSON,
    whose names are their hashes (`unit_name`), so `work` must leave the same unit only once. idle: whether there are
    fewer units than tasks, so that a unit should soon leave several. Inside `without_ray` the units run in this process.
    Raises the exceptions of the tasks, JobFailed if processes died repeatedly."""
    todo: deque[Any] = deque()
    finished, opened = receipts.finished(), [root]
    while opened:
        names = [unit_name(unit) for unit in opened]
        todo.extend(unit for unit, name in zip(opened, names, strict=True) if name not in finished)
        there = [name for name in names if name in finished]
        opened = []
        for first in range(0, len(there), 256):
            for name, receipt in zip(
                there[first : first + 256], receipts.read(there[first : first + 256]), strict=True
            ):
                opened += receipt["rest"]
                yield name, receipt
    grow = _grow_in_process if not _ray_allowed else functools.partial(_grow_on_ray, tasks=tasks, num_cpus=num_cpus)
    for unit, receipt in grow(todo, (work, receipts, context)):
        todo.extend(receipt["rest"])
        yield unit_name(unit), receipt


def unit_name(unit: Any) -> str:
    """The name of a unit of `run_growing`."""
    return hashlib.sha256(json.dumps(unit).encode()).hexdigest()[:24]


def _grow_in_process(todo: deque[Any], job: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    while todo:
        unit = todo.popleft()
        yield unit, _grow(job, unit, not todo)


def _grow_on_ray(todo: deque[Any], job: Any, tasks: int, num_cpus: float) -> Iterator[tuple[Any, dict[str, Any]]]:
    import ray

    if not todo:
        return
    cluster.connect()
    shared = [
        ray.put(job)
    ]  # in a list, so that Ray does not replace the reference by a copy of the value for each task
    remote = ray.remote(_grow_task).options(num_cpus=num_cpus)
    running: dict[Any, Any] = {}
    try:
        while todo or running:
            while todo and len(running) < tasks:
                idle = len(todo) + len(running) < tasks
                unit = todo.popleft()
                running[remote.remote(shared, unit, idle)] = unit
            with errors_of_tasks():
                [ready], _ = ray.wait(list(running), num_returns=1)
                receipt, records = ray.get(ready)
            logs.replay(records)
            yield running.pop(ready), receipt
    finally:
        for reference in running:
            ray.cancel(reference)


def _grow_task(shared: list[Any], unit: Any, idle: bool) -> tuple[dict[str, Any], list[logging.LogRecord]]:
    import ray

    expect_answers()
    with logs.captured() as records:
        receipt = _grow(ray.get(shared[0]), unit, idle)
    return receipt, records


def _grow(job: Any, unit: Any, idle: bool) -> dict[str, Any]:
    work, receipts, context = job
    receipt = work(unit, context, idle)
    _write_receipt(receipts, unit_name(unit), receipt)
    return receipt


# ---------------------------------------------------------------- one unit


@dataclass(frozen=True, slots=True)
class _Job:
    """The settings that all units share, except for the context."""

    work: Callable[..., Any]
    receipts: Receipts | None
    summary: Callable[[Any], Any]

    def bind(self, context: Any) -> Callable[[Any], Any]:
        """The work as a function of a unit."""
        constructor: Any = self.work
        if inspect.isclass(self.work):
            return constructor(context)
        return lambda unit: self.work(unit, context)

    def outcome(self, name: str, unit: Any, call: Callable[[Any], Any]) -> Outcome:
        try:
            if self.receipts is not None and storage.exists(self.receipts.uri(name)):
                # another job with the same output finished the unit first
                return Outcome(name=name, summary=self.summary(self.receipts.read([name])[0]))
            receipt = call(unit)
            if self.receipts is not None:
                _write_receipt(self.receipts, name, receipt)
            return Outcome(name=name, summary=self.summary(receipt))
        except UserError as error:
            return Outcome(name=name, error=error)


def _write_receipt(receipts: Receipts, name: str, receipt: Any) -> None:
    try:
        receipts.write(name, receipt)
    except OSError as error:
        raise storage.not_written(receipts.folder, error) from error


# ---------------------------------------------------------------- all units, on Ray Data


def data_context() -> Any:
    """Connects to Ray, and returns Ray Data's context with its progress bars and messages disabled."""
    import ray

    cluster.connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # failures are raised
    return context


def prepare_shuffle(input_bytes: int, buckets: int) -> None:
    """Connects to Ray, and sets the input bytes of each task of a shuffle in Ray Data's context: at most Ray's default of
    1 GiB, and enough that tasks x buckets is at most MAX_SHUFFLE_OBJECTS."""
    each = input_bytes * buckets // MAX_SHUFFLE_OBJECTS
    data_context().shuffle_input_batch_bytes = min(1 << 30, max(4 << 20, each))


def _run_on_ray(
    todo: dict[str, Any], sizes: list[int], job: _Job, context: Any, resources: dict[str, float], workers: int
) -> Iterator[Outcome]:
    import pyarrow as pa
    import ray
    from ray.util.annotations import RayDeprecationWarning

    data_context()
    names = list(todo)
    blocks = [
        pa.table({"name": [names[i] for i in share], "unit": [pickle.dumps(todo[names[i]]) for i in share]})
        for share in group_units(sizes, int(ray.cluster_resources().get("CPU", 0)))
    ]
    # In a list, because Ray would replace a direct reference in the arguments by a copy of the value for every actor.
    arguments = {"job": job, "context": [ray.put(context)]}
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", **resources}
    if inspect.isclass(job.work):
        options |= {"fn_constructor_kwargs": arguments}
        options |= {"compute": ray.data.ActorPoolStrategy(size=min(workers, len(names)))}
        retries = {"max_restarts": ACTOR_RESTARTS, "max_task_retries": ACTOR_RESTARTS}
        options |= {"ray_remote_args_fn": functools.partial(dict, retries)}
    else:
        options |= {"fn_kwargs": arguments}
    function: Any = _Actor if inspect.isclass(job.work) else _task
    with errors_of_tasks():
        with warnings.catch_warnings():  # no other argument of Ray 2.60 sets the restarts of actors
            warnings.simplefilter("ignore", RayDeprecationWarning)
            inputs = ray.data.from_blocks(blocks)  # `from_arrow` would start a task for each block
            results = inputs.map_batches(function, **options)
            results.context.target_max_block_size = 1  # every outcome is a block, which a task returns when it is done
        for row in results.iter_rows():
            yield pickle.loads(row["outcome"])


@contextlib.contextmanager
def errors_of_tasks() -> Iterator[None]:
    """Raises the exception of a failed Ray task itself, and JobFailed if processes died repeatedly."""
    import ray

    lost = (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError, ray.exceptions.RayActorError)
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise error.cause from error  # with the traceback of the task
    except lost as error:
        raise JobFailed(describe_lost(error)) from None


def describe_lost(error: Exception) -> str:
    """One line for a process that died more often than Ray restarts it."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if out_of_memory := host_memory.describe_out_of_memory(str(error)):
        first = f"{out_of_memory}, repeatedly"
    return f"{first}; the same command continues with the unfinished work. {cluster.memory_remedy()}"


def group_units(sizes: Sequence[int], cpus: int) -> list[list[int]]:
    """The units of each task, as positions in `sizes`.

    Ray Data needs up to 0.3 s to start the next task on a free CPU. Therefore tasks have several small units at first,
    and one unit each at the end, so that all CPUs finish at about the same time. cpus: 0 on a cluster without CPUs yet,
    whose autoscaler counts tasks."""
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
    """An actor with an instance of the work's class."""

    def __init__(self, job: _Job, context: list[Any]) -> None:
        import ray

        expect_answers()
        self.job, self.call = job, job.bind(ray.get(context[0]))

    def __call__(self, batch: Any) -> Iterator[Any]:
        yield from _work_through(batch, self.job, self.call)


def _task(batch: Any, job: _Job, context: list[Any]) -> Iterator[Any]:
    import ray

    expect_answers()
    yield from _work_through(batch, job, job.bind(ray.get(context[0])))


def _work_through(batch: Any, job: _Job, call: Callable[[Any], Any]) -> Iterator[Any]:
    """Maps a table of units to tables with an outcome each. A UserError is returned as a value, because Ray Data would
    wrap it."""
    import pyarrow as pa

    for name, unit in zip(batch["name"].to_pylist(), batch["unit"].to_pylist(), strict=True):
        with logs.captured() as records:
            outcome = job.outcome(name, pickle.loads(unit), call)
        yield pa.table({"outcome": [pickle.dumps(replace(outcome, records=records))]})
