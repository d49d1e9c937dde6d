"""A training step does not synchronise with the device between logging steps, and
gives the same weights as DeepSpeed's own step, bit for bit."""

import math

import pytest
import torch

from models import create_model
from pipeline.data import open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.training.config import EngineConfig, ModelConfig, OptimizerConfig
from pipeline.training.engine import Engine, Worker, micro_losses
from pipeline.training.plan import make_plan
from pipeline.training.spikes import LossSpikeGuard
from pipeline.training.validation import validate
from pipeline.training.zero_layout import drop_nonfinite_gradients
from tests.hostreads import HostReads
from tests.images import jpeg
from tests.runs import pretrain_config

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("alone")
BATCH, MICRO, STEPS, BAD = 8, 4, 6, 3


def make_engine(zero: int, precision: str, optimizer: OptimizerConfig | None = None, **options) -> Engine:
    torch.manual_seed(0)
    return Engine(
        create_model("mu/8", 3, 16, depth=2),
        optimizer or OptimizerConfig(lr=1e-2, decay_filter="kernels", clip=0.5),
        EngineConfig(zero=zero, precision=precision, micro_batch=MICRO, **options),
        accumulation=BATCH // MICRO,
        micro_batch=MICRO,
        device=CPU,
        ema_decay=0.9,
    )


def batch_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.randint(0, 3, (BATCH,), generator=generator)}


def steps(engine: Engine, guard: LossSpikeGuard) -> list[torch.Tensor]:
    """The losses of six steps; the fourth has a NaN gradient."""
    losses = []
    for step in range(STEPS):
        functions = list(micro_losses(batch_of(step), MICRO, CPU, "softmax"))
        if step == BAD:
            good = functions[-1]
            functions[-1] = lambda model, good=good: good(model) * math.nan
        losses.append(engine.train_step(functions, 1e-2, guard.skip_step))
        guard.note(step + 1, engine.dropped)
    return losses


def make_guard() -> LossSpikeGuard:
    return LossSpikeGuard(factor=9.0, window=4, stop_after=9, device=CPU, world=1)


def use_the_step_of_deepspeed(engine: Engine) -> None:
    del engine.engine.optimizer.step
    engine.step_on_device = None
    drop_nonfinite_gradients(engine.engine.optimizer, engine.config.zero)


STAGES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]


@pytest.mark.parametrize(("zero", "precision"), STAGES)
def test_no_step_waits_for_the_device(zero, precision):
    engine, guard = make_engine(zero, precision), make_guard()
    steps(engine, guard)  # the first step makes the optimiser's states
    with HostReads() as reads:
        steps(engine, guard)
    assert reads.counted == {}


def test_the_counter_detects_the_reads_of_deepspeed():
    engine, guard = make_engine(1, "bf16"), make_guard()
    use_the_step_of_deepspeed(engine)
    with HostReads() as reads:
        steps(engine, guard)
    assert reads.counted["_local_scalar_dense"] >= 2 * STEPS


@pytest.mark.parametrize(("zero", "precision"), [stage for stage in STAGES if stage[0]])
def test_the_weights_are_those_of_deepspeeds_step_bit_for_bit(zero, precision):
    ours, theirs = make_engine(zero, precision), make_engine(zero, precision)
    use_the_step_of_deepspeed(theirs)
    losses = [torch.stack(steps(engine, make_guard())) for engine in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0, equal_nan=True)
    mine, other = ours.snapshot(), theirs.snapshot()
    assert set(mine) == set(other)
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert ours.grad_norm() == theirs.grad_norm()
    assert theirs.engine.skipped_steps == 1


def test_stage_0_in_bf16_rounds_its_norm_once_and_deepspeed_in_each_sum():
    ours, theirs = make_engine(0, "bf16"), make_engine(0, "bf16")
    use_the_step_of_deepspeed(theirs)
    losses = [torch.stack(steps(engine, make_guard())) for engine in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert ours.grad_norm() == pytest.approx(theirs.grad_norm(), rel=1e-3)


@pytest.mark.parametrize(("zero", "precision"), STAGES)
def test_a_dropped_step_changes_no_weight_no_moment_and_no_step_count(zero, precision):
    engine, guard = make_engine(zero, precision), make_guard()
    steps(engine, guard)
    before = engine.snapshot()
    counts = [state["step"].item() for state in engine.inner.state.values()]
    functions = [lambda model: model(batch_of(0)["image"][:MICRO]).sum() * math.nan] * 2
    engine.train_step(functions, 1e-2)
    assert bool(engine.dropped)
    assert engine.grad_norm() == math.inf
    after = engine.snapshot()
    kept = [name for name in before if not name.startswith("ema")]
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []
    assert [state["step"].item() for state in engine.inner.state.values()] == counts


@pytest.mark.parametrize("optimizer", [OptimizerConfig(name="sgd", lr=1e-2)])
def test_other_optimisers_step_as_deepspeed_does(optimizer):
    engine = make_engine(1, "fp32", optimizer)
    assert engine.step_on_device is None
    guard = make_guard()
    steps(engine, guard)
    assert [step for step, _ in guard.read()] == [BAD + 1]


def test_the_guard_names_the_step_that_was_dropped():
    engine, guard = make_engine(1, "fp32"), make_guard()
    steps(engine, guard)
    ((step, warning),) = guard.read()
    assert step == BAD + 1
    assert warning == f"step {BAD + 1}: gradient not finite, step skipped (1 so far)"
    assert guard.read() == []


def test_validation_reads_its_sums_once_whatever_the_number_of_batches(tmp_path):
    counts = []
    for images in (16, 48):
        uri = str(tmp_path / str(images))
        write_dataset(uri, [(f"{i}", jpeg(i), i % 3, 60, 40) for i in range(images)], classes=["a", "b", "c"])
        config = pretrain_config(
            data=uri,
            batch_size=BATCH,
            image_size=16,
            augment=Augment(size=16),
            model=ModelConfig(variant="mu/8", depth=2),
            engine=EngineConfig(zero=1, precision="fp32", micro_batch=MICRO),
            lanes=4,
        )
        engine = make_engine(1, "fp32")
        plan = make_plan(config, open_dataset(uri), 1)
        with HostReads() as reads:
            scores = validate(engine, plan, uri, Worker(rank=0, world=1, device=CPU))
        assert 0 <= scores["val/top1"] <= 100
        counts.append(reads.counted)
    assert counts[0] == counts[1]
    assert counts[0]["_local_scalar_dense"] > 0


def test_a_diverged_model_has_no_accuracy(tmp_path):
    """Outputs that are not finite would count as class 0."""
    uri = str(tmp_path / "data")
    write_dataset(uri, [(f"{i}", jpeg(i), i % 3, 60, 40) for i in range(12)], classes=["a", "b", "c"])
    config = pretrain_config(
        data=uri, image_size=16, augment=Augment(size=16), model=ModelConfig(variant="mu/8", depth=2), batch_size=4
    )
    engine, plan = make_engine(1, "fp32"), make_plan(config, open_dataset(uri), 1)
    with torch.no_grad():
        next(engine.module.parameters()).fill_(1e38)
    with pytest.raises(RuntimeError, match="the model has diverged"):
        validate(engine, plan, uri, Worker(rank=0, world=1, device=CPU))
