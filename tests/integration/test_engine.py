"""The engine on one worker: bad steps are detected, dropped, counted and reported; a continued run makes the same
decisions as an uninterrupted one; every option of the engine computes the right result."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.format import open_dataset, write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.training import checkpoint, loop
from pipeline.training import engine as engine_module
from pipeline.training.advice import data_wait_advice
from pipeline.training.config import EngineConfig, FewShotConfig, ModelConfig, OptimizerConfig, PretrainConfig
from pipeline.training.run import IncompleteRun, summarize
from pipeline.training.schedule import ScheduleConfig
from pipeline.training.spikes import LossSpikeGuard
from pipeline.training.validation import check_fewshot
from pipeline.weights import checkpoints
from tests.datasets import CLASSES, write_tinted
from tests.runs import changed, lines_of_log, pretrain_config
from tests.workers import continued, run


def slow(*values):
    """A parameter for slow tests only."""
    return pytest.param(values if len(values) > 1 else values[0], marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> PretrainConfig:
    data = write_tinted(str(tmp_path_factory.mktemp("data") / "set"), 48, 16)
    return pretrain_config(
        data=data,
        steps="9steps",
        batch_size=8,
        image_size=16,
        model=ModelConfig(variant="mu/8", depth=1),
        augment=Augment(size=16),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup="0steps"),
        engine=EngineConfig(zero=1, precision="fp32", micro_batch=4),
        spike=2.0,
        spike_window=4,
        wait_warning=1.0,
        log_every="1steps",
        checkpoint_every="1steps",
        keep_last=10,
    )


class Recorded:
    """A run that stores the logged values."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []

    def log(self, metrics: dict, step: int) -> None:
        self.logged.append((step, metrics))

    def flush(self) -> None:
        pass

    def log_bytes(self, data: bytes, path: str) -> None:
        assert data, path


def bad_steps(monkeypatch, factors: dict[int, float]) -> None:
    """Multiplies the loss of steps (1-based): the loop seeds torch by the step, which tells them apart here."""
    seeds = {loop.dropout_seed(0, step - 1, 0): factor for step, factor in factors.items()}
    original = engine_module.training_loss

    def faulty(outputs, *arguments):
        loss = original(outputs, *arguments)
        return loss * seeds[torch.initial_seed()] if torch.initial_seed() in seeds and loss.requires_grad else loss

    monkeypatch.setattr(engine_module, "training_loss", faulty)


def train(config: PretrainConfig, folder: Path) -> tuple[PretrainConfig, dict, list[str], Recorded]:
    config, record = changed(config, output=str(folder)), Recorded()
    worker = engine_module.Worker(rank=0, world=1, device=torch.device("cpu"))
    with lines_of_log() as lines:
        result = loop.train(config, worker, record)  # type: ignore[arg-type]
    return config, result, lines, record


def losses(lines: list[str]) -> dict[int, float]:
    steps = [line.split() for line in lines if line.startswith("step") and "  lr " in line]
    return {int(words[1].split("/")[0]): float(words[words.index("loss") + 1]) for words in steps}


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


@pytest.mark.parametrize("engine", [slow(0, "fp32"), slow(0, "bf16"), (1, "fp32"), slow(2, "bf16"), slow(3, "fp32")])
def test_neither_a_spike_nor_nan_reaches_the_weights(base, alone, tmp_path, monkeypatch, engine):
    zero, precision = engine
    bad_steps(monkeypatch, {6: 50.0, 8: math.nan})
    config = changed(base, engine=EngineConfig(zero=zero, precision=precision, micro_batch=4))
    config, result, lines, record = train(config, tmp_path)
    states = {step: weights(checkpoints.folder(config.runtime.output, step)) for step in range(4, 10)}
    for step in range(5, 10):
        same = all(torch.equal(states[step][name], states[step - 1][name]) for name in states[step])
        assert same == (step in (6, 8)), step
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 2
    assert "step 6: loss" in warnings[0]
    assert "more than 2 x the median" in warnings[0]
    assert "step 8: gradient not finite, step skipped (2 so far)" in warnings[1]
    assert result["skipped"] == 2
    counts = [(step, m[names.SPIKES], m[names.SKIPPED]) for step, m in record.logged if names.SKIPPED in m]
    assert counts == [(6, 1, 1), (8, 1, 2)]
    commit = json.loads(Path(checkpoints.folder(config.runtime.output, 8), "COMMIT.json").read_text())
    assert "loss_last" not in commit["metrics"]  # it was not finite
    assert commit["spikes"]["spikes"] == 1
    assert len(commit["spikes"]["losses"]) == 4


@pytest.mark.parametrize("stop", [slow(3), 6, slow(8)])
def test_a_continued_run_decides_as_the_uninterrupted_one(base, alone, tmp_path, monkeypatch, stop):
    """Stopped before, during and after bad steps: Adam's step count, the window of
    the median and the counts are restored."""
    bad_steps(monkeypatch, {4: math.nan, 7: 50.0})
    whole, expected, lines, _ = train(base, tmp_path / "whole")
    part = changed(base, output=str(tmp_path / "part"))
    os.makedirs(os.path.dirname(checkpoints.folder(part.runtime.output, stop)))
    os.rename(checkpoints.folder(whole.runtime.output, stop), checkpoints.folder(part.runtime.output, stop))
    _, result, again, _ = train(part, tmp_path / "part")
    later = [line for line in lines if line.startswith("warning") and int(line.split()[2][:-1]) > stop]
    assert [line for line in again if line.startswith("warning")] == later
    assert result["skipped"] == expected["skipped"] == 2
    ours, theirs = weights(result["checkpoint"]), weights(expected["checkpoint"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_too_many_bad_steps_in_a_row_end_the_run(base, alone, tmp_path, monkeypatch):
    bad_steps(monkeypatch, {6: 50.0, 7: 50.0, 8: math.nan})
    with pytest.raises(RuntimeError, match="skipped 3 steps in a row; reason of the last one, 8"):
        train(changed(base, stop_after_skipped=3), tmp_path)
    assert checkpoints.latest(str(tmp_path)).step == 7


def test_replaced_images_are_counted_in_the_log_the_records_and_the_summary(base, alone, tmp_path):
    rows = open_dataset(base.runtime.data).read(range(48))
    stored = [(r["key"], b"?" if i in (3, 30) else r["image"], r["label"], 16, 16) for i, r in enumerate(rows)]
    write_dataset(str(tmp_path / "data"), stored, classes=CLASSES)
    config = changed(base, data=str(tmp_path / "data"), steps="6steps", spike=None)
    _, result, lines, record = train(config, tmp_path / "run")
    assert result["replaced"] == 2
    assert "pretrain: replaced=2" in summarize({**result, "seconds": 1.0}).splitlines()
    assert [line for line in lines if line.startswith("step 6/6  loss ") and "  replaced 2  " in line]
    assert [metrics[names.REPLACED] for _, metrics in record.logged if names.REPLACED in metrics][-1] == 2
    with pytest.raises(UserError, match=r"replaced 2 images .*; --max-replaced allows 1\. The last one is 00(03|30) "):
        train(changed(config, max_replaced=1), tmp_path / "limited")


def test_the_end_names_the_checkpoints_that_a_full_disk_has_cost(base, alone, tmp_path, monkeypatch):
    save = checkpoint.save_file

    def refuse_from_step_3(tensors, path, *more):
        if "step-00000002" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, *more)

    monkeypatch.setattr(checkpoint, "save_file", refuse_from_step_3)
    _, result, lines, _ = train(changed(base, steps="6steps", checkpoint_every="2steps", spike=None), tmp_path)
    assert [line.split("; ")[0] for line in lines if "could not be written" in line] == [
        "warning: the checkpoint of step 4 could not be written"
    ]
    summary = summarize({**result, "seconds": 1.0}).splitlines()
    assert {"pretrain: checkpoint=none", "pretrain: missing=checkpoints of steps 4, 6"} <= set(summary)
    assert str(IncompleteRun(result)).startswith("the checkpoint of step 6 could not be written (")
    assert "No space left" in str(IncompleteRun(result))
    assert checkpoints.latest(str(tmp_path)).step == 2


def test_a_median_of_few_losses_calls_nothing_a_spike():
    guard = LossSpikeGuard(factor=2.0, window=8, stop_after=9, device=torch.device("cpu"), world=1)
    verdicts = [bool(guard.skip_step(torch.tensor(x))) for x in (1.0, 9.0, 1.0, 1.0, 9.0)]
    assert verdicts == [False, False, False, False, False]
    assert [bool(guard.skip_step(torch.tensor(x))) for x in (1.0, 1.0, 9.0, 1.0)] == [False, False, True, False]
    assert LossSpikeGuard(factor=None, window=8, stop_after=9, device=torch.device("cpu"), world=1).skip_step is None


def test_waiting_for_data_is_reported_with_the_setting_that_helps(base, alone, tmp_path):
    _, _, lines, record = train(changed(base, steps="3steps", wait_warning=0.0), tmp_path)
    (warning,) = [line for line in lines if line.startswith("warning")]  # one for all steps of ten minutes
    assert "of the time was spent waiting for data: give each worker more CPUs (--cpus-per-worker, now 1)" in warning
    assert "--encoding patches" in warning
    assert all(0 <= metrics[names.DATA_WAIT] <= 1 for _, metrics in record.logged)
    dataset = open_dataset(base.runtime.data)
    remote = changed(base, data="s3://bucket/data", threads=2, cpus_per_worker=8)
    advice = data_wait_advice(remote, dataset, 0.3)
    assert "30% of the time" in advice
    assert "--cache FOLDER" in advice
    assert "--threads, now 2 of the worker's 8 CPUs" in advice


# ---------------------------------------------------------------- options of the engine


@pytest.fixture
def eager():
    """DeepSpeed compiles Muon's iteration; without a C++ compiler the results are the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    "option",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "checkpoint_keeps": "products"},
        {"offload": True},
        {"deterministic": True},
        slow({"zero": 2, "offload": True}),
        {"zero": 2, "precision": "bf16", "gradient_precision": "fp32"},
    ],
)
def test_options_of_the_engine_do_not_change_the_losses(base, alone, tmp_path, option):
    precision = {"precision": option.get("precision", base.engine.precision)}
    plainly = changed(base, steps="4steps", engine=replace(base.engine, **precision))
    _, _, plain, _ = train(plainly, tmp_path / "plain")
    engine = replace(base.engine, **option)
    _, _, other, _ = train(changed(base, steps="4steps", engine=engine), tmp_path / "other")
    # Gradient sums in float32 differ from sums in bf16 and are more accurate.
    assert losses(other) == pytest.approx(losses(plain), abs=1e-3 if "gradient_precision" in option else 2e-4)
    assert len(losses(plain)) == 4


def test_options_that_the_engine_does_not_support_are_refused(base, alone, tmp_path):
    refused = {
        "fp16 needs a GPU": changed(base, engine=EngineConfig(precision="fp16")),
        "engine.compile with engine.zero 3 would run eagerly": changed(
            base, engine=EngineConfig(zero=3, compile=True, precision="fp32")
        ),
        "gradient_precision fp32 needs engine.zero 2": changed(base, engine=EngineConfig(gradient_precision="fp32")),
        "engine.overlap_comm needs engine.zero": changed(base, engine=EngineConfig(zero=0, overlap_comm=True)),
        "need engine.activation_checkpointing": changed(base, engine=EngineConfig(checkpointed_blocks=1)),
        "engine.tf32 is for": changed(base, engine=EngineConfig(tf32=True)),
        "engine.checkpointed_blocks 0": changed(
            base, engine=EngineConfig(checkpointed_blocks=0, activation_checkpointing=True)
        ),
        "engine.offload needs engine.zero": changed(base, engine=EngineConfig(zero=0, offload=True, precision="fp32")),
        "muon needs engine.zero 1": changed(
            base, engine=EngineConfig(zero=0, precision="bf16"), optimizer=OptimizerConfig(name="muon")
        ),
        "a ResNet has none": changed(
            base,
            optimizer=OptimizerConfig(name="muon"),
            model=ModelConfig(variant="R50x1"),
            image_size=32,
            augment=Augment(size=32),
        ),
    }
    for message, config in refused.items():
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "refused")


def test_fp16_scales_its_loss(base, alone, tmp_path, monkeypatch):
    """DeepSpeed supports fp16 only on GPUs. Here its scaler works on float32: after an overflow the scale is halved and
    the step dropped, and a continued run keeps the scale."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    asked = engine_module.deepspeed_config(OptimizerConfig(), EngineConfig(precision="fp16"), 2, 4)
    assert asked["fp16"] == {"enabled": True, "loss_scale": 0}  # dynamic
    build = engine_module.Engine.__init__

    def scaled(self, *arguments, **options):
        build(self, *arguments, **options)
        scaler = DynamicLossScaler(
            init_scale=2.0**128, scale_window=3, min_scale=1, delayed_shift=1,
            consecutive_hysteresis=False, raise_error_at_min_scale=True, dtype=torch.float32,
        )  # fmt: skip
        self.engine.optimizer.loss_scaler = scaler
        del self.engine.optimizer.step  # as in fp16, DeepSpeed's own step, which changes the loss scale
        self.step_on_device = None
        engine_module.zero_layout.drop_nonfinite_gradients(self.engine.optimizer, self.config.zero)

    monkeypatch.setattr(engine_module.Engine, "__init__", scaled)
    config = changed(base, spike=None)
    whole, expected, lines, _ = train(config, tmp_path / "whole")
    commit = json.loads(Path(expected["checkpoint"], "COMMIT.json").read_text())
    assert expected["skipped"] > 0
    assert commit["loss_scale"]["cur_scale"] < 2.0**128
    part = changed(config, output=str(tmp_path / "part"))
    os.makedirs(os.path.dirname(checkpoints.folder(part.runtime.output, 6)))
    os.rename(checkpoints.folder(whole.runtime.output, 6), checkpoints.folder(part.runtime.output, 6))
    _, result, again, _ = train(part, tmp_path / "part")
    assert losses(again) == {step: loss for step, loss in losses(lines).items() if step > 6}
    assert json.loads(Path(result["checkpoint"], "COMMIT.json").read_text())["loss_scale"] == commit["loss_scale"]


@pytest.mark.parametrize("engine", [slow(0, "fp32"), (1, "fp32"), slow(2, "bf16"), slow(3, "fp32")])
def test_muon_learns_and_continues_bit_for_bit(base, alone, tmp_path, eager, engine):
    zero, precision = engine
    config = changed(
        base,
        steps="8steps",
        engine=EngineConfig(zero=zero, precision=precision, micro_batch=4),
        optimizer=OptimizerConfig(name="muon", lr=3e-3),
        ema_decay=0.5,
    )
    whole, expected, lines, _ = train(config, tmp_path / "whole")
    assert losses(lines)[8] < 0.9 * losses(lines)[1]
    part = changed(config, output=str(tmp_path / "part"))
    os.makedirs(os.path.dirname(checkpoints.folder(part.runtime.output, 5)))
    os.rename(checkpoints.folder(whole.runtime.output, 5), checkpoints.folder(part.runtime.output, 5))
    _, result, again, _ = train(part, tmp_path / "part")
    assert losses(again) == {step: loss for step, loss in losses(lines).items() if step > 5}
    ours, theirs = weights(result["checkpoint"]), weights(expected["checkpoint"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_muon_trains_only_the_matrices_of_the_blocks(alone):
    from models import create_model

    model = create_model("mu/8", 3, 16)
    optimizer = engine_module.make_optimizer(model, OptimizerConfig(name="muon", lr=1e-3))
    (muon,) = [group for group in optimizer.param_groups if group["use_muon"]]
    names_of = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names_of[id(parameter)] for parameter in muon["params"]} == {
        f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert muon["lr_scale"] == pytest.approx(20)  # 0.02 / 1e-3


@pytest.mark.parametrize("zero", [1, slow(3)])
def test_few_shot_probe_sees_what_the_model_has_learned(base, alone, tmp_path, zero):
    """Three colours: a linear classifier on the features learns from two images of
    each. The training is not affected."""
    config = changed(base, steps="4steps", engine=replace(base.engine, zero=zero), validate_every="2steps")
    _, plain, lines, _ = train(config, tmp_path / "plain")
    probe = FewShotConfig(train=base.runtime.data, test=base.runtime.data, shots=2, l2=1.0)
    _, probed, again, record = train(changed(config, fewshot=probe), tmp_path / "probed")
    assert losses(again) == losses(lines)
    ours, theirs = weights(probed["checkpoint"]), weights(plain["checkpoint"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logged = {step: metrics for step, metrics in record.logged if names.FEWSHOT_TOP1 in metrics}
    assert set(logged) == {2, 4}
    assert 90 <= logged[4][names.FEWSHOT_TOP1] <= 100
    assert logged[4][names.FEWSHOT_SECONDS] > 0
    assert any("few-shot top-1" in line for line in again)


def test_few_shot_needs_a_test_set(base):
    with pytest.raises(UserError, match="needs a test set"):
        check_fewshot(changed(base, fewshot=FewShotConfig(train=base.runtime.data)))


@pytest.mark.slow  # compiles C++
def test_compiled_blocks_compute_the_same(base, alone, tmp_path):
    _, _, plain, _ = train(changed(base, steps="4steps"), tmp_path / "plain")
    engine = replace(base.engine, compile=True)
    _, _, compiled, _ = train(changed(base, steps="4steps", engine=engine), tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(plain), abs=2e-4)


@pytest.mark.slow
def test_muon_on_two_workers_continues_on_two_and_on_one(base, tmp_path):
    stages = {
        zero: changed(
            base,
            output=str(tmp_path / f"zero{zero}"),
            engine=replace(base.engine, zero=zero),
            optimizer=OptimizerConfig(name="muon", lr=3e-3),
            lanes=4,
        )
        for zero in (0, 1, 2, 3)
    }
    originals = dict(zip(stages, run(2, *stages.values()), strict=True))
    reference = [float(loss) for loss in originals[0]["losses"].values()]
    for zero, result in originals.items():
        assert [float(loss) for loss in result["losses"].values()] == pytest.approx(reference, abs=0.02), zero
    again = [continued(job, tmp_path / "two", 4) for job in stages.values()]
    for original, result in zip(originals.values(), run(2, *again), strict=True):
        assert result["losses"] == {step: loss for step, loss in original["losses"].items() if int(step) > 4}
    alone = [continued(job, tmp_path / "one", 4) for job in stages.values()]
    for original, result in zip(originals.values(), run(1, *alone), strict=True):
        assert [float(loss) for loss in result["losses"].values()] == pytest.approx(
            [float(loss) for step, loss in original["losses"].items() if int(step) > 4], abs=0.02
        )
