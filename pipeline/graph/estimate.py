"""The estimated cost of a stage: from its last run or, before its first run, from the same data as jobs/plan.py.

Nothing here imports torch. The FLOPs of a transformer come from a formula, so estimates for 1,000 stages take a fraction
of a second.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.variants import parse_variant
from pipeline import config as configuration
from pipeline import storage
from pipeline.errors import UserError
from pipeline.graph import cost
from pipeline.graph.instances import Instance
from pipeline.graph.plan import Plan
from pipeline.hardware import find_gpu
from pipeline.operations.planning.config import CORPORA, PREPARE_SECONDS

START_SECONDS = {"prepare": 8.0, "vtab": 8.0, "pretrain": 20.0, "transfer": 12.0, "promote": 6.0}
"""Seconds from the start of a job to its first unit of work, on two cores; 5 s for jobs not listed."""
CPU_FLOPS = 2e10  # per second and core; measured with the demo's pre-training on two cores
MFU = 0.4  # the default of jobs/plan.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The estimated cost of an instance. source: "last run" or "plan"."""

    seconds: float
    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    dollars: float | None = None
    source: str = "plan"


def estimate(plan: Plan, name: str, cpus: float) -> Estimate | None:
    """The estimated cost of one instance; None if there is no basis for one. cpus: CPUs of the executor, for a job that
    uses the whole machine."""
    instance = plan.instances[name]
    record = plan.state.records.get(name)
    if record is not None and record.versions:
        seconds, source = float(record.versions[-1].cost.get("seconds", 0.0)), "last run"
    else:
        try:
            work = _SECONDS.get(instance.kind.name, lambda plan, instance, cpus: 0.0)(
                plan, instance, _cpus(instance, cpus)
            )
        except (UserError, OSError, ZeroDivisionError):
            return None
        if work is None:
            return None
        seconds, source = START_SECONDS.get(instance.kind.name, 5.0) + work, "plan"
    hours = {"cpu_hours": _cpus(instance, cpus) * seconds / 3600, "gpu_hours": _gpus(plan, instance) * seconds / 3600}
    return Estimate(seconds=seconds, source=source, dollars=cost.dollars(plan.pipeline.prices, hours), **hours)


def _gpus(plan: Plan, instance: Instance) -> float:
    """GPUs that an instance requests or, if they are optional, at most as many as the training of its checkpoint has."""
    trained = _trained(plan, instance)
    return cost.gpus(instance, trained.gpus if trained else 0.0)


def _trained(plan: Plan, instance: Instance) -> Instance | None:
    """The pre-training that produces the checkpoint of an instance."""
    found = (plan.instances[a.instance] for a in instance.reads.get("checkpoint", ()) if a.instance)
    return next((one for one in found if one.kind.name == "pretrain"), None)


def _cpus(instance: Instance, cpus: float) -> float:
    mine = cpus if instance.cpus is None else instance.cpus
    return mine if mine != float("inf") else 1.0


def _prepare(plan: Plan, instance: Instance, cpus: float) -> float | None:
    images = _images(plan, instance)
    return None if images is None else images * PREPARE_SECONDS / cpus


def _images(plan: Plan, instance: Instance) -> int | None:
    """The approximate number of images that a preparation reads."""
    total = 0
    for address in instance.reads["source"]:
        if address.instance is not None:
            return None
        if address.text.startswith("demo:"):
            total += 1797
        else:
            total += _files(storage.normalise(address.text))
    return min(total, instance.config.sample or total)


@functools.cache
def _files(uri: str) -> int:
    return len(storage.list_files(uri))


def _pretrain(plan: Plan, instance: Instance, cpus: float) -> float | None:
    config = instance.config
    found = _size(plan, instance, "data")
    images = found[0] if found else None
    steps = configuration.steps(config.steps, batch_size=config.batch_size, examples_per_epoch=images)
    work = 3 * forward_flops(config.model, config.image_size, config.patch_keep_rate) * steps * config.batch_size
    return work / _rate(plan, instance, cpus)


def _transfer(plan: Plan, instance: Instance, cpus: float) -> float | None:
    from pipeline.transfer.protocols import FineTune
    from pipeline.transfer.suites import build_tasks

    trained = _trained(plan, instance)
    if trained is None:
        return None
    training = trained.config
    model = {"variant": training.model.variant, "image_size": training.image_size}
    config = dataclasses.replace(instance.config, data=instance.config.data or "-")
    work = 0.0
    for task in build_tasks(config, model):
        if isinstance(task.protocol, FineTune):
            lrs = len(task.protocol.lrs)
            jobs = config.seeds + (lrs if lrs > 1 else 0)
            flops = forward_flops(training.model, task.protocol.resolution, 1.0)
            work += jobs * 3 * flops * task.protocol.steps * task.protocol.batch_size
    return work / _rate(plan, instance, cpus)


def _rate(plan: Plan, instance: Instance, cpus: float) -> float:
    if gpus := _gpus(plan, instance):
        return gpus * find_gpu(plan.pipeline.prices.gpu).peak_flops * MFU
    return cpus * CPU_FLOPS


def _size(plan: Plan, instance: Instance, field: str) -> tuple[int, int] | None:
    """(images, classes) of the dataset that a stage reads or, if it does not exist yet, of the corpus that the name of
    the recipe contains."""
    sizes = []
    for address in instance.reads.get(field, ()):
        place = (
            storage.join(plan.outputs.get(address.instance or "", ""), address.below)
            if address.instance
            else address.text
        )
        is_there = address.instance is None or address.instance in plan.outputs
        if is_there and (found := _dataset(place)) is not None:
            sizes.append(found)
    if sizes and len(sizes) == len(instance.reads.get(field, ())):  # several data sets are a mixture
        return sum(images for images, _ in sizes), max(classes for _, classes in sizes)
    return next((size for key, size in CORPORA.items() if key in (instance.recipe or "")), None)


@functools.cache
def _dataset(place: str) -> tuple[int, int] | None:
    from pipeline.data import open_dataset

    try:
        dataset = open_dataset(place)
    except (UserError, OSError):
        return None
    return len(dataset), len(dataset.classes)


@functools.lru_cache(maxsize=1024)
def _transformer_flops(variant: str, depth: int | None, side: int, keep: float) -> float:
    shape = parse_variant(variant)
    blocks = shape.depth if depth is None else depth
    if blocks == 0 or shape.stem is not None:  # convolutional stem: about 20 GFLOPs at 224 px, proportional to the area
        return 20e9 * (side / 224) ** 2
    tokens, width = (side / shape.patch) ** 2 * keep, shape.width
    return blocks * (8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * shape.mlp)


def forward_flops(model: Any, side: int, keep: float) -> float:
    """Approximate FLOPs of the forward pass of one image (2 x multiply-accumulates)."""
    return _transformer_flops(model.variant, model.depth, side, keep)


_SECONDS: Mapping[str, Any] = {"prepare": _prepare, "pretrain": _pretrain, "transfer": _transfer}
