"""A pre-training run from the driver's side: check, identify, launch the workers, report.

    result = pretrain(config)       # after pipeline.cluster.connect()

The run folder holds `run.json` (what run this is), `checkpoints/` and nothing else that matters: the same command again
continues it, another command on the same folder is refused.
"""

import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline import cluster, storage, tracking
from pipeline import config as configuration
from pipeline.data import open_dataset
from pipeline.errors import UserError
from pipeline.tracking import artifacts, names
from pipeline.training import checkpoint
from pipeline.training.loop import Plan, make_plan, train_worker
from pipeline.training.recipes import PretrainConfig

# Activations come and go every step. By default glibc gives each large one back to the kernel and faults it in again,
# zeroed, page by page; kept in the heap they cost nothing.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def pretrain(config: PretrainConfig, base: PretrainConfig | None = None, *, recipe: str = "") -> dict[str, Any]:
    """Runs (or continues) pre-training on the connected Ray and returns its final numbers.

    base: the recipe that the config came from, to print what differs. Raises UserError before any worker starts when the
    data, the batch, the workers or the output folder do not fit; RuntimeError when training failed for good.
    """
    changes = configuration.diff(config, base) if base is not None else {}
    config = _absolute(config)
    plan = check(config)
    print(describe(plan, changes), flush=True)
    output = config.output
    record = _identify(plan, output)
    newest = checkpoint.latest(output, checksums=False)
    if newest is not None and newest.step >= plan.total:
        print(f"nothing left to do: {newest.uri} is at step {newest.step} of {plan.total}", flush=True)
        return {
            **newest.commit["metrics"],
            "checkpoint": newest.uri,
            "steps": newest.step,
            "run_id": record.get("run_id"),
            "seconds": 0.0,
        }
    manifest = open_dataset(config.data).manifest
    run = tracking.start_run(
        names.PRETRAIN,
        config.name or recipe or config.model.variant,
        config=config,
        tags={names.RECIPE: recipe, names.DATA_FINGERPRINT: plan.data_fingerprint, names.CHECKPOINT: output},
        run_id=record.get("run_id"),
        tracking_uri=tracking.tracking_uri(config.tracking_uri),
    )
    status = "FAILED"
    start = time.perf_counter()
    try:
        if record.get("run_id") != run.id:
            storage.write_json(storage.join(output, "run.json"), {**record, "run_id": run.id})
        run.log_dataset(config.data, _about_data(manifest), role="train")
        result = _launch(plan, run.id, run.uri)
        seconds = time.perf_counter() - start
        gpus = plan.workers if config.gpus else 0
        run.log_cost({names.GPU_HOURS: gpus * seconds / 3600, names.TRAIN_FLOPS: result["train_flops"]})
        run.set_tags({names.CHECKPOINT: result["checkpoint"]})
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.finish(status)
    print(summary(result, seconds), flush=True)
    return {**result, "run_id": run.id, "seconds": seconds}


def _absolute(config: PretrainConfig) -> PretrainConfig:
    """The config with absolute paths: Ray's workers run in another folder."""

    def absolute(uri: str | None) -> str | None:
        return storage.normalise(uri) if uri and not uri.startswith(artifacts.SCHEMES) else uri

    return replace(
        config,
        data=storage.normalise(config.data),
        output=storage.normalise(config.output),
        validation=absolute(config.validation),
        # models:/ and runs:/ are MLflow's addresses, not paths
        init_from=config.init_from if ":/" in (config.init_from or "") else absolute(config.init_from),
        cache=absolute(config.cache),
    )


def check(config: PretrainConfig) -> Plan:
    """Everything that can be known before a worker starts. Raises UserError."""
    dataset = open_dataset(config.data)
    plan = make_plan(config, dataset, config.workers)
    from models.variants import parameters

    parameters(plan.model_options | {"variant": config.model.variant})  # names and options exist
    if config.init_from:
        from models import create_model
        from models.convert import load_weights
        from pipeline.weights import locate

        load_weights(create_model(**plan.model_options), locate(config.init_from, config.tracking_uri))  # they fit
    if config.validation:
        validation = open_dataset(config.validation)
        if list(validation.classes) != list(dataset.classes):
            raise UserError(f"{config.validation} has other classes than {config.data}; prepare both from one source")
    output = storage.normalise(config.output)
    if not storage.exists(storage.join(output, "run.json")) and storage.list_files(output, recursive=False):
        raise UserError(f"{output} is not empty and holds no run; choose another --output")
    return plan


def describe(plan: Plan, changes: dict[str, tuple[Any, Any]]) -> str:
    """The run in a few lines, with what differs from its recipe (`pipeline.config.diff`)."""
    from models.variants import flops, parameters

    config, options = plan.config, plan.model_options
    model = f"{config.model.variant}: {parameters(options) / 1e6:.1f}M parameters, {flops(options) / 1e9:.2f} GFLOPs per image"
    lines = [
        f"pretrain: {model}",
        f"  data      {config.data}: {plan.samples} images, {len(plan.classes)} classes, fingerprint {plan.data_fingerprint}",
        f"  schedule  {plan.total} steps of {config.batch_size} ({plan.total / plan.steps_per_epoch:.1f} epochs), warm-up "
        f"{plan.warmup}, {config.schedule.kind}, peak {config.optimizer.lr:g}",
        f"  workers   {plan.workers} x {plan.per_worker} images ({plan.accumulation} micro-batches of {plan.micro_batch}), "
        f"ZeRO-{config.engine.zero}, {config.engine.precision}, {plan.lanes} lanes",
    ]
    return "\n".join([*lines, *(f"  {key} = {new}  (recipe: {old})" for key, (old, new) in changes.items())])


def summary(result: dict[str, Any], seconds: float) -> str:
    """The greppable block at the end of a run."""
    shown = {
        "steps": result["steps"],
        "images": result["images"],
        "seconds": f"{seconds:.1f}",
        "loss_first": f"{result.get('loss_first', float('nan')):.4f}",
        "loss_last": f"{result.get('loss_last', float('nan')):.4f}",
        "top1": f"{result[names.VAL_TOP1]:.4f}" if names.VAL_TOP1 in result else "none",
        "skipped": result["skipped"],
        "checkpoint_wait_seconds": f"{result['checkpoint_wait_seconds']:.2f}",
        "checkpoint": result["checkpoint"],
    }
    return "\n".join(f"pretrain: {key}={value}" for key, value in shown.items())


def _about_data(manifest: Any) -> dict[str, Any]:
    import dataclasses

    plain = dataclasses.asdict(manifest)
    plain["shards"] = len(manifest.shards)  # names, offsets and checksums of thousands of shards stay in the dataset
    return plain


def held_by(plan: Plan, output: str) -> dict[str, Any] | None:
    """run.json of this output; None when it is free. Raises UserError when it is another run's, or --resume forbids it."""
    uri, mode = storage.join(output, "run.json"), plan.config.resume
    identity = plan.identity
    if not storage.exists(uri):
        if mode == "must":
            raise UserError(f"{output} holds no run to continue; check --output, or use --resume auto")
        return None
    if mode == "never":
        raise UserError(f"{output} already holds a run; choose another --output, or --resume auto to continue it")
    record = storage.read_json(uri)
    if record["identity"] != configuration.fingerprint(identity):
        old, new = configuration.flatten(record["config"]), configuration.flatten(identity)
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
        raise UserError(
            f"{output} holds another run ({'; '.join(changed[:6])}); give its settings to continue it, or choose another --output"
        )
    return record


def _identify(plan: Plan, output: str) -> dict[str, Any]:
    """run.json of this output: read and compared, or made."""
    record = held_by(plan, output)
    if record is None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"identity": configuration.fingerprint(plan.identity), "created": created, "config": plan.identity}
        storage.write_json(storage.join(output, "run.json"), record)
    return record


def _launch(plan: Plan, run_id: str, tracking_uri: str) -> dict[str, Any]:
    """One Ray Train run. Resuming is ours (checkpoint.latest), so every launch is a new run to Ray."""
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = plan.config
    _wait_for_resources(config)
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.gpus:
        resources["GPU"] = 1
    fs, path = storage.filesystem(storage.join(config.output, "ray"))
    filesystem = PyFileSystem(FSSpecHandler(fs)) if storage.is_remote(config.output) else None
    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cuda" if config.gpus else "cpu", **HEAP}
    console = Console()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": configuration.to_dict(config),
            "run_id": run_id,
            "tracking_uri": tracking_uri,
            "say": console.say,
            "done": console.done,
        },
        torch_config=TorchConfig(backend="nccl" if config.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=config.gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
        ),
    )
    try:
        with console:
            # Off the main thread Ray leaves Ctrl-C to us; the workers end with this process.
            fitted: Future = Future()
            threading.Thread(target=_fit, args=(trainer, fitted), daemon=True).start()
            fitted.result()
    except ray.train.TrainingFailedError as error:
        causes = list(getattr(error, "worker_failures", {}).values()) or [error]
        cause = causes[0]
        while getattr(cause, "cause", None) is not None or cause.__cause__ is not None:
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise RuntimeError(f"training failed: {type(cause).__name__}: {cause}") from error
    finally:
        storage.remove(storage.join(config.output, "ray"), recursive=True)
    return console.result()


def _fit(trainer: Any, fitted: Future) -> None:
    try:
        fitted.set_result(trainer.fit())
    except BaseException as error:
        fitted.set_exception(error)


def _wait_for_resources(config: PretrainConfig) -> None:
    """Says what the cluster lacks; with an autoscaler it may still come, on a fixed cluster it never will."""
    import ray

    bundle: dict[str, float] = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.gpus else {})}
    if config.address is not None or cluster.submitted():
        cluster.announce(bundle, config.workers)
        return
    have = ray.cluster_resources()
    lacking = {
        name: config.workers * each for name, each in bundle.items() if have.get(name, 0) < config.workers * each
    }
    text = ", ".join(f"{have.get(name, 0):g} of {amount:g} {name}" for name, amount in lacking.items())
    if "GPU" in lacking:
        raise UserError(f"this machine has {text}; use --workers, --no-gpus, or --address of a cluster that has them")
    if lacking:
        raise UserError(f"this machine has {text}; use fewer --workers or --cpus-per-worker")


class Console:
    """Lines from workers, printed by the driver as they come: an actor holds them, a thread fetches them.

    Ray's own forwarding of worker output adds a prefix to every line and comes with everyone else's.
    """

    def __init__(self) -> None:
        import ray

        @ray.remote(num_cpus=0)
        class Lines:
            def __init__(self) -> None:
                self.lines: list[str] = []
                self.result: dict[str, Any] = {}

            def add(self, line: str) -> None:
                self.lines.append(line)

            def finish(self, result: dict[str, Any]) -> None:
                self.result = result

            def outcome(self) -> dict[str, Any]:
                return self.result

            def take(self) -> list[str]:
                taken, self.lines = self.lines, []
                return taken

        self.actor = Lines.remote()  # type: ignore[attr-defined]
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._print, daemon=True)

    @property
    def say(self) -> Callable[[str], None]:
        actor = self.actor

        def say(line: str) -> None:
            actor.add.remote(line)

        return say

    @property
    def done(self) -> Callable[[dict[str, Any]], None]:
        import ray

        actor = self.actor

        def done(result: dict[str, Any]) -> None:
            ray.get(actor.finish.remote(result))

        return done

    def result(self) -> dict[str, Any]:
        import ray

        return ray.get(self.actor.outcome.remote())

    def __enter__(self) -> "Console":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join(10)

    def _print(self) -> None:
        import ray

        terminal = sys.stdout.isatty()
        while True:
            last = self.stop.wait(0.3)
            try:
                lines = ray.get(self.actor.take.remote(), timeout=10)
            except Exception:  # the cluster is going away; what went wrong is reported by the trainer
                return
            for line in lines:
                print(f"\033[33m{line}\033[0m" if terminal and line.startswith("warning") else line, flush=True)
            if last:
                return
