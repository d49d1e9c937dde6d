"""Bad steps are noticed, dropped, counted and said, and a run that was continued decides as the uninterrupted one."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import free_port
from safetensors.torch import load_file

from pipeline.data.augment import Augment
from pipeline.data.shards import open_dataset, write_dataset
from pipeline.tracking import names
from pipeline.training import checkpoint, loop
from pipeline.training.recipes import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig
from pipeline.training.schedule import ScheduleConfig
from pipeline.training.watch import Watch, data_wait_advice


@pytest.fixture(scope="module")
def alone():
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(key, value)
        patch.setenv("MASTER_PORT", str(free_port()))
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> PretrainConfig:
    generator = np.random.default_rng(0)

    def rows():
        for i in range(48):
            picture = generator.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            picture[:, :, i % 3] += 150
            yield f"{i:04d}", cv2.imencode(".png", picture)[1].tobytes(), i % 3, 16, 16

    data = str(tmp_path_factory.mktemp("data") / "set")
    write_dataset(data, rows(), classes=["red", "green", "blue"])
    return PretrainConfig(
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
        keep=10,
    )


class Recorded:
    """A run that keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []

    def log(self, metrics: dict, step: int) -> None:
        self.logged.append((step, metrics))

    def flush(self) -> None:
        pass


def bad_steps(monkeypatch, factors: dict[int, float]) -> None:
    """Multiplies the loss of steps (1-based): the loop seeds torch by the step, which tells them apart here."""
    seeds = {hash((0, step - 1, 0)) & 0x7FFFFFFF: factor for step, factor in factors.items()}
    original = loop.training_loss

    def faulty(outputs, *arguments):
        loss = original(outputs, *arguments)
        return loss * seeds[torch.initial_seed()] if torch.initial_seed() in seeds and loss.requires_grad else loss

    monkeypatch.setattr(loop, "training_loss", faulty)


def train(config: PretrainConfig, folder: Path) -> tuple[PretrainConfig, dict, list[str], Recorded]:
    lines: list[str] = []
    config, record = replace(config, output=str(folder)), Recorded()
    device = torch.device("cpu")
    result = loop.train(config, rank=0, world=1, local_rank=0, device=device, say=lines.append, run=record)  # type: ignore[arg-type]
    return config, result, lines, record


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


@pytest.mark.parametrize("engine", [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_neither_a_spike_nor_nan_reaches_the_weights(base, alone, tmp_path, monkeypatch, engine):
    zero, precision = engine
    bad_steps(monkeypatch, {6: 50.0, 8: math.nan})
    config = replace(base, engine=EngineConfig(zero=zero, precision=precision, micro_batch=4))
    config, result, lines, record = train(config, tmp_path)
    states = {step: weights(checkpoint.folder(config.output, step)) for step in range(4, 10)}
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
    commit = json.loads(Path(checkpoint.folder(config.output, 8), "COMMIT.json").read_text())
    assert "loss_last" not in commit["metrics"]  # it was not finite
    assert commit["watch"]["spikes"] == 1
    assert len(commit["watch"]["losses"]) == 4


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_continued_run_decides_as_the_uninterrupted_one(base, alone, tmp_path, monkeypatch, stop):
    """Stopped before, in and after bad steps: Adam's step count, the median's window and the counts come back."""
    bad_steps(monkeypatch, {4: math.nan, 7: 50.0})
    whole, expected, lines, _ = train(base, tmp_path / "whole")
    part = replace(base, output=str(tmp_path / "part"))
    os.makedirs(os.path.dirname(checkpoint.folder(part.output, stop)))
    os.rename(checkpoint.folder(whole.output, stop), checkpoint.folder(part.output, stop))
    _, result, again, _ = train(part, tmp_path / "part")
    later = [line for line in lines if line.startswith("warning") and int(line.split()[2][:-1]) > stop]
    assert [line for line in again if line.startswith("warning")] == later
    assert result["skipped"] == expected["skipped"] == 2
    ours, theirs = weights(result["checkpoint"]), weights(expected["checkpoint"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_too_many_bad_steps_in_a_row_end_the_run(base, alone, tmp_path, monkeypatch):
    bad_steps(monkeypatch, {6: 50.0, 7: 50.0, 8: math.nan})
    with pytest.raises(RuntimeError, match="3 steps in a row were not taken, the last one, 8"):
        train(replace(base, stop_after_skipped=3), tmp_path)
    assert checkpoint.latest(str(tmp_path)).step == 7


def test_a_median_of_few_losses_calls_nothing_a_spike():
    watch = Watch(factor=2.0, window=8, stop_after=9, device=torch.device("cpu"), world=1)
    verdicts = [bool(watch.veto(torch.tensor(x))) for x in (1.0, 9.0, 1.0, 1.0, 9.0)]
    assert verdicts == [False, False, False, False, False]
    assert [bool(watch.veto(torch.tensor(x))) for x in (1.0, 1.0, 9.0, 1.0)] == [False, False, True, False]
    assert Watch(factor=None, window=8, stop_after=9, device=torch.device("cpu"), world=1).veto is None


def test_waiting_for_data_is_said_with_the_setting_that_helps(base, alone, tmp_path):
    _, _, lines, record = train(replace(base, steps="3steps", wait_warning=0.0), tmp_path)
    (second, third) = [line for line in lines if line.startswith("warning")]
    assert "of the time went into waiting for data: give each worker more CPUs (--cpus-per-worker, now 1)" in second
    assert "--encoding patches" in third
    assert all(0 <= metrics[names.DATA_WAIT] <= 1 for _, metrics in record.logged)
    dataset = open_dataset(base.data)
    remote = replace(base, data="s3://bucket/data", threads=2, cpus_per_worker=8)
    advice = data_wait_advice(remote, dataset, 0.3)
    assert "30% of the time" in advice
    assert "--cache FOLDER" in advice
    assert "--threads, now 2 of the worker's 8 CPUs" in advice
