"""The training loop of one worker: load a batch, step, log, validate, checkpoint.

    result = train(config, Worker(rank=0, world=1, device=device))

Sample order, augmentation, learning rate and dropout masks are functions of the step, so a killed run can resume from
its step alone. The loop does not depend on Ray; `worker.py` runs it under Ray Train."""

import logging
import math
import time
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from models import create_model
from models.cost import flops
from models.variants import parse_variant
from pipeline import config as configuration
from pipeline import metrics as live
from pipeline import storage
from pipeline.credentials import without_logins
from pipeline.data import Loader
from pipeline.data.format import Dataset
from pipeline.data.loading.order import DROPOUT, bits
from pipeline.data.loading.processes import ProcessLoader, default_processes
from pipeline.data.mixture import open_data
from pipeline.errors import plural
from pipeline.hardware import device_memory
from pipeline.tracking import Run, names
from pipeline.training import checkpoint
from pipeline.training.advice import data_wait_advice
from pipeline.training.checkpoint import WRITE_ERRORS, StorageFull
from pipeline.training.config import PretrainConfig
from pipeline.training.engine import Engine, Worker, micro_losses
from pipeline.training.meter import Meter, describe_scores, describe_step, mixture_metrics
from pipeline.training.plan import TrainPlan, loading_threads, make_plan
from pipeline.training.preemption import Preempted, PreemptionVote, ValidationStopped, host_group
from pipeline.training.replacements import Replacements
from pipeline.training.samples import log_batch
from pipeline.training.schedule import learning_rate
from pipeline.training.spikes import LossSpikeGuard
from pipeline.training.validation import FewShot, validate
from pipeline.weights import checkpoints, load_weights
from pipeline.weights.files import read_file

logger = logging.getLogger(__name__)

WAIT_WARNING_SECONDS = 600.0  # between two warnings that training waits for data


def train(
    config: PretrainConfig,
    worker: Worker,
    run: Run | None = None,
    *,
    is_preempted: Callable[[], bool] = lambda: False,
    heartbeat: Callable[..., None] = lambda doing, step=None: None,
) -> dict[str, Any]:
    """Trains from the newest checkpoint (or from scratch) to the end. Returns the final metrics.

    run: the MLflow run, on rank 0. is_preempted: whether this worker has to leave; then all workers save their state
    and raise Preempted. heartbeat: called between operations with the next operation and, in the loop, the step."""
    trainer = Trainer(config, worker, run, heartbeat)
    vote = PreemptionVote(is_preempted, trainer.host_group)
    try:
        return trainer.train(vote)
    finally:
        trainer.close()


class Trainer:
    """The components of a run, created in dependency order, and the loop."""

    def __init__(self, config: PretrainConfig, worker: Worker, run: Run | None, heartbeat: Callable[..., None]):
        self.config, self.worker, self.run, self.heartbeat = config, worker, run, heartbeat
        self.dataset = open_data(config.runtime.data)
        self.plan = plan = plan_for(config, self.dataset, worker)
        if config.runtime.gpus and config.engine.micro_batch is None:
            images = plural(plan.micro_batch, "image")
            self.info("micro-batches of %s fit this GPU (--engine.micro-batch sets another number)", images)
        torch.manual_seed(config.seed)  # the same initial weights on every worker
        model = create_model(**plan.model_options)
        self.flops_per_image = 3 * flops(model.config, patch_keep_rate=config.patch_keep_rate)
        # MFU counts only the patches that are computed.
        computed = 3 * flops(model.config, computed=True, patch_keep_rate=config.patch_keep_rate)
        self.writer = checkpoint.Writer(
            storage.normalise(config.runtime.output),
            model,
            keep_last=config.runtime.keep_last,
            best=names.VAL_TOP1,
            deliver_records=run.flush if run is not None else None,  # so that a lost node does not lose records
        )
        start = self.writer.start()
        self.first = start.step if start is not None else 0
        self.next_wait_warning = 0.0  # monotonic time
        heartbeat("building the engine")
        self._load_weights(model, start)
        self.engine = Engine(
            model,
            config.optimizer,
            config.engine,
            accumulation=plan.accumulation,
            micro_batch=plan.micro_batch,
            device=worker.device,
            ema_decay=config.ema_decay,
        )
        self.guard = LossSpikeGuard(
            factor=config.spike,
            window=config.spike_window,
            stop_after=config.runtime.stop_after_skipped,
            device=worker.device,
            world=worker.world,
            state=start.commit.get("spikes") if start is not None else None,
        )
        self.host_group = host_group(worker.world)
        self.replacements = Replacements(
            limit=config.runtime.max_replaced,
            group=self.host_group,
            state=start.commit.get("replaced") if start is not None else None,
        )
        saved: dict[str, float] = dict(start.commit["metrics"]) if start is not None else {}
        self.losses = {name: value for name, value in saved.items() if not name.startswith("val/")}
        # scores of the last validation and its step: a checkpoint of another step must not carry them
        self.scores = {name: value for name, value in saved.items() if name.startswith("val/")}
        self.scored_step = self.first
        self.unvalidated = start is not None and bool(start.commit.get("unvalidated"))  # was stopped in a validation
        if start is not None:
            self._restore(start)
        self.few_shot = FewShot(plan, worker) if config.runtime.fewshot.train else None
        self.loader = open_loader(plan, self.dataset, self.first, worker)
        self.batches = _endless(self.loader)
        self.began = time.perf_counter()
        self.meter = Meter(worker.device, computed, worker.world, config.engine.precision)

    def train(self, vote: PreemptionVote) -> dict[str, Any]:
        plan, runtime = self.plan, self.config.runtime
        validates = bool(runtime.validation or self.few_shot)
        if validates and self.unvalidated:  # an earlier start was stopped in this validation
            if not self.validate(self.first, vote.poll):
                self.leave(self.first)
            self.save(self.first)
        self.unvalidated = False  # without validation, nothing is left to repeat
        for step in range(self.first, plan.total):
            done = step + 1
            is_last = done == plan.total
            self.heartbeat("waiting for the data of step", done)
            batch = self.meter.wait(self.batches)
            if step == 0 and self.run is not None:
                log_batch(self.run, batch, plan)
            self.heartbeat("in step", done)
            loss = self.train_step(step, batch)
            logs = done % plan.log_every == 0 or done == self.first + 1 or is_last
            if logs:
                self.log(done, loss)
            self.count_skipped(newest=logs)
            if validates and (done % plan.validate_every == 0 or is_last):
                self.validate(done, vote.poll)
            leaves = vote.poll() and (not is_last or self.unvalidated)
            if done % plan.checkpoint_every == 0 or is_last or leaves:
                self.save(done)
            if leaves:
                self.leave(done)
        self.heartbeat("writing the last checkpoint")
        try:
            self.writer.wait()
        except StorageFull as error:  # a retry cannot succeed before the user frees space
            return self.result(missing=str(error))
        return self.result()

    def leave(self, done: int) -> NoReturn:
        """Ends this worker after step `done`, after waiting for its checkpoint. Raises Preempted."""
        try:
            self.writer.wait()
        except (StorageFull, *WRITE_ERRORS) as error:
            self.warn(f"step {done} could not be saved; the next start continues from the last checkpoint: {error}")
            raise Preempted(f"left at step {done} without a checkpoint: {error}") from error
        self.info("step %d/%d  saved, and the workers leave", done, self.plan.total)
        raise Preempted(f"saved at step {done}")

    def train_step(self, step: int, batch: dict[str, Any]) -> Tensor:
        """One optimiser step. Returns this worker's mean loss, on the device."""
        config = self.config
        torch.manual_seed(dropout_seed(config.seed, step, self.worker.rank))
        functions = micro_losses(
            self.engine.upload(batch), self.plan.micro_batch, self.worker.device, config.loss, config.label_smoothing
        )
        loss = self.engine.train_step(functions, self.learning_rate(step), self.guard.skip_step)
        self.guard.note(step + 1, self.engine.dropped)
        self.meter.images += config.batch_size
        return loss

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (0-based)."""
        config, plan = self.config, self.plan
        lengths = {"total": plan.total, "warmup": plan.warmup, "cooldown": plan.cooldown}
        return learning_rate(config.schedule, step, peak=config.optimizer.lr, **lengths)

    def log(self, done: int, loss: Tensor) -> None:
        """Logs the metrics of step `done` (1-based) and the rates since the last call. Synchronises with the device."""
        if self.worker.world > 1:
            dist.all_reduce(loss)
        value = float(loss) / self.worker.world
        rate = self.learning_rate(done - 1)
        metrics = {names.LOSS: value, names.GRAD_NORM: self.engine.grad_norm(), names.LEARNING_RATE: rate}
        metrics |= self.meter.read() | {names.IMAGES_SEEN: done * self.config.batch_size}
        metrics[names.GOODPUT] = self.meter.goodput()
        metrics[names.REPLACED] = self.replacements.update(self.loader.replaced)
        seen = self.loader.images_seen(done)
        metrics |= mixture_metrics(seen)
        self.losses.setdefault("loss_first", value)
        self.losses["loss_last"] = value
        left = self.meter.remaining((self.plan.total - done) * self.config.batch_size)
        parts = describe_step(done, self.plan, metrics, left, seen)
        self.info("%s", "  ".join(parts), parts=parts, step=done, loss=value)
        self.record(metrics, done)
        self.publish(
            {
                live.TRAIN_STEP: done,
                live.TRAIN_LAST_STEP_TIME: time.time(),
                live.TRAIN_LOSS: value,
                live.TRAIN_IMAGES_PER_SECOND: metrics[names.IMAGES_PER_SECOND],
                live.TRAIN_DATA_WAIT: metrics[names.DATA_WAIT],
                live.TRAIN_GOODPUT: metrics[names.GOODPUT],
            }
        )
        waited, now = metrics[names.DATA_WAIT], time.monotonic()
        # the first batch always has to be waited for
        if waited > self.config.runtime.wait_warning and done > self.first + 1 and now >= self.next_wait_warning:
            self.next_wait_warning = now + WAIT_WARNING_SECONDS
            self.warn(data_wait_advice(self.config, self.dataset, waited))

    def count_skipped(self, newest: bool) -> None:
        """Logs skipped steps. `newest` includes the last step, which needs a synchronisation."""
        for step, warning in self.guard.read(newest):
            self.warn(warning)
            self.record({names.SPIKES: self.guard.spikes, names.SKIPPED: self.guard.skipped}, step)

    def validate(self, done: int, leaves: Callable[[], bool]) -> bool:
        """Validates the state after `done` steps. False if the workers have to leave before the end of it."""
        self.heartbeat("validating")
        scores: dict[str, float] = {}
        self.unvalidated = True
        try:
            with self.meter.paused():
                if self.config.runtime.validation:
                    scores = validate(self.engine, self.plan, self.config.runtime.validation, self.worker, leaves)
                if self.few_shot:
                    scores |= self.few_shot(self.engine, leaves)
        except ValidationStopped:
            self.info("step %d/%d  the validation is stopped; the next start repeats it", done, self.plan.total)
            return False
        self.unvalidated = False
        self.scores, self.scored_step = scores, done
        text = describe_scores(scores)
        self.info("step %d/%d  validation  %s", done, self.plan.total, text, top1=scores.get(names.VAL_TOP1))
        self.record({**scores, names.IMAGES_SEEN: done * self.config.batch_size}, done)
        if names.VAL_TOP1 in scores:
            self.publish({live.VALIDATION_TOP1: scores[names.VAL_TOP1]})
        return True

    def save(self, done: int) -> None:
        """Starts writing a checkpoint of the state after `done` steps."""
        self.count_skipped(newest=True)
        self.heartbeat("waiting for the checkpoint before this one")
        epoch, position = divmod(done, self.plan.steps_per_epoch)
        metrics = {**self.losses, **(self.scores if self.scored_step == done else {})}
        about = {
            "epoch": epoch,
            "epoch_step": position,
            "total_steps": self.plan.total,
            "images_seen": done * self.config.batch_size,
            "identity": configuration.fingerprint(self.plan.identity),
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "spikes": self.guard.state(),
            "replaced": self.replacements.state(),
            "loss_scale": self.engine.loss_scale,
            "unvalidated": self.unvalidated,
            "config": {
                "classes": list(self.plan.classes),
                "pretrain": without_logins(configuration.to_dict(self.config)),
            },
        }
        with self.meter.paused():
            self.writer.save(done, self.engine.snapshot, about)

    def result(self, missing: str = "") -> dict[str, Any]:
        """Final metrics of a run that has reached its last step. missing: why its last checkpoint could not be
        written."""
        total, batch_size = self.plan.total, self.config.batch_size
        return {
            "steps": total,
            "images": total * batch_size,
            "checkpoint": self.writer.folder(total),
            "missing": missing,
            "unsaved": self.writer.failed,
            "skipped": self.guard.skipped,
            "replaced": self.replacements.count,
            "train_flops": self.flops_per_image * (total - self.first) * batch_size,
            "checkpoint_wait_seconds": self.writer.waited,
            "checkpoint_wait_share": self.writer.waited / (time.perf_counter() - self.began),
            **self.losses,
            **self.scores,
        }

    def close(self) -> None:
        self.batches.close()
        self.loader.close()
        self.writer.close()

    def _load_weights(self, model: nn.Module, start: checkpoints.Checkpoint | None) -> None:
        """The weights with which the run starts or continues. Rank 0 reads them and sends them to the other workers."""
        if self.worker.rank == 0 and start is not None:
            name = "model.safetensors"
            tensors, _ = read_file(storage.join(start.uri, name), start.commit["files"][name]["sha256"])
            model.load_state_dict(tensors)
        elif self.worker.rank == 0 and self.config.init_from:
            report = load_weights(model, self.config.init_from, tracking_uri=self.config.runtime.tracking_uri)
            self.info("%s", report)
        if self.worker.world > 1 and (start is not None or self.config.init_from):
            share_weights(model, self.worker.device)

    def _restore(self, start: checkpoints.Checkpoint) -> None:
        with checkpoint.StateReader(start.uri, list(start.commit["files"])) as reader:
            self.engine.restore(reader.read, reader.kinds, start.step - self.guard.skipped)
        self.engine.loss_scale = start.commit.get("loss_scale", {})
        self.info("resumed from %s on %s", start.uri, plural(self.worker.world, "worker"))

    # ------------------------------------------------------------ logging, on rank 0

    def info(self, text: str, *values: Any, **about: Any) -> None:
        """about: attributes of the record. `launch` shows `step`, `loss` and `top1` as progress; `logs` shortens
        `parts`."""
        if self.worker.rank == 0:
            logger.info(text, *values, extra=about)

    def warn(self, text: str) -> None:
        if self.worker.rank == 0:
            logger.warning("%s", text)

    def record(self, metrics: dict[str, float], done: int) -> None:
        if self.run is not None:
            self.run.log(metrics, done)

    def publish(self, values: dict[str, float]) -> None:
        if self.worker.rank == 0:
            live.publish(values, run=self.config.runtime.output)


def plan_for(config: PretrainConfig, dataset: Dataset, worker: Worker) -> TrainPlan:
    """The plan for the GPU of this worker, limited by the worker with the least memory. A collective on GPUs."""
    if worker.device.type != "cuda":
        return make_plan(config, dataset, worker.world)
    memory = torch.tensor(device_memory(worker.device), dtype=torch.float64, device=worker.device)
    if worker.world > 1:
        dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    return make_plan(config, dataset, worker.world, gpu_memory=float(memory))


@torch.no_grad()
def share_weights(model: nn.Module, device: torch.device) -> None:
    """Broadcasts the weights of rank 0 to all workers, one tensor at a time. A collective."""
    for tensor in model.state_dict().values():
        there = tensor.to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """torch's seed for one step (0-based) of one worker; it determines dropout, stochastic depth and masks."""
    return int(bits(seed, DROPOUT, step, rank)) >> 1


def open_loader(plan: TrainPlan, dataset: Dataset, first: int, worker: Worker) -> Loader:
    """A loader of this worker's share of the batches, starting at global step `first`."""
    config, runtime = plan.config, plan.config.runtime
    epoch, step = divmod(first, plan.steps_per_epoch)
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rank": worker.rank,
        "world_size": worker.world,
        "lanes": plan.lanes,
        "epoch": epoch,
        "step": step,
        "augment": config.augment,
        "shuffle_window": config.shuffle_window,
        "patch_keep_rate": config.patch_keep_rate,
        "patch_size": parse_variant(config.model.variant).patch if config.patch_keep_rate < 1 else None,
        "threads": loading_threads(config),
        "drop_last": True,
        "cache_dir": runtime.cache,
        "max_replaced": runtime.max_replaced,
    }
    processes = runtime.loading_processes or 1
    if runtime.gpus and runtime.loading_processes is None:
        processes = default_processes(dataset, options["threads"], plan.lanes // worker.world)
    if processes == 1:
        return Loader(dataset, **options)
    return ProcessLoader(dataset, processes=processes, **options)


def _endless(loader: Loader) -> Generator[dict[str, Any], None, None]:
    """Iterates over batches, epoch after epoch."""
    while True:
        yield from loader
