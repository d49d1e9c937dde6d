"""A whole suite: check everything, fan out, record, report."""

import dataclasses
import io
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import cluster, storage
from pipeline.config import fingerprint, to_dict
from pipeline.errors import UserError
from pipeline.tracking import Run, artifacts, names, registry, start_run
from pipeline.tracking.views import page
from pipeline.transfer import fanout, features, report
from pipeline.transfer.fanout import Job, Result, Running, Store
from pipeline.transfer.suites import Probe, Split, Task, TransferConfig, build, check, open_all, version

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

IDENTITY = "run.json"
DUPLICATES = "duplicates.parquet"
WEIGHT_FILES = (".npz", ".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteResult:
    """What a suite found; accuracies in percent."""

    suite: str
    output: str
    scores: dict[str, float]
    std: dict[str, float]
    """Deviation between seeds."""
    flat_mean: float | None
    """The suite's score: over all nineteen tasks of VTAB, over all scores of another suite. None when a task is missing."""
    mean: float | None
    """Over the tasks that were asked for; None when one failed."""
    clean: dict[str, float]
    """Of tasks with test images that are in the pre-training data: the score without them."""
    group_means: dict[str, float]
    """VTAB's natural, specialized and structured."""
    failures: dict[str, str]
    """{job: error}"""
    run_id: str
    """MLflow's parent run."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint, ready to be shared between processes."""

    uri: str
    identity: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    run_id: str | None = None  # of the pre-training


def run_suite(config: TransferConfig, quiet: bool = False) -> SuiteResult:
    """Runs what is missing of a suite and reports on all of it. Joins Ray by itself.

    Raises UserError, before any worker starts, for anything wrong with the checkpoint, the data or the settings. A task that
    fails later is in `failures`, the others go on.
    """
    started = time.monotonic()
    say = _Say(quiet)
    check(config)
    weights = load_checkpoint(config)
    tasks = build(config, weights.config)
    datasets = open_all(tasks)
    flagged = read_flagged(config.decontamination, tasks) if config.decontamination else {}
    if config.decontamination:
        say(f"transfer: {sum(map(len, flagged.values()))} seen test images in {len(flagged)} of {len(tasks)} tasks")
    _check_real_labels(tasks, datasets)
    output, state = open_output(config, weights, tasks, datasets)
    store = Store(output)
    results = store.load_all()
    left = [task for task in tasks if fanout.next_jobs(task, config.seeds, results)]
    say(
        f"transfer: {config.suite}, {weights.config['variant']}, {len(tasks)} tasks, {len(tasks) - len(left)} of them done"
        f"\ntransfer: {weights.uri} -> {output}"
    )
    pool = None
    if left:
        cluster.configure(config.address, dashboard=False)
        cluster.connect()
        pool = Pool(config, weights, left, results)  # its processes come up while MLflow does
    parent = start_run(
        config.experiment,
        f"{config.suite} {os.path.basename(weights.uri)}",
        config=config,
        tags={names.RECIPE: config.suite, names.CHECKPOINT: weights.uri, "output": output},
        run_id=state.get("run_id"),
        tracking_uri=config.tracking_uri,
    )
    status = "KILLED"  # unless we get to the end
    try:
        if weights.run_id:
            parent.link("pretrain", weights.run_id)
        state["run_id"] = parent.id
        storage.write_json(storage.join(output, IDENTITY), state)
        recorder = _Recorder(config, parent, state, output, datasets)
        for task in tasks:
            if task not in left:
                recorder.task(task, results)
        failures = _fan_out(config, left, results, store, weights, pool, datasets, recorder, quiet) if pool else {}
        scores = report.collect(tasks, config.seeds, results, store, l2=config.l2, flagged=flagged)
        about = {
            "suite": config.suite,
            "checkpoint": weights.uri,
            "data": config.data,
            "seeds": config.seeds,
            "model": weights.config["variant"],
            "run_id": parent.id,
        }
        partial = len(tasks) < len(build(dataclasses.replace(config, tasks=()), weights.config))
        summary = report.write_scores(output, about, scores, failures, partial)
        text = report.markdown(about, tasks, scores, failures)
        storage.write_bytes(storage.join(output, "report.md"), text.encode())
        in_order = [result for task in tasks for _, result in sorted(results.items()) if result.task == task.name]
        recorder.suite(text, summary, scores, in_order)
        status = "FAILED" if failures else "FINISHED"
        attach_scores(config, weights, summary, scores, parent)
    except Exception:
        status = "FAILED"
        raise
    finally:
        parent.finish(status)
    say(f"report: {storage.join(output, 'report.md')}")
    return SuiteResult(
        suite=config.suite,
        output=output,
        scores={score.name: score.mean for score in scores},
        std={score.name: score.std for score in scores},
        flat_mean=None if partial else summary["mean"],
        mean=summary["mean"],
        clean={score.name: statistics.fmean(score.clean) for score in scores if score.clean},
        group_means=summary["groups"],
        failures=failures,
        run_id=parent.id,
        seconds=time.monotonic() - started,
    )


class Pool:
    """The processes that train and probe, and the weights that they share. Ray must be connected."""

    def __init__(
        self, config: TransferConfig, weights: Weights, tasks: Sequence[Task], results: Mapping[str, Result]
    ) -> None:
        import ray

        self.resources, self.workers = plan_workers(config)
        self.weights = ray.put(weights.arrays)
        worker: Any = ray.remote(fanout.Worker).options(max_concurrency=2, **self.resources)
        # A list, because Ray would replace a bare reference among the arguments by one copy of the value per worker.
        arguments = (weights.config, [self.weights], int(self.resources["num_cpus"]), config.micro_batch)
        self.make = lambda: worker.remote(*arguments)
        jobs = sum(len(fanout.next_jobs(task, config.seeds, results)) for task in tasks)
        # Features come first where there are probes, and need the devices.
        probes = any(isinstance(task.protocol, Probe) for task in tasks)
        self.started = [] if probes else [self.make() for _ in range(min(self.workers, jobs))]


def _fan_out(
    config: TransferConfig,
    tasks: Sequence[Task],
    results: dict[str, Result],
    store: Store,
    weights: Weights,
    pool: Pool,
    datasets: Mapping[Split, "Dataset"],
    recorder: "_Recorder",
    quiet: bool,
) -> dict[str, str]:
    """Runs what is left of the tasks on Ray and records it; `results` grows. Returns {job: error}."""
    board = _Board(tasks, config.seeds, results, quiet)

    def on_result(job: Job, result: Result, predictions: bytes | None) -> None:
        store.save(job, result, predictions)
        board.finished(job, result)
        known = {**results, job.name: result}
        if not fanout.next_jobs(job.task, config.seeds, known):
            recorder.task(job.task, known)

    def on_failure(job: Job, error: str) -> None:
        store.fail(job, error)
        board.failed(job, error)

    probes = [task for task in tasks if isinstance(task.protocol, Probe)]
    sets = {
        task: tuple(
            features.feature_set(split, datasets[split], weights.identity, task.protocol)
            for split in (task.train, task.test)
        )
        for task in probes
        if isinstance(task.protocol, Probe)
    }
    root = storage.join(store.output, "features")
    errors = features.extract(
        list(dict.fromkeys(wanted for pair in sets.values() for wanted in pair)),
        weights.config,
        pool.weights,
        root,
        workers=pool.workers,
        resources=pool.resources,
        batch_size=4 * config.micro_batch,
        say=_Say(quiet),
    )
    folders, failures = {}, {}
    for task, (train, test) in sets.items():
        if error := errors.get(train) or errors.get(test):
            job = fanout.next_jobs(task, config.seeds, results)[0]
            failures[job.name] = error
            on_failure(job, error)
        else:
            folders[task.name] = (storage.join(root, train.name), storage.join(root, test.name))
    with board:
        return failures | fanout.fan_out(
            [task for task in tasks if task not in sets or task.name in folders],
            config.seeds,
            results,
            make_worker=pool.make,
            workers=pool.workers,
            started=pool.started,
            retries=config.retries,
            costs={task.name: fanout.cost(task, weights.config, len(datasets[task.test])) for task in tasks},
            features=folders,
            on_result=on_result,
            on_failure=on_failure,
            on_tick=board.tick,
        )


# ---------------------------------------------------------------- before anything starts


def load_checkpoint(config: TransferConfig) -> Weights:
    """The weights that --checkpoint names, checked. Raises UserError when they are missing, incomplete or do not fit."""
    from models import create_model
    from pipeline.training import checkpoint
    from pipeline.weights import load_model, load_weights, read_config, read_weights

    uri = config.checkpoint or ("runs/demo/pretrain" if config.suite == "demo" else None)
    if uri is None:
        raise UserError(
            f"suite {config.suite} needs --checkpoint: a checkpoint or run folder, or weights with --variant"
        )
    run_id = None
    if uri.startswith(artifacts.SCHEMES):
        place = artifacts.fetch(uri, config.tracking_uri)
        if registered := registry.version_at(uri, config.tracking_uri):
            uri, run_id = registered.checkpoint, registered.run_id or None
    else:
        uri = place = storage.normalise(uri)
    if config.variant:
        state = read_weights(place).weights
        model = create_model(config.variant, num_classes=0, image_size=_native_size(config.variant, state))
        if "pre_logits.fc.weight" in state:  # features are what comes after it
            model = create_model(config.variant, 0, model.config["image_size"], pre_logits=True)
        load_weights(model, place)
        identity = _file_identity(place)
    elif place.endswith(WEIGHT_FILES) or storage.exists(storage.join(place, "MLmodel")):
        read_config(place)  # says what is missing when there is no config.json beside it
        model = load_model(place)
        identity = _file_identity(place)
    else:
        found = checkpoint.resolve(place)
        uri = found.uri
        record = storage.join(uri.rpartition("/checkpoints/")[0] or uri, IDENTITY)  # of the pre-training run
        run_id = storage.read_json(record).get("run_id") if storage.exists(record) else None
        masked = {"mpp": None} if read_config(uri)["model"].get("mpp") else {}  # its encoder is what transfers
        model = load_model(uri, **masked)
        identity = found.commit["files"]["model.safetensors"]["sha256"]
    arrays = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    return Weights(uri, fingerprint(identity), dict(model.config), arrays, run_id)


def _native_size(variant: str, state: Mapping[str, Any]) -> int:
    """The resolution that bare weights were trained at, from their number of position embeddings; else 224."""
    if "pos_embed" not in state or "/" not in variant:
        return 224
    positions = state["pos_embed"].shape[1]
    grid = round((positions - 1) ** 0.5)
    return int(variant.rpartition("/")[2]) * (grid if grid**2 == positions - 1 else round(positions**0.5))


def _file_identity(uri: str) -> list[Any]:
    """Size and ends of a weights file, or of those in a folder: enough to tell two apart without reading gigabytes."""
    fs, path = storage.filesystem(uri)
    if fs.isdir(path):
        return [
            [file.path, *_file_identity(file.uri)]
            for file in storage.list_files(uri)
            if file.path.endswith(WEIGHT_FILES)
        ]
    size = int(fs.size(path))
    edges = storage.read_bytes(uri, 0, 1 << 20), storage.read_bytes(uri, max(0, size - (1 << 20)), size)
    return [size, *(fingerprint(edge.hex()) for edge in edges)]


def _check_real_labels(tasks: Sequence[Task], datasets: Mapping[Split, "Dataset"]) -> None:
    for task in tasks:
        if task.real_labels:
            keys = datasets[task.test].table(["key"])["key"].to_pylist()
            report.real_labels(keys, report.read_real_labels(task.real_labels))


def read_flagged(uri: str, tasks: Sequence[Task]) -> dict[str, frozenset[str]]:
    """{task: keys of test images that are also in the pre-training data}; tasks without any have no entry.

    uri: the duplicates.parquet that `jobs/prepare.py --decontaminate` left beside the pre-training data (or that folder),
    which names the evaluation set and the key of every match; or JSON {task: [keys]}. Raises UserError for anything else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    uri = storage.normalise(uri)
    if uri.endswith(".json"):
        content = storage.read_json(uri) if storage.exists(uri) else None
        if not isinstance(content, dict) or not all(isinstance(keys, list) for keys in content.values()):
            raise UserError(f"{uri}: no decontamination report ({{task: [keys]}})")
        by_task = {task.name: content.get(task.name, []) for task in tasks}
    else:
        uri = uri if uri.endswith(".parquet") else storage.join(uri, DUPLICATES)
        if not storage.exists(uri):
            raise UserError(f"{uri}: no decontamination report; `jobs/prepare.py --decontaminate` writes one")
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        if not {"set", "match"} <= set(table.column_names):
            raise UserError(f"{uri}: not a decontamination report (columns set and match)")
        pairs = list(zip(table["set"].to_pylist(), table["match"].to_pylist(), strict=True))
        by_task = {
            task.name: [key for place, key in pairs if place and storage.normalise(place) == task.test.uri]
            for task in tasks
        }
    return {name: frozenset(keys) for name, keys in by_task.items() if keys}


def open_output(
    config: TransferConfig, weights: Weights, tasks: Sequence[Task], datasets: Mapping[Split, "Dataset"]
) -> tuple[str, dict[str, Any]]:
    """The output folder and what its run.json says. More tasks or seeds may join what is there; a folder with results of
    another checkpoint, protocol or dataset is refused."""
    described = {
        task.name: {
            "protocol": to_dict(task.protocol),
            "train": datasets[task.train].manifest.fingerprint,
            "test": datasets[task.test].manifest.fingerprint,
        }
        for task in tasks
    }
    identity = {"suite": config.suite, "checkpoint": weights.identity}
    default = f"runs/{config.suite}/transfer-{fingerprint([identity, described])[:8]}"
    output = storage.normalise(config.output or default)
    uri = storage.join(output, IDENTITY)
    if not storage.exists(uri):
        if storage.list_files(output):
            raise UserError(f"{output} holds something else than transfer results; choose another --output")
        return output, {
            **identity,
            "checkpoint_uri": weights.uri,
            "tasks": described,
            "children": {},  # task -> MLflow run
            "recorded": {},  # task -> results that are in it
        }
    state = storage.read_json(uri)
    for key, value in identity.items():
        if state.get(key) != value:
            there = state.get("checkpoint_uri") if key == "checkpoint" else state.get(key)
            raise UserError(f"{output} holds results of another {key} ({there}); choose another --output")
    for name, mine in described.items():
        theirs = state["tasks"].setdefault(name, mine)
        changed = [key for key in mine if theirs.get(key) != mine[key]]
        if changed:
            raise UserError(
                f"{output} holds results of {name} with another {' and '.join(changed)}; choose another --output"
            )
    return output, state


def plan_workers(config: TransferConfig) -> tuple[dict[str, float], int]:
    """(num_cpus, num_gpus) of one worker, and how many workers; Ray must be connected."""
    import ray

    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 0.0)
    resources = {"num_cpus": float(config.cpus_per_worker), "num_gpus": config.gpus_per_worker if gpus else 0.0}
    fit = int(cpus // config.cpus_per_worker)
    if gpus:
        fit = min(fit, int(gpus / config.gpus_per_worker + 1e-9))
    return resources, config.workers or max(1, fit)


# ---------------------------------------------------------------- on the way


class _Recorder:
    """Writes to MLflow and to the output folder; only the driver does."""

    def __init__(
        self,
        config: TransferConfig,
        parent: Run,
        state: dict[str, Any],
        output: str,
        datasets: Mapping[Split, "Dataset"],
    ) -> None:
        self.config, self.parent, self.state, self.output, self.datasets = config, parent, state, output, datasets

    def task(self, task: Task, known: Mapping[str, Result]) -> None:
        """A child run for a task whose last job is done: curves, accuracy per seed, confusion matrix.

        A driver that died may have left it unwritten, or half of it; how many results are in it tells.
        """
        results = [result for result in known.values() if result.task == task.name]
        if self.state["recorded"].get(task.name) == len(results):
            return
        child = start_run(
            self.config.experiment,
            task.name,
            config={"task": task.name, "group": task.group, **to_dict(task.protocol)},
            run_id=self.state["children"].get(task.name),
            parent_id=self.parent.id,
            tracking_uri=self.config.tracking_uri,
        )
        self.state["children"][task.name] = child.id
        storage.write_json(storage.join(self.output, IDENTITY), self.state)
        for role, split in (("train", task.train), ("test", task.test)):
            manifest = self.datasets[split].manifest
            child.log_dataset(split.uri, {"fingerprint": manifest.fingerprint, "rows": manifest.rows}, role=role)
        finals = [result for result in results if result.phase == "final"]
        for result in results:
            suffix = f"/lr{result.lr:g}-seed{result.seed}" if len(results) > 1 else ""
            for step, loss, lr in result.curve:
                child.log({names.LOSS + suffix: loss, names.LEARNING_RATE + suffix: lr}, step=int(step))
            accuracy = {f"{result.phase}_top1{suffix}": result.accuracy[""]} if "" in result.accuracy else {}
            child.log({**accuracy, names.IMAGES_PER_SECOND + suffix: result.images_per_second})
        if all("" in result.accuracy for result in finals):
            mean = sum(result.accuracy[""] for result in finals) / len(finals)
            child.log({names.MEAN_SCORE: mean})
            self.parent.log({names.SCORE + task.name: mean})
        if figure := report.confusions(finals):
            child.log_figure(figure, "confusion.png")
        child.finish()
        self.state["recorded"][task.name] = len(results)
        storage.write_json(storage.join(self.output, IDENTITY), self.state)

    def suite(
        self, text: str, summary: dict[str, Any], scores: Sequence[report.Score], results: Sequence[Result]
    ) -> None:
        """Scores, means and the report, in the parent run and in the output folder."""
        self.parent.log({names.SCORE + score.name: score.mean for score in scores})
        if summary["mean"] is not None:
            self.parent.log({names.PARTIAL_MEAN if summary["partial"] else names.MEAN_SCORE: summary["mean"]})
        if summary["mean_clean"] is not None:
            self.parent.log({names.CLEAN_MEAN: summary["mean_clean"]})
        self.parent.log({names.CLEAN_SCORE + s.name: statistics.fmean(s.clean) for s in scores if s.clean})
        self.parent.log({names.GROUP_SCORE + group: mean for group, mean in summary["groups"].items()})
        self.parent.log_text(text, "report.md")
        self.parent.log_dict(summary, report.SCORES)
        pictures: dict[str, bytes] = {}
        figures = {"scores.png": report.bars(scores) if scores else None}
        figures |= {"curves.png": report.curves(results), "confusion.png": report.confusions(results)}
        for name, figure in figures.items():
            if figure is not None:
                picture = io.BytesIO()
                figure.savefig(picture, format="png")
                pictures[name] = picture.getvalue()
                storage.write_bytes(storage.join(self.output, name), pictures[name])
                self.parent.log_bytes(pictures[name], name)
        self.parent.log_text(page(text, pictures), "report.html")


def attach_scores(
    config: TransferConfig, weights: Weights, summary: dict[str, Any], scores: Sequence[report.Score], parent: Run
) -> None:
    """Gives the scores to every registered version of this checkpoint, as scheduled evaluation does."""
    if summary["mean"] is None or not parent.flush():
        return
    evaluation = {
        "mean": summary["mean"],
        "spread": report.spread(scores),
        "scores": {score.name: score.mean for score in scores},
    }
    try:
        for registered in registry.versions_of(weights.uri, parent.uri):
            registry.record_evaluation(
                registered, f"{config.suite}:{version(config)}", evaluation, parent.id, parent.uri
            )
    except Exception as error:  # the scores themselves are safe
        print(f"warning: the registered versions of {weights.uri} did not get these scores: {error}", file=sys.stderr)


class _Say:
    """Lines for people: on stdout, or nowhere when stdout is for a program."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)


class _Board:
    """Progress: a live table on a terminal, otherwise a line per finished job and one every half minute."""

    def __init__(self, tasks: Sequence[Task], seeds: int, results: Mapping[str, Result], quiet: bool) -> None:
        self.tasks, self.seeds, self.results, self.quiet = tasks, seeds, results, quiet
        self.failures: dict[str, str] = {}
        self.started = self.spoken = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> None:
        if not self.quiet and sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=2, transient=True)
            self.live.start()

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def finished(self, job: Job, result: Result) -> None:
        accuracy = f" {result.accuracy['']:.2f}%" if "" in result.accuracy else ""
        speed = f", {result.images_per_second:.0f} img/s" if result.images_per_second else ""
        self._line(f"transfer: {job.name}{accuracy} ({result.seconds:.1f} s{speed})")

    def failed(self, job: Job, error: str) -> None:
        self.failures[job.task.name] = error
        self._line(f"transfer: {job.name} FAILED: {error}")

    def _line(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, flush=True)

    def tick(self, running: list[Running]) -> None:
        if self.live is not None:
            self.live.update(self._table(running))
        elif time.monotonic() - self.spoken > 30:
            self.spoken = time.monotonic()
            parts = [f"{entry.job.name} {_share(entry)}" for entry in running]
            self._line(f"transfer: {time.monotonic() - self.started:.0f} s, running {', '.join(parts)}")

    def _table(self, running: list[Running]) -> Any:
        from rich.table import Table

        table = Table("task", "jobs", "now", "loss", "top-1 %", box=None)
        by_task: dict[str, list[Running]] = {}
        for entry in running:
            by_task.setdefault(entry.job.task.name, []).append(entry)
        for task in self.tasks:
            done = [r for r in self.results.values() if r.task == task.name]
            now = by_task.get(task.name, [])
            state = ", ".join(f"{e.job.phase} {_share(e)}" for e in now) or (
                "[red]failed" if task.name in self.failures else ""
            )
            loss = ", ".join(f"{e.progress[2]:.3f}" for e in now if e.progress[1])
            tops = [r.accuracy[""] for r in done if r.phase == "final" and "" in r.accuracy]
            top = f"{sum(tops) / len(tops):.2f}" if tops else ""
            table.add_row(task.name, f"{len(done)}/{fanout.total_jobs(task, self.seeds)}", state, loss, top)
        return table


def _share(entry: Running) -> str:
    step, steps, _ = entry.progress
    return f"{100 * step / steps:.0f}%" if steps else f"{time.monotonic() - entry.started:.0f} s"
