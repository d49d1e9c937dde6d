"""Many fine-tunings on few devices: what is left to do, who does it, and where the results are.

A job is one training of one task (or one probe). Its result is a JSON file, so what remains is a function of the files: a
run that was stopped anywhere continues, and learning rates that were compared lead to the final trainings by themselves.
Workers are Ray actors that keep the checkpoint loaded and take jobs one after the other, the longest first.
"""

import io
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from models import probes
from pipeline import storage
from pipeline.config import fingerprint
from pipeline.errors import UserError
from pipeline.transfer import finetune
from pipeline.transfer.suites import L2_GRID, FineTune, Probe, Task

STARVED = 30.0  # seconds
CONFUSION_CLASSES = 20  # confusion matrices are kept up to this many classes


# ---------------------------------------------------------------- jobs and results


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One unit of work. Phase "tune" trains on the tuning part and scores the validation part; "final" is for the table."""

    task: Task
    phase: Literal["tune", "final"] = "final"
    lr: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        lr = f"-lr{self.lr:g}" if self.lr else ""
        return f"{self.task.name}/{self.phase}{lr}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a job found. `accuracy` is top-1 in percent: under "" for one number, under the shots for few-shot."""

    task: str
    phase: str
    lr: float
    seed: int
    accuracy: dict[str, float]
    images: int  # that were scored
    seconds: float
    images_per_second: float = 0.0  # while training
    curve: list[list[float]] = field(default_factory=list)  # (step, loss, lr)
    confusion: list[list[int]] | None = None  # rows: label, columns: prediction
    details: dict[str, Any] = field(default_factory=dict)
    host: str = ""


class Store:
    """Results as files: results/<task>/<job>.json, the predictions beside them, failures/<task>/<job>.json."""

    def __init__(self, output: str) -> None:
        self.output = output

    def _uri(self, kind: str, job: Job, ending: str) -> str:
        return storage.join(self.output, kind, f"{job.name}.{ending}")

    def load_all(self) -> dict[str, Result]:
        """Every result by job name. One whose file is damaged does not count, with a warning: it is computed again."""
        folder = storage.join(self.output, "results")
        names = {f.name for f in fields(Result)}
        found = {}
        for file in storage.list_files(folder):
            if file.path.endswith(".json"):
                try:
                    values = storage.read_json(file.uri)
                    checksum = values.pop("checksum", None)
                    if checksum and checksum != fingerprint(values):
                        raise UserError(f"{file.uri}: its checksum differs")
                    result = Result(**{k: v for k, v in values.items() if k in names})
                except (UserError, TypeError, AttributeError) as error:
                    print(f"warning: {file.uri} is damaged and will be computed again ({error})", file=sys.stderr)
                    continue
                found[file.path.removesuffix(".json")] = result
        return found

    def save(self, job: Job, result: Result, predictions: bytes | None) -> None:
        if predictions is not None:
            storage.write_bytes(self._uri("predictions", job, "parquet"), predictions)
        values = json.loads(json.dumps(asdict(result)))  # as they will be read
        storage.write_json(self._uri("results", job, "json"), {**values, "checksum": fingerprint(values)})
        storage.remove(self._uri("failures", job, "json"))

    def fail(self, job: Job, error: str) -> None:
        storage.write_json(self._uri("failures", job, "json"), {"job": job.name, "error": error})

    def predictions(self, job: Job) -> finetune.Predictions:
        return self._unpack(job, unpack_predictions)

    def hits(self, job: Job) -> "Hits":
        """What few-shot keeps in the place of predictions."""
        return self._unpack(job, unpack_hits)

    def _unpack(self, job: Job, unpack: Callable[[bytes], Any]) -> Any:
        """Raises UserError for a file that is gone or damaged, and forgets its job's result, which leads to a new one."""
        uri = self._uri("predictions", job, "parquet")
        try:
            return unpack(storage.read_bytes(uri))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            storage.remove(self._uri("results", job, "json"))
            raise UserError(f"{uri}: missing or damaged ({error}); run the command again to compute it anew") from error


def next_jobs(task: Task, seeds: int, results: Mapping[str, Result]) -> list[Job]:
    """The jobs of a task that can start now and have no result: a pure function, which is all that resuming needs.

    Several learning rates: each is tried once (seed 0), and when all are known the best trains with every seed. Ties go to
    the smaller rate.
    """
    if isinstance(task.protocol, Probe):
        probes = [Job(task=task, seed=seed) for seed in range(1 if task.protocol.kind == "knn" else seeds)]
        return [job for job in probes if job.name not in results]
    lrs = sorted(task.protocol.lrs)
    if len(lrs) > 1:
        trials = [Job(task=task, phase="tune", lr=lr) for lr in lrs]
        missing = [job for job in trials if job.name not in results]
        if missing:
            return missing
        lr = max(trials, key=lambda job: (results[job.name].accuracy[""], -job.lr)).lr
    else:
        lr = lrs[0]
    finals = [Job(task=task, lr=lr, seed=seed) for seed in range(seeds)]
    return [job for job in finals if job.name not in results]


def final_jobs(task: Task, seeds: int, results: Mapping[str, Result]) -> list[Job]:
    """The finished final jobs of a task, by seed."""
    kept = {name: result for name, result in results.items() if result.task != task.name or result.phase == "tune"}
    wanted = [job for job in next_jobs(task, seeds, kept) if job.phase == "final"]
    return [job for job in wanted if job.name in results]


def total_jobs(task: Task, seeds: int) -> int:
    if isinstance(task.protocol, Probe):
        return 1 if task.protocol.kind == "knn" else seeds
    return seeds + (len(task.protocol.lrs) if len(task.protocol.lrs) > 1 else 0)


def cost(task: Task, model_config: dict[str, Any], test_images: int) -> float:
    """Estimated FLOPs of one job, to start the longest first."""
    from models.cost import flops

    if isinstance(task.protocol, Probe):
        return float(test_images)
    forward = flops({**model_config, "image_size": task.protocol.resolution})
    return float(forward) * (3 * task.protocol.steps * task.protocol.batch_size + test_images)


# ---------------------------------------------------------------- the worker


def build_model(config: dict[str, Any], weights: Mapping[str, np.ndarray]) -> nn.Module:
    """The pre-trained model from its configuration and the arrays that Ray shares between processes (read-only)."""
    from models import create_model

    model = create_model(**config)
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return model


class Worker:
    """A process with one device (or share of one), the checkpoint in memory, and one job at a time."""

    def __init__(self, config: dict[str, Any], weights: list[Any], threads: int, micro_batch: int) -> None:
        import ray

        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.threads, self.micro_batch = threads, micro_batch
        self.model = build_model(config, ray.get(weights[0]))
        self.state: tuple[int, int, float] = (0, 0, math.nan)

    def progress(self) -> tuple[int, int, float]:
        """(step, steps, loss) of the job that is running; answers while it runs."""
        return self.state

    def run(self, job: Job, features: tuple[str, str] | None) -> tuple[Result, bytes | None]:
        torch.set_num_threads(self.threads)  # of this thread: OpenMP keeps the number per thread
        self.state = (0, 0, math.nan)
        if isinstance(job.task.protocol, Probe):
            assert features is not None
            return run_probe(job, *features, device=self.device)
        return run_finetune(
            job,
            self.model,
            device=self.device,
            threads=self.threads,
            micro_batch=self.micro_batch,
            progress=lambda *state: setattr(self, "state", state),
        )


def run_finetune(
    job: Job,
    model: nn.Module,
    *,
    device: str,
    threads: int,
    micro_batch: int,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[Result, bytes | None]:
    """Trains and scores. A learning rate that diverges while being compared scores 0; in a final training it is an error."""
    task, start = job.task, time.perf_counter()
    assert isinstance(task.protocol, FineTune)
    train_split, test_split = (task.tune or (task.train, task.test)) if job.phase == "tune" else (task.train, task.test)
    train, test = train_split.open(), test_split.open()
    about: dict[str, Any] = {"task": task.name, "phase": job.phase, "lr": job.lr, "seed": job.seed, "host": _host()}
    try:
        tuned = finetune.fine_tune(
            model,
            train,
            train_split,
            task.protocol,
            num_classes=2 if task.parity else len(train.classes),
            lr=job.lr,
            seed=job.seed,
            device=device,
            micro_batch=micro_batch,
            threads=threads,
            parity=task.parity,
            progress=progress,
        )
    except finetune.Diverged as error:
        if job.phase == "final":
            raise
        seconds = time.perf_counter() - start
        details = {"diverged": str(error)}
        return Result(**about, accuracy={"": 0.0}, images=0, seconds=seconds, details=details), None
    found = finetune.predict(
        tuned.model,
        test,
        test_split,
        resolution=task.protocol.resolution,
        device=device,
        batch_size=4 * micro_batch,
        threads=threads,
        parity=task.parity,
    )
    result = Result(
        **about,
        accuracy={"": found.accuracy()},
        images=int(found.labelled().sum()),
        seconds=time.perf_counter() - start,
        images_per_second=tuned.images_per_second,
        curve=[list(row) for row in tuned.curve],
        confusion=confusion(found, 2 if task.parity else len(test.classes)),
    )
    return result, pack_predictions(found) if job.phase == "final" else None


def run_probe(job: Job, train_folder: str, test_folder: str, device: str) -> tuple[Result, bytes | None]:
    """Few-shot, linear probe or k-NN on feature sets."""
    from pipeline.transfer import features

    start, probe = time.perf_counter(), job.task.protocol
    assert isinstance(probe, Probe)
    _, train_labels, train = features.load(train_folder)
    keys, test_labels, test = features.load(test_folder)
    known = train_labels >= 0
    train_labels, train = train_labels[known], train[torch.from_numpy(known)]
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    labels, train, test = torch.from_numpy(train_labels).to(device), train.to(device), test.to(device)
    found = finetune.Predictions(keys, test_labels, np.zeros(len(keys), np.int64))
    accuracy: dict[str, float] = {}
    details: dict[str, Any] = {}
    if probe.kind == "fewshot":
        right: dict[int, np.ndarray] = {}
        for shots in probe.shots:
            picked = torch.from_numpy(probes.select_shots(train_labels, shots, job.seed)).to(device)
            guesses = probes.ridge(train[picked], labels[picked], test, classes, L2_GRID).cpu().numpy()
            # every l2, because which one counts may depend on all tasks together
            right[shots] = np.stack([finetune.Predictions(keys, test_labels, row).correct() for row in guesses])
        hits = Hits(keys, found.labelled(), right)
        details |= {str(shots): [hits.accuracy(shots, i) for i in range(len(L2_GRID))] for shots in probe.shots}
        packed = pack_hits(hits)
    else:
        if probe.kind == "linear":
            guess, details["l2"] = probes.linear_probe(train, labels, test, classes, seed=job.seed)
        else:
            guess = probes.nearest_neighbours(train, labels, test, classes)
        found.classes = guess.cpu().numpy()
        accuracy[""] = found.accuracy()
        packed = pack_predictions(found)
    result = Result(
        task=job.task.name,
        phase=job.phase,
        lr=0.0,
        seed=job.seed,
        accuracy=accuracy,
        images=int(found.labelled().sum()),
        seconds=time.perf_counter() - start,
        confusion=confusion(found, classes) if accuracy else None,
        details=details,
        host=_host(),
    )
    return result, packed


def confusion(found: finetune.Predictions, classes: int) -> list[list[int]] | None:
    if classes > CONFUSION_CLASSES or found.labels.ndim > 1:
        return None
    counts = np.zeros((classes, classes), np.int64)
    known = found.labelled()
    np.add.at(counts, (found.labels[known], found.classes[known]), 1)
    return counts.tolist()


def pack_predictions(found: finetune.Predictions) -> bytes:
    labels = found.labels[:, None] if found.labels.ndim == 1 else found.labels
    lists = pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1), pa.int64()), labels.shape[1])
    sink = io.BytesIO()
    table = pa.table({"key": found.keys, "labels": lists, "prediction": found.classes})
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def unpack_predictions(data: bytes) -> finetune.Predictions:
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    labels = np.array(table["labels"].to_pylist(), np.int64)
    classes = table["prediction"].to_numpy()
    return finetune.Predictions(table["key"].to_pylist(), labels[:, 0] if labels.shape[1] == 1 else labels, classes)


@dataclass(slots=True)
class Hits:
    """Which test images few-shot got right: shots -> bool (l2, N)."""

    keys: list[str]
    labelled: np.ndarray
    right: dict[int, np.ndarray]

    def accuracy(self, shots: int, l2: int, without: frozenset[str] = frozenset()) -> float:
        """Top-1 in percent for the l2 at position `l2`, over the labelled images whose key is not in `without`."""
        counts = self.labelled
        if without:
            counts = counts & np.array([key not in without for key in self.keys])
        return 100.0 * float(self.right[shots][l2][counts].mean()) if counts.any() else math.nan


def pack_hits(hits: Hits) -> bytes:
    """Parquet with a bit for every l2, 4 bytes an image and number of shots."""
    columns: dict[str, Any] = {"key": hits.keys, "labelled": hits.labelled}
    for shots, right in hits.right.items():
        bits = np.packbits(right, axis=0).T
        columns[f"shots-{shots}"] = pa.array(map(bytes, bits), pa.binary(bits.shape[1]))
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    return sink.getvalue()


def unpack_hits(data: bytes) -> Hits:
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    right = {}
    for name in table.column_names[2:]:
        packed = np.frombuffer(b"".join(table[name].to_pylist()), np.uint8).reshape(len(table), -1)
        right[int(name.removeprefix("shots-"))] = np.unpackbits(packed, axis=1, count=len(L2_GRID)).T.astype(bool)
    return Hits(table["key"].to_pylist(), table["labelled"].to_numpy(zero_copy_only=False), right)


def _host() -> str:
    import platform

    return platform.node()


# ---------------------------------------------------------------- the pool


@dataclass(slots=True)
class Running:
    """A job in a worker's hands."""

    job: Job
    worker: Any
    started: float
    attempt: int
    progress: tuple[int, int, float] = (0, 0, math.nan)
    asked: Any = None  # pending answer to "how far are you"
    answered: bool = False

    @property
    def starved(self) -> bool:
        """Its process has not come up for a while: perhaps it waits for CPUs or GPUs that idle workers hold."""
        return not self.answered and time.monotonic() - self.started > STARVED


def fan_out(
    tasks: Sequence[Task],
    seeds: int,
    results: dict[str, Result],
    *,
    make_worker: Callable[[], Any],
    workers: int,
    retries: int,
    costs: Mapping[str, float],
    features: Mapping[str, tuple[str, str]],
    on_result: Callable[[Job, Result, bytes | None], None],
    on_failure: Callable[[Job, str], None],
    started: Sequence[Any] = (),
    on_tick: Callable[[list[Running]], None] = lambda running: None,
) -> dict[str, str]:
    """Runs everything that is left; returns {job name: error} of what failed.

    `results` grows as jobs finish. A job that raises fails at once (it would again); a job whose process or machine died is
    started again up to `retries` times. A failed job stops its own task, never the others. Workers are started only as jobs
    need them, beside those that are `started` already; all end with this function, however it ends.
    """
    import ray

    failures: dict[str, str] = {}
    stopped: set[str] = set()  # tasks with a failed job
    attempts: dict[str, int] = {}
    running: dict[Any, Running] = {}
    idle = list(started)
    alive = len(idle)

    def waiting() -> list[Job]:
        busy = {entry.job.name for entry in running.values()}
        ready = (job for task in tasks if task.name not in stopped for job in next_jobs(task, seeds, results))
        return sorted((job for job in ready if job.name not in busy), key=lambda job: -costs[job.task.name])

    def give_up(job: Job, error: str) -> None:
        failures[job.name] = error
        stopped.add(job.task.name)
        on_failure(job, error)

    try:
        while True:
            queue = deque(waiting())
            while queue and (idle or alive < workers):
                if idle:
                    worker = idle.pop()
                else:
                    worker, alive = make_worker(), alive + 1
                job = queue.popleft()
                attempts[job.name] = attempts.get(job.name, 0) + 1
                call = worker.run.remote(job, features.get(job.task.name))
                running[call] = Running(job, worker, time.monotonic(), attempts[job.name])
            if not running:
                return failures
            if idle and any(entry.starved for entry in running.values()):
                alive -= len(idle)
                while idle:
                    ray.kill(idle.pop())
            done, _ = ray.wait(list(running), timeout=0.5)
            for call in done:
                entry = running.pop(call)
                job = entry.job
                try:
                    result, predictions = ray.get(call)
                except ray.exceptions.RayActorError as error:  # the process or its machine is gone
                    alive -= 1
                    if attempts[job.name] > retries:
                        give_up(job, f"its process died {attempts[job.name]} times ({_first_line(error)})")
                except Exception as error:
                    # A fresh process for the next job: after a device error this one may not work again.
                    ray.kill(entry.worker)
                    alive -= 1
                    give_up(job, _first_line(getattr(error, "cause", None) or error))
                else:
                    idle.append(entry.worker)
                    on_result(job, result, predictions)
                    results[job.name] = result
            _ask_progress(running.values())
            on_tick(list(running.values()))
    finally:
        for worker in [*idle, *(entry.worker for entry in running.values())]:
            ray.kill(worker)


def _ask_progress(running: Iterable[Running]) -> None:
    """Collects the answers that have come and asks again; never waits."""
    import ray

    for entry in running:
        if entry.asked is not None:
            done, _ = ray.wait([entry.asked], timeout=0)
            if not done:
                continue
            try:
                entry.progress = ray.get(entry.asked)
                entry.answered = True
            except ray.exceptions.RayError:  # the job's own result tells what happened
                continue
        entry.asked = entry.worker.progress.remote()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:500]
