"""The planner for runs on GPUs: micro-batch, CPU cores, and advice for running out of memory."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity

from models import create_model
from pipeline.config import parse_recipe
from pipeline.errors import UserError
from pipeline.hardware import GPUS, identify_gpu
from pipeline.operations.planning.config import PlanConfig
from pipeline.operations.planning.estimate import plan
from pipeline.operations.planning.preview import dry_run, stand_in
from pipeline.operations.planning.table import plan_table
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.memory import activations
from pipeline.training.plan import check_values, make_plan, memory_remedies
from pipeline.training.recipes import RECIPES
from tests.runs import changed


def resolved(recipe, workers=8, gpu_memory=None, **changes):
    config = changed(RECIPES[recipe](), workers=workers, **changes)
    data = stand_in(config, recipe, UserError("no dataset here"))
    return make_plan(config, data, workers, gpu_memory=gpu_memory)


@pytest.mark.parametrize(("recipe", "images"), [("l16_imagenet21k_90ep", 256), ("h14_jft300m_14ep", 128)])
def test_a_large_model_on_eight_gpus_accumulates_over_micro_batches_that_fit(recipe, images):
    taken = resolved(recipe)
    assert (taken.per_worker, taken.micro_batch, taken.accumulation) == (512, images, 512 // images)
    smaller = resolved(recipe, gpu="a100-40gb")
    assert smaller.micro_batch < images
    assert resolved(recipe, gpu_memory=40e9).micro_batch == smaller.micro_batch


def test_the_dry_run_shows_the_micro_batch_that_the_run_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = changed(RECIPES["l16_imagenet21k_90ep"](), gpu="a100-40gb")
    text = dry_run(config, "l16_imagenet21k_90ep", {})
    assert "4 micro-batches of 128" in text
    assert "on 8 x a100-40gb" in text
    assert "micro_batch: 128" in text


def test_a_given_micro_batch_stays_and_a_cpu_takes_all_images():
    engine = replace(RECIPES["l16_imagenet21k_90ep"]().engine, micro_batch=16)
    assert resolved("l16_imagenet21k_90ep", engine=engine).micro_batch == 16
    assert resolved("l16_imagenet21k_90ep", gpus=False).micro_batch == 512


def test_a_model_too_large_for_one_image_is_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"needs \d+ GB.*a GPU has 4 GB.*--engine.zero 2.*--engine.micro-batch 1"):
        resolved("h14_jft300m_14ep", gpu_memory=4e9)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UserError, match='unknown GPU "h1000"'):
        resolved("b16_imagenet", gpu="h1000")


ENGINES = [
    EngineConfig(zero=zero, precision=precision, compile=compiled, offload=offload, activation_checkpointing=recomputed,
                 checkpoint_keeps="products" if recomputed else "nothing", gradient_precision=gradients)
    for zero, precision, compiled, offload, recomputed, gradients in itertools.product(
        (0, 1, 2, 3), ("fp32", "bf16"), (False, True), (False, True), (False, True), ("model", "fp32")
    )
]  # fmt: skip


def is_valid(config):
    try:
        check_values(config)
    except UserError:
        return False
    return True


@functools.cache
def settings(flags):
    """{field of EngineConfig: value} that a command line sets."""
    base = RECIPES["b16_imagenet"]
    engine = parse_recipe(flags.split(), {"it": base}, "it", prog="x", description="")[0].engine
    names = [flag.removeprefix("--engine.").removeprefix("no-") for flag in flags.split() if flag.startswith("--")]
    return {name.replace("-", "_"): getattr(engine, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize(("optimizer", "number"), [("adamw", 52), ("muon", 28)])
def test_every_remedy_goes_together_with_the_settings_of_the_run(optimizer, number):
    base = changed(RECIPES["b16_imagenet"](), optimizer=OptimizerConfig(name=optimizer))
    configs = [config for config in (changed(base, engine=engine) for engine in ENGINES) if is_valid(config)]
    assert len(configs) >= number
    for config in configs:
        for remedy in memory_remedies(config):
            taken = replace(config, engine=replace(config.engine, **settings(remedy.partition(" (")[0])))
            check_values(taken)
            assert taken.engine != config.engine, remedy


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L400", None),
    ],
)
def test_gpus_are_recognised_by_their_whole_name(name, kind):
    assert identify_gpu(name) == kind


def test_no_two_gpus_share_a_name():
    names = [name for gpu in GPUS.values() for name in gpu.names]
    assert len(set(names)) == len(names)


def test_the_plan_says_how_many_cpu_cores_feed_a_gpu():
    weak, strong = (
        plan(PlanConfig(training=replace(RECIPES[name](), steps="1epochs"), gpus=2, images=1e6, classes=10), name)
        for name in ("b16_imagenet", "s16_imagenet_90ep")
    )
    assert weak["data"]["jpeg"]["cores_per_gpu"] < strong["data"]["jpeg"]["cores_per_gpu"]
    assert strong["data"]["patches"]["cores_per_gpu"] == 2
    short = plan(
        PlanConfig(training=changed(RECIPES["s16_imagenet_90ep"](), cpus_per_worker=4), gpus=2), "s16_imagenet"
    )
    needed = short["data"]["jpeg"]["cores_per_gpu"]
    text = plan_table(short)
    assert "the recipe requests 4" in text
    assert f"give --cpus-per-worker {needed}," in text
    assert 4 < needed <= RECIPES["s16_imagenet_90ep"]().runtime.cpus_per_worker


def allocated(model, images) -> int:
    """Peak bytes allocated in a forward and backward pass, without weights and gradients."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(images).float().sum().backward()
        model.zero_grad(set_to_none=True)
    events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        used += size
        peak = max(peak, used)
    return peak


@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(precision="fp32"),
        EngineConfig(precision="fp32", activation_checkpointing=True),
        EngineConfig(precision="fp32", activation_checkpointing=True, checkpointed_blocks=4),
        EngineConfig(precision="fp32", activation_checkpointing=True, checkpoint_keeps="products"),
    ],
    ids=["nothing recomputed", "everything", "four of eight blocks", "all but products"],
)
def test_recomputation_uses_the_planned_memory(engine):
    options = {"variant": "Ti/16", "image_size": 224, "num_classes": 10, "depth": 8, "pool": "gap"}
    torch.manual_seed(0)
    model = create_model(**options).train()
    if engine.activation_checkpointing:
        model.set_grad_checkpointing(True, engine.checkpointed_blocks, engine.checkpoint_keeps == "products")
    few, many = (allocated(model, torch.zeros(n, 3, 224, 224)) for n in (2, 6))
    kept, largest = activations(options, engine=engine)
    assert kept - largest <= (many - few) / 4 <= kept + 3 * largest
