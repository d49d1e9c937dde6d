"""A pre-training run from the driver's side: check, identify, launch the workers, report.

    result = pretrain(config, connect=pipeline.cluster.connect)

The run folder holds `run.json` (what run this is), `checkpoints/` and nothing else that matters: the same command again
continues it, another command on the same folder is refused.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline import config as configuration
from pipeline import storage, tracking
from pipeline.data import open_dataset
from pipeline.errors import UserError
from pipeline.tracking import artifacts, names, registry
from pipeline.training import checkpoint
from pipeline.training.loop import Plan, make_plan
from pipeline.training.recipes import PretrainConfig


def pretrain(
    config: PretrainConfig,
    base: PretrainConfig | None = None,
    *,
    recipe: str = "",
    connect: Callable[[], None],
) -> dict[str, Any]:
    """Runs (or continues) pre-training and returns its final numbers.

    base: the recipe that the config came from, to print what differs. connect: joins Ray; called when there is something
    to train. Raises UserError before that when the data, the batch, the workers or the output folder do not fit;
    RuntimeError when training failed for good.
    """
    from pipeline.training.launch import launch

    changes = configuration.diff(config, base) if base is not None else {}
    config = _absolute(config)
    plan = check(config)
    print(describe(plan, changes), flush=True)
    output = config.output
    record = held_by(plan, output)
    newest = checkpoint.latest(output, checksums=False)
    if record is not None and newest is not None and newest.step >= plan.total:
        print(f"nothing left to do: {newest.uri} is at step {newest.step} of {plan.total}", flush=True)
        _register(config, record.get("run_id"))
        return {
            **newest.commit["metrics"],
            "checkpoint": newest.uri,
            "steps": newest.step,
            "run_id": record.get("run_id"),
            "seconds": 0.0,
        }
    connect()
    record = record or _claim(plan, output)
    manifest = open_dataset(config.data).manifest
    run = tracking.start_run(
        names.PRETRAIN,
        config.name or recipe or config.model.variant,
        config=config,
        tags={names.RECIPE: recipe, names.DATA_FINGERPRINT: plan.data_fingerprint, names.CHECKPOINT: output},
        run_id=record.get("run_id"),
        tracking_uri=tracking.resolve_tracking_uri(config.tracking_uri),
    )
    status = "FAILED"
    start = time.perf_counter()
    try:
        if record.get("run_id") != run.id:
            storage.write_json(storage.join(output, "run.json"), {**record, "run_id": run.id})
        run.log_dataset(config.data, _about_data(manifest), role="train")
        result = launch(plan, run.id, run.uri, sizes(plan))
        seconds = time.perf_counter() - start
        gpus = plan.workers if config.gpus else 0
        run.log_cost({names.GPU_HOURS: gpus * seconds / 3600, names.TRAIN_FLOPS: result["train_flops"]})
        run.log_energy()
        run.set_tags({names.CHECKPOINT: result["checkpoint"]})
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.finish(status)
    print(summary(result, seconds), flush=True)
    _register(config, run.id)
    return {**result, "run_id": run.id, "seconds": seconds}


def _register(config: PretrainConfig, run_id: str | None) -> None:
    """Makes the checkpoints worth keeping, the best by validation and the last, versions of a registered model.

    Never fails a run that has succeeded: the same command again tries again.
    """
    if not config.register or config.loss == "masked":  # an encoder alone classifies nothing
        return
    here = checkpoint.find(config.output)
    scored = [c for c in here if names.VAL_TOP1 in c.commit.get("metrics", {})]
    best = max(scored, key=lambda c: (c.commit["metrics"][names.VAL_TOP1], c.step), default=here[-1])
    uri = tracking.resolve_tracking_uri(config.tracking_uri)
    try:
        for worth_keeping in dict.fromkeys((best.uri, here[-1].uri)):
            version = registry.register(worth_keeping, name=config.register, run_id=run_id, uri=uri)
            print(f"pretrain: registered={version.name}/{version.version} {worth_keeping}", flush=True)
    except Exception as error:
        print(f"warning: not registered in MLflow ({error}); the same command again tries again", flush=True)


def _absolute(config: PretrainConfig) -> PretrainConfig:
    """The config with absolute paths: Ray's workers run in another folder."""

    def absolute(uri: str | None) -> str | None:
        return storage.normalise(uri) if uri and not uri.startswith(artifacts.SCHEMES) else uri

    return replace(
        config,
        data=storage.normalise(config.data),
        output=storage.normalise(config.output),
        validation=absolute(config.validation),
        fewshot=replace(config.fewshot, train=absolute(config.fewshot.train), test=absolute(config.fewshot.test)),
        # models:/ and runs:/ are MLflow's addresses, not paths
        init_from=config.init_from if ":/" in (config.init_from or "") else absolute(config.init_from),
        cache=absolute(config.cache),
    )


def check(config: PretrainConfig) -> Plan:
    """Everything that can be known before a worker starts. Raises UserError."""
    dataset = open_dataset(config.data)
    plan = make_plan(config, dataset, config.workers)
    if config.min_workers is not None and not 1 <= config.min_workers <= config.workers:
        raise UserError(f"min_workers {config.min_workers} must be between 1 and workers ({config.workers})")
    from models.cost import parameters

    parameters(plan.model_options | {"variant": config.model.variant})  # names and options exist
    if config.init_from:
        from models import create_model
        from pipeline.weights import load_weights

        load_weights(create_model(**plan.model_options), config.init_from, tracking_uri=config.tracking_uri)  # they fit
    if config.validation:
        validation = open_dataset(config.validation)
        if list(validation.classes) != list(dataset.classes):
            raise UserError(f"{config.validation} has other classes than {config.data}; prepare both from one source")
    if config.fewshot.train:
        from pipeline.training.validation import check_fewshot

        check_fewshot(config)
    output = storage.normalise(config.output)
    if not storage.exists(storage.join(output, "run.json")) and storage.list_files(output, recursive=False):
        raise UserError(f"{output} is not empty and holds no run; choose another --output")
    return plan


def sizes(plan: Plan) -> list[int]:
    """The numbers of workers, ascending, that this run may go on with when nodes come and go."""
    config = plan.config
    if config.min_workers is None:
        return [config.workers]
    dataset, fitting = open_dataset(config.data), []
    for workers in range(config.min_workers, config.workers + 1):
        with contextlib.suppress(UserError):  # it does not divide the lanes or the batch
            make_plan(config, dataset, workers)
            fitting.append(workers)
    return fitting


def describe(plan: Plan, changes: dict[str, tuple[Any, Any]]) -> str:
    """The run in a few lines, with what differs from its recipe (`pipeline.config.diff`)."""
    from models.cost import flops, parameters

    config, options = plan.config, plan.model_options
    model = f"{config.model.variant}: {parameters(options) / 1e6:.1f}M parameters, {flops(options) / 1e9:.2f} GFLOPs per image"
    lines = [
        f"pretrain: {model}",
        f"  data      {config.data}: {plan.samples} images, {len(plan.classes)} classes, fingerprint {plan.data_fingerprint}",
        f"  schedule  {plan.total} steps of {config.batch_size} ({plan.total / plan.steps_per_epoch:.1f} epochs), warm-up "
        f"{plan.warmup}, {config.schedule.kind}, peak {config.optimizer.lr:g}",
        f"  workers   {plan.workers} x {plan.per_worker} images ({plan.accumulation} micro-batches of {plan.micro_batch}), "
        f"ZeRO-{config.engine.zero}, {config.engine.precision}, {plan.lanes} lanes"
        + (
            f", or as many as there are of {', '.join(map(str, sizes(plan)))}" if config.min_workers is not None else ""
        ),
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
        "checkpoint_wait_share": f"{result['checkpoint_wait_share']:.2%}",
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
    if record.get("format", 1) != checkpoint.FORMAT:
        raise UserError(
            f"{uri}: its format is {record['format']}, this program reads {checkpoint.FORMAT}: use the version that wrote it"
        )
    if record["identity"] != configuration.fingerprint(identity):
        old, new = configuration.flatten(record["config"]), configuration.flatten(identity)
        # an option that did not exist when the run was made had its default
        defaults = configuration.flatten(configuration.to_dict(PretrainConfig()))
        old = {key: defaults[key] for key in new if key in defaults} | old
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
        if changed:
            raise UserError(
                f"{output} holds another run ({'; '.join(changed[:6])}); give its settings to continue it, or choose another "
                "--output"
            )
    return record


def _claim(plan: Plan, output: str) -> dict[str, Any]:
    """Makes the run.json of a free output."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    identity = configuration.fingerprint(plan.identity)
    record = {"format": checkpoint.FORMAT, "identity": identity, "created": created, "config": plan.identity}
    storage.write_json(storage.join(output, "run.json"), record)
    return record
