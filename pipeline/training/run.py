"""The driver of a pre-training run: checks, run.json, launch of the workers, results.

    result = pretrain(config)

The run folder contains `run.json`, which identifies the run, and `checkpoints/`. The same command continues the run; a
command with other settings is refused."""

import contextlib
import dataclasses
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from models import create_model
from models.cost import flops, parameters
from pipeline import address, cluster, logs, storage, tracking
from pipeline import config as configuration
from pipeline.address import data_name
from pipeline.data import open_dataset
from pipeline.data.mixture import Mixture, open_data
from pipeline.errors import JobFailed, UserError, plural, shorten
from pipeline.lease import LAUNCH, Lease
from pipeline.lines import WIDTH, fit
from pipeline.outputs import check_output
from pipeline.tracking import artifacts, names, registry
from pipeline.tracking.description import Description, model_name, run_name
from pipeline.training.config import PretrainConfig
from pipeline.training.disk import check_disk, checkpoint_bytes
from pipeline.training.plan import TrainPlan, check_values, make_plan
from pipeline.training.samples import log_attention
from pipeline.training.validation import check_fewshot, check_validation
from pipeline.weights import checkpoints, load_weights

logger = logging.getLogger(__name__)


class IncompleteRun(JobFailed):
    """All steps are done, but the last checkpoint could not be written. result: the final metrics."""

    def __init__(self, result: dict[str, Any]):
        super().__init__(
            f"the checkpoint of step {result['steps']} could not be written ({result['missing']}); free some "
            "space and repeat the command, which continues from the newest complete checkpoint"
        )
        self.result = result


def pretrain(config: PretrainConfig, base: PretrainConfig | None = None, *, recipe: str = "") -> dict[str, Any]:
    """Starts or continues a pre-training run. Returns its final metrics.

    base: the recipe of the config, to log the differences. All checks come before the first write and before connecting
    to Ray (`cluster.configure`). Raises UserError when the data, the batch, the workers or the output folder do not
    fit; JobFailed when training failed permanently, IncompleteRun when the last checkpoint is missing."""
    changes = configuration.diff(config, base) if base is not None else {}
    config = absolute(config)
    plan = check_run(config)
    logger.info("%s", fit(describe_run(plan, changes), indent=10, width=WIDTH - logs.TAKEN))
    output = config.runtime.output
    record = find_record(plan, output)
    if record is not None and (last := finished_checkpoint(plan)):
        logger.info("already finished: %s is at step %d of %d", last.uri, last.step, plan.total)
        return _finished(config, last, recipe, record.get("run_id"))
    if small := check_space(plan):
        logger.warning("%s", small)
    cluster.connect()
    # Imported late: Ray Train takes seconds to import, and reads the settings that `connect` makes.
    from pipeline.training.launch import check_room

    check_room(config, sizes(plan)[0])
    with Lease(output, config.runtime.name or recipe or config.model.variant):
        result = _train(plan, record, recipe)
    return {**result, "registered": _register(config, recipe, result["run_id"])}


def _train(plan: TrainPlan, record: dict[str, Any] | None, recipe: str) -> dict[str, Any]:
    """Launches the workers inside an MLflow run. record: run.json of a run that is continued."""
    from pipeline.training.launch import launch

    config, output = plan.config, plan.config.runtime.output
    record = record or claim(plan, output)
    run = tracking.start_run(
        names.PRETRAIN,
        config.runtime.name or run_name(recipe or config.model.variant, data_name(config.runtime.data)),
        config=config,
        about=_about_run(plan, recipe),
        tags={names.RECIPE: recipe, names.DATA_FINGERPRINT: plan.data_fingerprint, names.CHECKPOINT: output},
        run_id=record.get("run_id"),
        tracking_uri=tracking.resolve_tracking_uri(config.runtime.tracking_uri),
    )
    start = time.perf_counter()
    with run:  # records the status, and the reason of a stop or failure
        if record.get("run_id") != run.id:
            record = {**record, "run_id": run.id}
            storage.write_json(storage.join(output, "run.json"), record)
        log_datasets(run, plan)
        logger.info("starting %s", plural(plan.workers, "worker"))
        try:
            result = launch(plan, run.id, run.uri, sizes(plan))
        finally:
            restore_record(output, record)
        seconds = time.perf_counter() - start
        gpus = plan.workers if config.runtime.gpus else 0
        run.log_cost({names.GPU_HOURS: gpus * seconds / 3600, names.TRAIN_FLOPS: result["train_flops"]})
        run.log_energy()
        result |= {"run_id": run.id, "seconds": seconds}
        if result["missing"]:
            raise IncompleteRun(result)
        run.set_tags({names.CHECKPOINT: result["checkpoint"]})
        log_attention(run, plan, result["checkpoint"])
    return result


def finished_checkpoint(plan: TrainPlan) -> checkpoints.Checkpoint | None:
    """The checkpoint of the last step; None if training has to continue, also because that checkpoint is damaged or a
    stop has prevented its validation.

    Reads all files of that checkpoint, because it is registered and used: nothing reads it before."""
    output = plan.config.runtime.output
    for checksums in (False, True):  # an unfinished run is read by its workers
        newest = checkpoints.latest(output, checksums)
        if newest is None or newest.step < plan.total:
            return None
    runtime = plan.config.runtime
    if newest is not None and newest.commit.get("unvalidated") and (runtime.validation or runtime.fewshot.train):
        return None
    return newest


def _finished(
    config: PretrainConfig, newest: checkpoints.Checkpoint, recipe: str, run_id: str | None
) -> dict[str, Any]:
    """The result of a run that finished earlier."""
    return {
        **newest.commit["metrics"],
        "checkpoint": newest.uri,
        "steps": newest.step,
        "run_id": run_id,
        "seconds": 0.0,
        "registered": _register(config, recipe, run_id),
    }


def _register(config: PretrainConfig, recipe: str, run_id: str | None) -> dict[str, str]:
    """Registers the best checkpoint by validation and the last one as versions of a registered model.

    Returns {"b16_imagenet/3": checkpoint}. An error is only logged, because the run has succeeded; repeating the
    command retries."""
    if not config.runtime.register or config.loss == "masked":  # a model trained with masking has no classifier
        return {}
    here = checkpoints.find(config.runtime.output)[::-1]
    uri = tracking.resolve_tracking_uri(config.runtime.tracking_uri)
    name = config.runtime.register
    if name == "auto":
        name = model_name(recipe or config.model.variant, config.runtime.data)
    registered: dict[str, str] = {}
    try:
        for ranked in (checkpoints.by_score(here, names.VAL_TOP1), here):
            if version := registry.register_first([c.uri for c in ranked], name=name, run_id=run_id, uri=uri):
                registered[f"{version.name}/{version.version}"] = version.checkpoint
    except Exception as error:
        logger.warning("not registered in MLflow (%s); repeat the command to retry", error)
    return registered


def absolute(config: PretrainConfig) -> PretrainConfig:
    """The config with absolute paths, because Ray's workers run in another folder."""

    def path(uri: str | None) -> str | None:
        return storage.normalise(uri) if uri and not uri.startswith(artifacts.SCHEMES) else uri

    runtime = config.runtime
    runtime = replace(
        runtime,
        data=address.normalise(runtime.data),
        output=storage.normalise(runtime.output),
        validation=path(runtime.validation),
        fewshot=replace(runtime.fewshot, train=path(runtime.fewshot.train), test=path(runtime.fewshot.test)),
        cache=path(runtime.cache),
    )
    # models:/ and runs:/ are MLflow URIs, not paths.
    init_from = config.init_from if ":/" in (config.init_from or "") else path(config.init_from)
    return replace(config, runtime=runtime, init_from=init_from)


# ---------------------------------------------------------------- checks


def check_run(config: PretrainConfig, *, devices: bool = True) -> TrainPlan:
    """All checks before the workers start. Raises UserError.

    devices: False for a plan, which may be made on a machine without the GPUs of the run."""
    check_places(config)
    if devices:
        check_devices(config)
    dataset = open_data(config.runtime.data)
    plan = make_plan(config, dataset, config.runtime.workers)
    check_model(plan)
    dataset.check_shards()
    if plan.schedule_warning:
        logger.warning("%s", plan.schedule_warning)
    if config.runtime.validation:
        check_validation(config, dataset)
    if config.runtime.fewshot.train:
        check_fewshot(config, dataset)
    return plan


def check_places(config: PretrainConfig) -> None:
    """Checks that do not depend on the data: values, and whether the output can hold a run. Raises UserError."""
    check_values(config)
    tracking.resolve_tracking_uri(config.runtime.tracking_uri)
    tracking.check_spool()
    output = storage.normalise(config.runtime.output)
    check_output(output)
    if config.runtime.cache:
        check_output(storage.normalise(config.runtime.cache), "cache")
    present = {name for name in storage.list_names(output) if not name.startswith(".")} - {LAUNCH, "lost+found"}
    if present and "run.json" not in present:
        raise UserError(
            f"{output} is not empty and does not contain a run (it has {shorten(sorted(present), 3)}, but no run.json); "
            "choose another --output"
        )
    parent, _, name = output.rpartition("/")
    if name == "checkpoints" and storage.exists(storage.join(parent, "run.json")):
        raise UserError(
            f"{output} holds the checkpoints of the run {parent}; give --output {parent}, or another folder"
        )


def check_space(plan: TrainPlan) -> str:
    """A warning if the disk of this machine may be too small for the checkpoints that the run keeps, or "". Raises
    UserError if not even one fits. On a cluster the disks of the workers are unknown here."""
    config, runtime = plan.config, plan.config.runtime
    if runtime.address is not None or cluster.is_ray_job():
        return ""
    count = parameters(plan.model_options)
    size = checkpoint_bytes(count, optimizer=config.optimizer.name, ema=bool(config.ema_decay))
    return check_disk(runtime.output, size["total"], runtime.keep_last + bool(runtime.validation))


def check_model(plan: TrainPlan) -> None:
    """Checks that the architecture exists and that the initial weights fit it. Raises UserError."""
    config = plan.config
    parameters(plan.model_options | {"variant": config.model.variant})  # raises for unknown names and options
    if config.init_from:
        model = create_model(**plan.model_options)
        load_weights(
            model, config.init_from, tracking_uri=config.runtime.tracking_uri
        )  # raises for wrong names and shapes


def check_devices(config: PretrainConfig) -> None:
    """Raises UserError when this machine has too few GPUs for the run. A cluster is not checked."""
    if not config.runtime.gpus or config.runtime.address is not None or cluster.is_ray_job():
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    workers = config.runtime.workers
    if count < workers:
        lack = "no GPU" if not count else f"{count} of the {workers} GPUs that the workers need"
        fewer = "fewer --workers, " if count else ""
        raise UserError(
            f"--gpus: this machine has {lack}; to start here, use {fewer}--no-gpus, or --address of a cluster that has them"
        )


def sizes(plan: TrainPlan) -> list[int]:
    """The supported numbers of workers of an elastic run, ascending."""
    config, runtime = plan.config, plan.config.runtime
    if runtime.min_workers is None:
        return [runtime.workers]
    dataset, fitting = open_data(runtime.data), []
    for workers in range(runtime.min_workers, runtime.workers + 1):
        with contextlib.suppress(UserError):  # does not divide the lanes or the batch
            make_plan(config, dataset, workers)
            fitting.append(workers)
    return fitting


# ---------------------------------------------------------------- text


def describe_run(plan: TrainPlan, changes: dict[str, tuple[Any, Any]]) -> str:
    """A summary of the run, with the differences to its recipe (`pipeline.config.diff`)."""
    config, options = plan.config, plan.model_options
    model = f"{config.model.variant}: {parameters(options) / 1e6:.1f}M parameters, {flops(options) / 1e9:.2f} GFLOPs per image"
    elastic = ""
    if config.runtime.min_workers is not None:
        elastic = f", or, elastically, {', '.join(map(str, sizes(plan)))}"
    lines = [
        f"pretrain: {model}",
        f"  data      {plural(plan.samples, 'image')}, {plural(len(plan.classes), 'class')}, fingerprint "
        f"{plan.data_fingerprint}, {config.runtime.data}",
        *describe_mixture(plan),
        f"  schedule  {plural(plan.total, 'step')} of {config.batch_size} ({plan.total / plan.steps_per_epoch:.1f} epochs), warm-up "
        f"{plan.warmup}, {config.schedule.kind}, peak {config.optimizer.lr:g}",
        f"  workers   {plan.workers} x {plural(plan.per_worker, 'image')} ({plural(plan.accumulation, 'micro-batch')} of {plan.micro_batch}), "
        f"ZeRO-{config.engine.zero}, {config.engine.precision}, {plural(plan.lanes, 'lane')}{elastic}",
    ]
    shown = {key.removeprefix("runtime."): values for key, values in changes.items() if key != "runtime.dry_run"}
    lines += [f"  {key} = {new}  (recipe: {old})" for key, (old, new) in shown.items()]
    return "\n".join(lines)


def summarize(result: dict[str, Any]) -> str:
    """The summary at the end of a run as lines for grep. Missing checkpoints have separate lines."""
    unsaved = ", ".join(map(str, result["unsaved"]))
    shown = {
        "steps": result["steps"],
        "images": result["images"],
        "seconds": f"{result['seconds']:.1f}",
        "loss_first": f"{result.get('loss_first', float('nan')):.4f}",
        "loss_last": f"{result.get('loss_last', float('nan')):.4f}",
        "top1": f"{result[names.VAL_TOP1]:.2f}" if names.VAL_TOP1 in result else "none",
        "skipped": result["skipped"],
        "replaced": result["replaced"],
        "checkpoint_wait_seconds": f"{result['checkpoint_wait_seconds']:.2f}",
        "checkpoint_wait_share": f"{result['checkpoint_wait_share']:.2%}",
        "checkpoint": "none" if result["missing"] else result["checkpoint"],
        **({"missing": f"checkpoints of steps {unsaved}"} if unsaved else {}),
    }
    return "\n".join(f"pretrain: {key}={value}" for key, value in shown.items())


def _datasets(config: PretrainConfig) -> dict[str, str]:
    """{role: URI} of every dataset that a run reads."""
    runtime = config.runtime
    fewshot = {"fewshot-train": runtime.fewshot.train, "fewshot-test": runtime.fewshot.test}
    train = {f"train.{i}": uri for i, uri in enumerate(address.uris(runtime.data), 1)}
    found = {**(train if len(train) > 1 else {"train": runtime.data}), "validation": runtime.validation, **fewshot}
    return {role: uri for role, uri in found.items() if uri}


def log_datasets(run: tracking.Run, plan: TrainPlan) -> None:
    """Logs every dataset that a run reads as an input of the MLflow run; datasets
    of a mixture are train.1, train.2, ..."""
    config = plan.config
    for role, uri in _datasets(config).items():
        run.log_dataset(uri, _about_data(uri), role=role)
    if plan.mixture:
        run.set_tags(
            {
                f"{names.DATA_URI}.train": config.runtime.data,
                f"{names.DATA_FINGERPRINT}.train": plan.data_fingerprint,
                **{f"{names.DATA_SHARE}.train.{i}": share for i, share in enumerate(plan.mixture.values(), 1)},
            }
        )


def describe_mixture(plan: TrainPlan) -> list[str]:
    """One line per dataset of a mixture: share, size, epochs in the whole run, and
    classes shared with other datasets."""
    data = open_data(plan.config.runtime.data) if plan.mixture else None
    if not isinstance(data, Mixture):
        return []
    lines = []
    for name, part, share in zip(data.names, data.parts, data.shares, strict=True):
        epochs = float(share) * plan.total * plan.config.batch_size / len(part)
        others = {label for other in data.parts if other is not part for label in other.classes}
        lines.append(
            f"            {float(share):7.2%} {name}: {plural(len(part), 'image')}, {epochs:.2f} epochs of it in the run, "
            f"{plural(len(part.classes), 'class')} ({len(others & set(part.classes))} also in others), fingerprint "
            f"{part.manifest.fingerprint}"
        )
    return lines


def _about_run(plan: TrainPlan, recipe: str) -> Description:
    """The description of the run in MLflow."""
    config, options = plan.config, plan.model_options
    what = (
        f"Pre-training of {config.model.variant} ({parameters(options) / 1e6:.1f}M parameters) "
        f"{f'with the recipe {recipe} ' if recipe else ''}at {config.image_size} px: {plural(plan.total, 'step')} of "
        f"{config.batch_size}, {plan.total / plan.steps_per_epoch:.1f} epochs."
    )
    data = []
    for role, uri in _datasets(config).items():
        manifest = open_dataset(uri).manifest
        data.append(f"{role} {uri} ({plural(manifest.rows, 'image')}, {plural(len(manifest.classes), 'class')})")
    again = (
        f"repeat the command to continue from the newest checkpoint in {config.runtime.output}, or run "
        "`python jobs/pretrain.py --config config.yaml` with the config.yaml among the artifacts."
    )
    return Description(what=what, data=data, to_continue=again)


def _about_data(uri: str) -> dict[str, Any]:
    manifest = open_dataset(uri).manifest
    plain = dataclasses.asdict(manifest)
    plain["shards"] = len(manifest.shards)  # names, offsets and checksums of thousands of shards stay in the dataset
    return plain


# ---------------------------------------------------------------- run.json


def find_record(plan: TrainPlan, output: str) -> dict[str, Any] | None:
    """run.json of this output; None when there is none. Raises UserError when it belongs to another run, or --resume
    forbids it.

    A run with other settings that has no checkpoint is ignored.
    """
    uri, mode = storage.join(output, "run.json"), plan.config.runtime.resume
    if mode == "must" and checkpoints.latest(output) is None:
        raise UserError(f"{output} contains no checkpoint to continue from; check --output, or use --resume auto")
    if not storage.exists(uri):
        return None
    record = read_record(uri)
    if mode == "never":
        raise UserError(f"{output} already contains a run; choose another --output, or --resume auto to continue it")
    identity = plan.identity
    if record["identity"] != configuration.fingerprint(identity):
        if not checkpoints.find(output):
            return None
        old, new = configuration.flatten(record["config"]), configuration.flatten(identity)
        # An option that was added after the run started has its default.
        defaults = configuration.flatten(configuration.to_dict(PretrainConfig()))
        old = {key: defaults[key] for key in new if key in defaults} | old
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
        if changed:
            raise UserError(
                f"{output} contains another run ({'; '.join(changed[:6])}); use its settings to continue it, or choose another "
                "--output"
            )
    own = (record["identity"], configuration.fingerprint(identity))
    for checkpoint in checkpoints.find(output):
        if checkpoint.commit.get("identity", own[0]) not in own:
            raise UserError(
                f"{checkpoint.uri} belongs to another run than {uri}; move it away, or choose another --output"
            )
    return record


def read_record(uri: str) -> dict[str, Any]:
    """Reads and validates run.json. Raises UserError naming the file when it is not valid."""
    record = storage.read_json(uri)
    if isinstance(record, dict) and record.get("format", 1) != checkpoints.FORMAT:
        raise UserError(
            f"{uri}: its format is {record.get('format', 1)}, this program reads {checkpoints.FORMAT}: use the version that wrote it"
        )
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("identity"), str)
        or not isinstance(record.get("config"), dict)
    ):
        raise UserError(f"{uri} is not a valid run.json; remove it, or choose another --output")
    return record


def restore_record(output: str, record: dict[str, Any]) -> None:
    """Writes run.json again if somebody has removed it during the run: without it, the same command is refused."""
    uri = storage.join(output, "run.json")
    with contextlib.suppress(UserError, OSError):  # the error that ended the run matters more
        if not storage.exists(uri):
            logger.warning("%s was removed during the run; it is written again", uri)
            storage.write_json(uri, record)


def claim(plan: TrainPlan, output: str) -> dict[str, Any]:
    """Writes run.json to a new output."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    identity = configuration.fingerprint(plan.identity)
    record = {"format": checkpoints.FORMAT, "identity": identity, "created": created, "config": plan.identity}
    storage.write_json(storage.join(output, "run.json"), record)
    return record
