"""Runs a suite: opens and checks everything, runs unfinished tasks, logs and reports the results."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from pipeline import cluster, logs, storage
from pipeline.errors import plural
from pipeline.lease import Lease
from pipeline.outputs import check_output
from pipeline.tracking import names, start_run
from pipeline.tracking.description import Description, checkpoint_name, run_name
from pipeline.tracking.names import RANDOM
from pipeline.training.scoring import describe_small_classes
from pipeline.transfer import corrections, features, report, scores
from pipeline.transfer.checkpoint import PretrainedModel, load_checkpoint
from pipeline.transfer.head import check_heads
from pipeline.transfer.jobs import Result, estimate_flops, next_jobs
from pipeline.transfer.progress import SuiteProgress
from pipeline.transfer.protocols import Probe, Split, TransferTask
from pipeline.transfer.record import Recorder, attach_scores
from pipeline.transfer.scheduler import FailedJob, Finished, Pool, Scheduler, Tick
from pipeline.transfer.store import Store, SuiteState, open_state
from pipeline.transfer.suites import TransferConfig, build_tasks, check_config, open_datasets
from pipeline.transfer.worker import TransferWorker

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

logger = logging.getLogger(__name__)
RANDOM_ENCODER = "random encoder"


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteResult:
    """Results of a suite. Accuracies are in percent."""

    suite: str
    output: str
    scores: dict[str, float]
    std: dict[str, float]
    """Deviation between seeds."""
    flat_mean: float | None
    """The score of the suite: the mean of VTAB's nineteen tasks, or of all scores of another suite. None if a task is
    missing."""
    mean: float | None
    """Mean over the requested tasks; None if a task failed."""
    clean: dict[str, float]
    """Scores without test images that are in the pre-training data, for tasks that have such images."""
    group_means: dict[str, float]
    """VTAB's natural, specialized and structured."""
    failures: dict[str, str]
    """{job: error}"""
    run_id: str
    """MLflow's parent run."""
    seconds: float
    random: dict[str, float]
    """Scores of the same architecture with random weights, if requested."""
    details: dict[str, dict[str, float]]
    """{score: more numbers} of the suite head (`protocols.HEAD_METRICS`)."""


@dataclass(frozen=True, slots=True)
class Suite:
    """The opened and checked inputs of a suite."""

    config: TransferConfig
    checkpoint: PretrainedModel
    tasks: list[TransferTask]
    datasets: "Mapping[Split, Dataset]"
    seen: Mapping[str, frozenset[str]]
    """{task: keys of test images that are in the pre-training data}"""
    state: SuiteState
    store: Store
    results: dict[str, Result]
    """Results by job name; updated while jobs finish."""

    def unfinished(self) -> list[TransferTask]:
        return [task for task in self.tasks if next_jobs(task, self.config.seeds, self.results)]


def run_suite(config: TransferConfig) -> SuiteResult:
    """Runs the unfinished tasks of a suite and reports all results. Connects to Ray.

    Raises UserError before any worker starts for an invalid checkpoint, data or settings. Tasks that fail later are
    listed in `failures` and do not stop the others."""
    started = time.monotonic()
    suite = open_suite(config)
    name = run_name(config.suite, checkpoint_name(suite.checkpoint.uri))
    with Lease(suite.store.output, name, doing="being written"):
        return _run_alone(reread(suite), started)


def reread(suite: "Suite") -> "Suite":
    """The suite with the state and results that its output has now: another command may just have ended there."""
    identity = {key: suite.state.values[key] for key in ("suite", "checkpoint")}
    state = open_state(suite.store.output, identity, suite.checkpoint.uri, suite.tasks, suite.datasets)
    return dataclasses.replace(suite, state=state, results=suite.store.load_all())


def _run_alone(suite: "Suite", started: float) -> SuiteResult:
    config = suite.config
    random: dict[str, float] = {}
    begin = 0.0  # of the job's progress
    if _wants_random_encoder(config, suite.checkpoint):
        uri, output, begin = RANDOM + suite.checkpoint.uri, f"{suite.store.output}-random", 0.5
        other = dataclasses.replace(config, checkpoint=uri, output=output, random_encoder=False)
        with logs.part_of_job(0.0, begin):
            random = run_suite(other).scores
    left = suite.unfinished()
    # workers start while MLflow is imported
    with logs.part_of_job(begin, 1.0), open_pool(suite, left) as pool:
        return record_suite(suite, left, pool, started, random)


def _wants_random_encoder(config: TransferConfig, checkpoint: PretrainedModel) -> bool:
    if config.random_encoder is None:
        own = "library" not in checkpoint.config and not checkpoint.uri.startswith(RANDOM)
        return config.suite == "demo" and own
    return config.random_encoder


def record_suite(
    suite: "Suite", left: list[TransferTask], pool: Pool | None, started: float, random: Mapping[str, float]
) -> SuiteResult:
    """Runs and reports the suite inside an MLflow run. left: the unfinished tasks; without any, `pool` is None.

    random: scores of the architecture with random weights, for the report.
    """
    config = suite.config
    parent = start_run(
        config.experiment,
        run_name(checkpoint_name(suite.checkpoint.uri), config.suite),  # what differs comes first: MLflow cuts names
        config=config,
        about=_about_suite(suite),
        tags=_tags(suite),
        run_id=suite.state.run_id,
        tracking_uri=config.tracking_uri,
    )
    with parent:  # sets the status of the run, and the reason if it is stopped or fails
        if suite.checkpoint.run_id:
            parent.link("pretrain", suite.checkpoint.run_id)
        suite.state.run_id = parent.id
        suite.state.save()
        recorder = Recorder(config, suite.checkpoint, parent, suite.state, suite.datasets)
        for task in suite.tasks:
            if task not in left:
                recorder.task(task, suite.results)
        failures = run_jobs(suite, left, pool, recorder) if pool else {}
        result = report_suite(suite, failures, recorder, started, random)
        if failures:
            job, error = next(iter(failures.items()))
            tasks = {name.partition("/")[0] for name in failures}
            parent.finish(
                "FAILED", reason=f"{len(tasks)} of {plural(len(suite.tasks), 'task')} failed, such as {job}: {error}"
            )
        return result


def _tags(suite: "Suite") -> dict[str, Any]:
    checkpoint = suite.checkpoint
    seen = {} if checkpoint.images_seen is None else {names.IMAGES_SEEN: checkpoint.images_seen}
    return {
        names.RECIPE: suite.config.suite,
        names.CHECKPOINT: checkpoint.uri,
        names.VARIANT: checkpoint.config["variant"],
        names.PLACE + "output": suite.store.output,
        **seen,
    }


def _about_suite(suite: "Suite") -> Description:
    """The description of the parent run in MLflow."""
    config, tasks = suite.config, suite.tasks
    what = (
        f"Transfer of {suite.checkpoint.config['variant']} ({checkpoint_name(suite.checkpoint.uri)}) to "
        f"{plural(len(tasks), 'task')} of the suite {config.suite}, {plural(config.seeds, 'seed')} each."
    )
    data = [f"checkpoint {suite.checkpoint.uri}", f"data sets of {config.data or 'the suite'}, among the inputs"]
    again = f"repeat the command to continue from the results in {suite.store.output}; you may add tasks and seeds."
    return Description(what=what, data=data, to_continue=again)


def open_suite(config: TransferConfig) -> Suite:
    """Opens and checks all inputs. Raises UserError before any work."""
    check_config(config)
    check_output(config.output or "runs")
    checkpoint = load_checkpoint(config)
    tasks = build_tasks(config, checkpoint.about)
    datasets = open_datasets(tasks)
    check_heads(tasks, datasets, checkpoint)
    warn_of_small_classes(tasks, datasets)
    if "library" in checkpoint.config and (own := [t.name for t in tasks if datasets[t.test].encoding == "patches"]):
        logger.info(
            "transfer: %s receives whole images, reassembled from the patches of %s", checkpoint.uri, ", ".join(own)
        )
    seen = corrections.read_seen_images(config.decontamination, tasks) if config.decontamination else {}
    if config.decontamination:
        count = sum(map(len, seen.values()))
        logger.info("transfer: %s in %d of %s", plural(count, "seen test image"), len(seen), plural(len(tasks), "task"))
    corrections.check_real_labels(tasks, datasets)
    identity = {"suite": config.suite, "checkpoint": checkpoint.identity}
    state = open_state(config.output, identity, checkpoint.uri, tasks, datasets)
    store = Store(state.output)
    suite = Suite(config, checkpoint, tasks, datasets, seen, state, store, store.load_all())
    finished = len(tasks) - len(suite.unfinished())
    variant = checkpoint.config["variant"]
    logger.info("transfer: %s, %s, %s, %d done", config.suite, variant, plural(len(tasks), "task"), finished)
    logger.info("transfer: %s -> %s", checkpoint.uri, store.output)
    return suite


def warn_of_small_classes(tasks: list[TransferTask], datasets: "Mapping[Split, Dataset]") -> None:
    """Warns of few-shot probes of more images per class than there are: their score is of fewer shots than it says."""
    for task in tasks:
        probe = task.protocol
        if not isinstance(probe, Probe) or probe.kind != "fewshot" or task.train is None:
            continue
        shots = next((n for n in sorted(probe.shots) if describe_small_classes(datasets[task.train], n)), None)
        if shots is not None:
            logger.warning(
                "%s: the probe of %d shots: %s", task.name, shots, describe_small_classes(datasets[task.train], shots)
            )


# ---------------------------------------------------------------- work


@contextmanager
def open_pool(suite: Suite, tasks: list[TransferTask]) -> Iterator[Pool | None]:
    """The pool of worker processes with the shared weights. Their log records are shown here. Connects to Ray.

    None when all tasks are finished.
    """
    if not tasks:
        yield None
        return
    config = suite.config
    less = "To use less memory, reduce --workers or --micro-batch"
    cluster.configure(config.address, dashboard=False, memory_remedy=less)
    cluster.connect()
    resources, limit = plan_workers(config)
    # In a list, because Ray would replace a direct reference in the arguments by one copy of the value per worker.
    weights = [ray.put(suite.checkpoint.arrays)]
    with logs.Collector() as records:
        threads = int(resources["num_cpus"])
        model, classes = suite.checkpoint.config, suite.checkpoint.classes
        arguments = (model, weights, threads, config.micro_batch, records.handle, config.compile, classes)
        actor: Any = ray.remote(TransferWorker).options(max_concurrency=2, **resources)  # type: ignore[attr-defined]
        pool = Pool(actor, arguments, limit)
        # Features for probes are extracted first and need the devices.
        if not any(isinstance(task.protocol, Probe) for task in tasks):
            pool.start(sum(len(next_jobs(task, config.seeds, suite.results)) for task in tasks))
        try:
            yield pool
        finally:
            pool.stop_idle()


def plan_workers(config: TransferConfig) -> tuple[dict[str, float], int]:
    """(resources of one worker, number of workers). Ray must be connected."""
    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 0.0)
    resources = {"num_cpus": float(config.cpus_per_worker), "num_gpus": config.gpus_per_worker if gpus else 0.0}
    fit = int(cpus // config.cpus_per_worker)
    if gpus:
        fit = min(fit, int(gpus / config.gpus_per_worker + 1e-9))
    return resources, config.workers or max(1, fit)


def occupied_gpus(config: TransferConfig) -> float:
    """Number of GPUs of all workers; 0 if there was nothing to do."""
    if not ray.is_initialized():
        return 0.0
    resources, limit = plan_workers(config)
    return resources["num_gpus"] * limit


def run_jobs(suite: Suite, tasks: list[TransferTask], pool: Pool, recorder: Recorder) -> dict[str, str]:
    """Runs and logs the unfinished tasks and adds to `suite.results`. Returns {job: error}."""
    config, results = suite.config, suite.results
    folders, failures = compute_features(suite, tasks, pool)
    ready = [task for task in tasks if not isinstance(task.protocol, Probe) or task.name in folders]
    costs = {task.name: estimate_flops(task, suite.checkpoint.config, len(suite.datasets[task.test])) for task in ready}
    scheduler = Scheduler(ready, config.seeds, results, pool, costs, folders, config.retries)
    with SuiteProgress(tasks, config.seeds, results) as progress, closing(scheduler.run()) as events:
        for event in events:
            match event:
                case Finished(job, result, predictions):
                    suite.store.save(job, result, predictions)
                    progress.finished(job, result)
                    if not next_jobs(job.task, config.seeds, results):
                        recorder.task(job.task, results)
                case FailedJob(job, error):
                    failures[job.name] = error
                    suite.store.save_failure(job, error)
                    progress.failed(job, error)
                case Tick(running):
                    progress.update(running)
    return failures


def compute_features(
    suite: Suite, tasks: list[TransferTask], pool: Pool
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Computes the features of tasks with probes. Returns {task: folders of train
    and test features} and {job: error}."""
    sets = {
        task: tuple(
            features.feature_set(split, suite.datasets[split], suite.checkpoint.identity, task.protocol)
            for split in task.splits.values()
        )
        for task in tasks
        if isinstance(task.protocol, Probe)
    }
    config, root = suite.config, storage.join(suite.store.output, "features")
    resources, _ = plan_workers(config)
    context = features.ExtractionContext(
        model=suite.checkpoint.config,
        weights=pool.arguments[1][0],
        output=root,
        micro_batch=config.micro_batch,
        threads=config.cpus_per_worker,
    )
    wanted = list(dict.fromkeys(one for pair in sets.values() for one in pair))
    errors = features.extract_features(wanted, context, workers=pool.limit, **resources)
    folders, failures = {}, {}
    for task, found in sets.items():
        if error := next((errors[one] for one in found if one in errors), None):
            job = next_jobs(task, config.seeds, suite.results)[0]
            failures[job.name] = error
            suite.store.save_failure(job, error)
            logger.error("transfer: %s failed: %s", job.name, error)
        else:
            folders[task.name] = tuple(storage.join(root, one.name) for one in found)
    return folders, failures


# ---------------------------------------------------------------- report


def report_suite(
    suite: Suite, failures: dict[str, str], recorder: Recorder, started: float, random: Mapping[str, float]
) -> SuiteResult:
    """Writes the scores of all finished tasks to the output folder, MLflow, and registered versions of the
    checkpoint."""
    config, tasks, parent = suite.config, suite.tasks, recorder.parent
    output = suite.store.output
    found = scores.collect_scores(tasks, config.seeds, suite.results, suite.store, l2=config.l2, seen=suite.seen)
    about = {
        "suite": config.suite,
        "checkpoint": suite.checkpoint.uri,
        "data": config.data,
        "seeds": config.seeds,
        "model": suite.checkpoint.config["variant"],
        "run_id": parent.id,
        "gpus": occupied_gpus(config),
    }
    partial = len(tasks) < len(build_tasks(dataclasses.replace(config, tasks=()), suite.checkpoint.about))
    summary = scores.write_scores(output, {**about, "random_encoder": dict(random)}, found, failures, partial)
    references = {RANDOM_ENCODER: _as_reference(random, found)} if random else {}
    text = report.suite_report(about, tasks, found, failures, references)
    storage.write_bytes(storage.join(output, "report.md"), text.encode())
    by_task = [result for task in tasks for _, result in sorted(suite.results.items()) if result.task == task.name]
    recorder.suite(text, summary, found, by_task, references)
    attach_scores(config, suite.checkpoint.uri, summary, found, parent)
    return SuiteResult(
        suite=config.suite,
        output=output,
        scores={score.name: score.mean for score in found},
        std={score.name: score.std for score in found},
        flat_mean=None if partial else summary["mean"],
        mean=summary["mean"],
        clean={score.name: statistics.fmean(score.clean) for score in found if score.clean},
        group_means=summary["groups"],
        failures=failures,
        run_id=parent.id,
        seconds=time.monotonic() - started,
        random=dict(random),
        details={score.name: score.details for score in found if score.details},
    )


def _as_reference(random: Mapping[str, float], found: list[scores.Score]) -> dict[str, float | None]:
    """The scores of random weights as a column of the report: rows, their mean, and means of VTAB's groups."""
    rows = {score.name: random.get(score.name) for score in found}
    known = [value for value in rows.values() if value is not None]
    mean = {"mean": statistics.fmean(known)} if known and len(known) == len(rows) else {}
    groups = {f"mean {group}": value for group, value in scores.vtab_means(random)[1].items()}
    return {**rows, **mean, **groups}
