"""What one training worker does: fetch, step, log, validate, checkpoint.

`train_worker` runs in every Ray Train worker. Everything that decides which image is seen when, at what learning rate and
with which dropout mask is a function of the step, so that a run killed anywhere continues with nothing but its step.
"""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from models import create_model
from models.cost import flops
from models.variants import parse_variant
from pipeline import config as configuration
from pipeline import storage
from pipeline.data import Loader, open_dataset
from pipeline.data.format import Dataset
from pipeline.errors import UserError
from pipeline.tracking import Run, attach_run, names
from pipeline.tracking.system import SystemMetrics
from pipeline.training import checkpoint
from pipeline.training.engine import Engine, check_options, micro_losses
from pipeline.training.recipes import PretrainConfig
from pipeline.training.schedule import learning_rate
from pipeline.training.survival import Leave, Notice, Stall, clear_stale_locks, out_of_memory
from pipeline.training.validation import FewShot, validate
from pipeline.training.watch import Watch, data_wait_advice

# Dense bf16 peak of one device in FLOP/s, from the data sheets (no sparsity); MFU is relative to it.
PEAK_FLOPS = {
    "H200": 989.5e12,
    "H100": 989.5e12,
    "GH200": 989.5e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A config with every horizon in steps and every share in images; the same on the driver and on each worker."""

    config: PretrainConfig
    classes: tuple[str, ...]
    samples: int
    channels: int
    data_fingerprint: str
    workers: int
    lanes: int
    per_worker: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    total: int
    warmup: int
    cooldown: int
    log_every: int
    validate_every: int
    checkpoint_every: int

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `create_model`."""
        return model_options(self.config, len(self.classes), self.channels)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two launches the same run: everything that decides which numbers are computed."""
        from pipeline.training.recipes import OPERATIONAL

        plain = configuration.to_dict(self.config)
        kept = {key: value for key, value in plain.items() if key not in OPERATIONAL}
        kept["engine"] = {"precision": self.config.engine.precision}
        return {**kept, "lanes": self.lanes, "data": self.data_fingerprint}


def model_options(config: PretrainConfig, num_classes: int, channels: int = 3) -> dict[str, Any]:
    """Arguments of `create_model` for a run on so many classes."""
    options: dict[str, Any] = {k: v for k, v in configuration.to_dict(config.model).items() if v is not None}
    if parse_variant(config.model.variant).depth == 0:  # a ResNet has no tokens to pool, place or drop
        options = {k: v for k, v in options.items() if k in ("variant", "head_bias")}
    if config.loss == "masked":
        num_classes = 0
        options = {k: v for k, v in options.items() if k not in ("pre_logits", "head_bias")} | {"mpp": config.target}
    if channels != 3:
        options["channels"] = channels
    return {"num_classes": num_classes, "image_size": config.image_size, **options}


def make_plan(config: PretrainConfig, dataset: Dataset, workers: int) -> Plan:
    """Resolves a config against its dataset. Raises UserError for whatever could not work."""
    from pipeline.data.loading.order import default_lanes

    batch = config.batch_size
    if batch < 1 or workers < 1:
        raise UserError(f"batch_size {batch} and workers {workers} must be at least 1")
    if config.loss != "masked" and not dataset.classes:
        raise UserError(f"{config.data} has no classes; train on labelled data, or with --loss masked")
    if dataset.multilabel and config.loss == "softmax":
        raise UserError(f"{config.data} has several labels per image; use --loss sigmoid (and --model.head-bias -10)")
    if batch > len(dataset):
        raise UserError(
            f"batch_size {batch} is larger than {config.data} with its {len(dataset)} images; use a smaller batch"
        )
    lanes = config.lanes or default_lanes(batch, len(dataset))
    if batch % lanes:
        raise UserError(
            f"batch_size {batch} is not divisible by lanes {lanes}; use --lanes with a divisor of the batch"
        )
    if lanes % workers:
        fitting = [n for n in range(1, lanes + 1) if lanes % n == 0]
        raise UserError(
            f"{workers} workers do not divide the {lanes} lanes of the sample order; use --workers {fitting[:8]} or --lanes "
            f"with a multiple of {workers} that divides the batch ({batch})"
        )
    check_options(config.engine, config.optimizer, gpu=config.gpus)
    if config.optimizer.name == "muon" and parse_variant(config.model.variant).depth == 0:
        raise UserError(
            "optimizer.name muon trains the matrices of transformer blocks, a ResNet has none; use adamw or sgd"
        )
    per_worker = batch // workers
    # with fewer workers than planned each has more images, and no more memory
    micro = config.engine.micro_batch or math.gcd(per_worker, batch // config.workers)
    if per_worker % micro:
        raise UserError(
            f"engine.micro_batch {micro} does not divide the {per_worker} images of each worker (batch_size {batch} over "
            f"{workers} workers)"
        )
    image = dataset.manifest.image
    if dataset.encoding == "patches":
        patch = parse_variant(config.model.variant).patch
        if (image["height"], image["width"], image["patch_size"]) != (config.image_size, config.image_size, patch):
            raise UserError(
                f"{config.data} holds {image['height']}x{image['width']} images cut into patches of {image['patch_size']}, but the "
                f"run asks for image_size {config.image_size} and {config.model.variant}; prepare with --size and --patch-size "
                "to match, or use encoding jpeg"
            )
        if config.augment.crop == "inception" or config.augment.randaug_layers:
            raise UserError(
                f"{config.data} is already cut into patches: only flips are possible; use --augment.crop squash"
            )
    elif config.augment.size != config.image_size:
        raise UserError(
            f"augment.size {config.augment.size} differs from image_size {config.image_size}; give both the same"
        )
    if not 0 < config.keep_tokens <= 1:
        raise UserError(f"keep_tokens {config.keep_tokens} is not a share in (0, 1]")
    if config.keep_tokens < 1 and parse_variant(config.model.variant).stem is not None:
        raise UserError(f"keep_tokens drops patches of pixels; {config.model.variant} sees whole images: leave it at 1")
    if config.keep_tokens < 1 and config.augment.mixup:
        raise UserError("keep_tokens leaves different patches of each image, mixup blends whole images: choose one")
    steps_per_epoch = len(dataset) // lanes // (batch // lanes)
    units = {"batch_size": batch, "examples_per_epoch": steps_per_epoch * batch}
    total = configuration.steps(config.steps, **units)
    if total < 1:
        raise UserError(f'steps "{config.steps}" is less than one step of {batch} images')

    def horizon(text: str) -> int:
        return configuration.steps(text, **units, total_steps=total)

    return Plan(
        config=config,
        classes=tuple(dataset.classes),
        samples=len(dataset),
        channels=image.get("channels", 3),
        data_fingerprint=dataset.manifest.fingerprint,
        workers=workers,
        lanes=lanes,
        per_worker=per_worker,
        micro_batch=micro,
        accumulation=per_worker // micro,
        steps_per_epoch=steps_per_epoch,
        total=total,
        warmup=min(horizon(config.schedule.warmup), total),
        cooldown=horizon(config.schedule.cooldown),
        log_every=max(1, horizon(config.log_every)),
        validate_every=max(1, horizon(config.validate_every)),
        checkpoint_every=max(1, horizon(config.checkpoint_every)),
    )


# ---------------------------------------------------------------- the worker


def train_worker(task: dict[str, Any]) -> None:
    """The loop of one worker. `task`: config (plain), run_id, tracking_uri, and two ways back to the driver: say(line), done(result)."""
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal.execution.context import get_train_context

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = configuration.from_dict(PretrainConfig, task["config"])
    device = ray.train.torch.get_device()
    say = task["say"] if rank == 0 else lambda line: None
    run = attach_run(task["run_id"], task["tracking_uri"], resume=True) if rank == 0 else None
    local_rank = context.get_local_rank()
    preemption = get_train_context().preemption_context  # the public way to it is a barrier of all workers
    try:
        with contextlib.ExitStack() as stack:
            stall = stack.enter_context(Stall(config.stalled_after, rank, task["say"]))
            for path in clear_stale_locks():
                task["say"](f"removed {path}: whoever was building this extension has been killed")
            if local_rank == 0:
                node = f"node-{context.get_node_rank()}"
                stack.enter_context(SystemMetrics(task["run_id"], task["tracking_uri"], node=node))
            result = train(
                config,
                rank=rank,
                world=world,
                local_rank=local_rank,
                device=device,
                say=say,
                run=run,
                tracking_uri=task["tracking_uri"],
                told=lambda: preemption.preemption_info is not None,
                moved=stall.now,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = out_of_memory(config, world, host=isinstance(error, MemoryError))
        # in the first step it would happen again; later something else may have taken the memory
        raise (UserError if stall.step == stall.first else RuntimeError)(f"worker {rank}: {text}") from error
    finally:
        if run is not None:
            run.finish()
    if rank == 0:
        task["done"](result)


def train(
    config: PretrainConfig,
    *,
    rank: int,
    world: int,
    local_rank: int,
    device: torch.device,
    say: Callable[[str], None],
    run: Run | None,
    tracking_uri: str | None = None,
    told: Callable[[], bool] = lambda: False,
    moved: Callable[..., None] = lambda doing, step=None: None,
) -> dict[str, Any]:
    """Trains from the newest checkpoint (or from scratch) to the end; needs an initialised process group when world > 1.

    told: whether this worker has been told to leave: then all save their state and raise Leave. moved: is called whenever
    something is done, with what comes next and, in the loop, the step.
    """
    dataset = open_dataset(config.data)
    plan = make_plan(config, dataset, world)
    total, output = plan.total, storage.normalise(config.output)

    torch.manual_seed(config.seed)  # the same initial weights on every worker
    model = create_model(**plan.model_options)
    train_flops = 3 * flops(model.config, patch_keep_rate=config.keep_tokens)
    writer = checkpoint.Writer(
        output,
        model,
        keep=config.keep,
        best=names.VAL_TOP1,
        say=say,
        before_commit=run.flush if run is not None else None,  # what a lost node had not delivered yet would be missing
    )
    notice = Notice(told, world)
    start = writer.start()
    moved("building the engine")
    if start is not None:
        _load_weights(model, storage.join(start.uri, "model.safetensors"))
    elif config.init_from:
        from pipeline.weights import load_weights

        say(str(load_weights(model, config.init_from, tracking_uri=tracking_uri)))
    engine = Engine(
        model,
        config.optimizer,
        config.engine,
        accumulation=plan.accumulation,
        micro_batch=plan.micro_batch,
        device=device,
        average=config.average,
    )
    first = start.step if start is not None else 0
    watch = Watch(
        factor=config.spike,
        window=config.spike_window,
        stop_after=config.stop_after_skipped,
        device=device,
        world=world,
        state=start.commit.get("watch") if start is not None else None,
    )
    if start is not None:
        with checkpoint.StateReader(start.uri, list(start.commit["files"])) as reader:
            engine.restore(reader.read, reader.kinds, first - watch.skipped)
        engine.loss_scale = start.commit.get("loss_scale", {})
        say(f"resumed from {start.uri} on {world} workers")

    few_shot = FewShot(plan) if config.fewshot.train else None
    losses: dict[str, float] = dict(start.commit["metrics"]) if start else {}
    batches = _batches(plan, first, rank, world)
    began = time.perf_counter()
    # MFU counts only what is really computed
    computed = 3 * flops(model.config, computed=True, patch_keep_rate=config.keep_tokens)
    meter = Meter(device, computed, world, config.engine.precision)
    try:
        for step in range(first, total):
            moved("waiting for the data of step", step + 1)
            batch = meter.wait(batches)
            moved("in step", step + 1)
            rate = learning_rate(
                config.schedule, step, peak=config.optimizer.lr, total=total, warmup=plan.warmup, cooldown=plan.cooldown
            )
            torch.manual_seed(hash((config.seed, step, rank)) & 0x7FFFFFFF)  # dropout and masks
            loss = engine.train_step(
                micro_losses(batch, plan.micro_batch, device, config.loss, config.label_smoothing), rate, watch.veto
            )
            meter.images += config.batch_size
            done = step + 1

            log = done % plan.log_every == 0 or done in (first + 1, total)
            if log:
                if world > 1:
                    dist.all_reduce(loss)
                value = float(loss) / world
                metrics = {names.LOSS: value, names.GRAD_NORM: engine.grad_norm(), names.LEARNING_RATE: rate}
                metrics |= meter.read() | {names.IMAGES_SEEN: done * config.batch_size}
                losses.setdefault("loss_first", value)
                losses["loss_last"] = value
                say(_line(done, plan, metrics, meter.remaining((total - done) * config.batch_size)))
                if run is not None:
                    run.log(metrics, done)
                waited = metrics[names.DATA_WAIT] > config.wait_warning
                if waited and done > first + 1:  # the first batch is always waited for
                    say(data_wait_advice(config, dataset, metrics[names.DATA_WAIT]))
            warning = watch.after(done, engine.skipped)
            if warning:
                say(warning)
                if run is not None:
                    run.log({names.SPIKES: watch.spikes, names.SKIPPED: watch.skipped}, done)
            if (config.validation or few_shot) and (done % plan.validate_every == 0 or done == total):
                moved("validating")
                scores: dict[str, float] = {}
                with meter.paused():
                    if config.validation:
                        scores = validate(engine, plan, config.validation, rank, world, device)
                    if few_shot:
                        scores |= few_shot(engine, rank, world, device)
                losses |= scores
                say(f"step {done}/{total}  validation  {_scores(scores)}")
                if run is not None:
                    run.log({**scores, names.IMAGES_SEEN: done * config.batch_size}, done)
            leave = notice.heard() and done < total
            if done % plan.checkpoint_every == 0 or done == total or leave:
                moved("waiting for the checkpoint before this one")
                with meter.paused():
                    writer.save(done, engine.snapshot, _about(plan, done, losses, watch, engine))
            if leave:
                writer.wait()
                say(f"step {done}/{total}  saved, and the workers leave: a node goes away or their number changes")
                raise Leave(f"saved at step {done}")
        moved("writing the last checkpoint")
        writer.wait()
    finally:
        batches.close()
        writer.close()
    return {
        "steps": total,
        "images": total * config.batch_size,
        "checkpoint": checkpoint.folder(output, total),
        "skipped": watch.skipped,
        "train_flops": train_flops * (total - first) * config.batch_size,
        "checkpoint_wait_seconds": writer.waited,
        "checkpoint_wait_share": writer.waited / (time.perf_counter() - began),
        **losses,
    }


def _load_weights(model: nn.Module, uri: str) -> None:
    from safetensors.torch import load

    model.load_state_dict(load(storage.read_bytes(uri)))


def _batches(plan: Plan, first: int, rank: int, world: int) -> Generator[dict[str, Any], None, None]:
    """This worker's share of global step `first` and all that follow, epoch after epoch."""
    config = plan.config
    epoch, step = divmod(first, plan.steps_per_epoch)
    with Loader(
        open_dataset(config.data),
        batch_size=config.batch_size,
        seed=config.seed,
        rank=rank,
        world_size=world,
        lanes=plan.lanes,
        epoch=epoch,
        step=step,
        augment=config.augment,
        shuffle_window=config.shuffle_window,
        keep_tokens=config.keep_tokens,
        patch_size=parse_variant(config.model.variant).patch if config.keep_tokens < 1 else None,
        threads=config.threads or max(1, int(config.cpus_per_worker)),
        drop_last=True,
        cache_dir=config.cache,
    ) as loader:
        while True:
            yield from loader


def _about(plan: Plan, step: int, metrics: dict[str, float], watch: Watch, engine: Engine) -> dict[str, Any]:
    """What COMMIT.json and config.json say besides files and weights."""
    epoch, position = divmod(step, plan.steps_per_epoch)
    return {
        "epoch": epoch,
        "epoch_step": position,
        "total_steps": plan.total,
        "images_seen": step * plan.config.batch_size,
        "identity": configuration.fingerprint(plan.identity),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "watch": watch.state(),
        "loss_scale": engine.loss_scale,
        "config": {"classes": list(plan.classes), "pretrain": configuration.to_dict(plan.config)},
    }


# ---------------------------------------------------------------- measuring


class Meter:
    """Rates between log lines: images per second, share of time spent waiting for data, MFU, memory."""

    def __init__(self, device: torch.device, train_flops: int, world: int, precision: str):
        self.device, self.train_flops = device, train_flops
        self.peak = peak_flops(device, precision) * world
        self.images, self.waited = 0, 0.0
        self.since = time.perf_counter()
        self.rate = 0.0
        self.batch = 0

    def wait(self, batches: Iterator[dict]) -> dict:
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def paused(self) -> "Meter":
        """`with meter.paused():` - validation and snapshots do not count as training time."""
        return self

    def __enter__(self) -> None:
        self._paused = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.since += time.perf_counter() - self._paused

    def read(self) -> dict[str, float]:
        """Values since the last read."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        self.rate = self.images / seconds
        values = {
            names.IMAGES_PER_SECOND: self.rate,
            names.MFU: self.rate * self.train_flops / self.peak,
            names.DATA_WAIT: min(self.waited / seconds, 1.0),
            names.MEMORY_GB: memory_gb(self.device),
        }
        self.images, self.waited, self.since = 0, 0.0, now
        return values

    def remaining(self, images: float) -> float:
        """Seconds left for so many images at the last rate."""
        return images / self.rate if self.rate else float("nan")


def peak_flops(device: torch.device, precision: str = "fp32") -> float:
    """FLOP/s of one device: the data sheet's dense bf16 number for GPUs; on a CPU measured, a matrix product in `precision`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAK_FLOPS.items():
            if key in name:
                return value
        return float("inf")  # an unknown GPU shows 0% and not a wrong number
    size = 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    # Half a second: the first products are slow, and so is a shared core at times.
    best, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def _scores(scores: dict[str, float]) -> str:
    shown = {
        names.VAL_TOP1: "top-1 {:.2%}",
        names.VAL_LOSS: "loss {:.4f}",
        names.FEWSHOT_TOP1: "few-shot top-1 {:.2%}",
        names.FEWSHOT_SECONDS: "in {:.1f} s",
    }
    return "  ".join(text.format(scores[name]) for name, text in shown.items() if name in scores)


def _line(step: int, plan: Plan, metrics: dict[str, float], seconds: float) -> str:
    minutes, rest = divmod(int(seconds) if seconds == seconds else 0, 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return (
        f"step {step}/{plan.total}  epoch {step / plan.steps_per_epoch:.2f}  loss {metrics[names.LOSS]:.4f}  "
        f"grad {metrics[names.GRAD_NORM]:.3f}  lr {metrics[names.LEARNING_RATE]:.2e}  "
        f"{metrics[names.IMAGES_PER_SECOND]:.0f} img/s  mfu {metrics[names.MFU]:.1%}  wait {metrics[names.DATA_WAIT]:.1%}  "
        f"{metrics[names.MEMORY_GB]:.1f} GB  eta {eta}"
    )
