"""Training with two real workers and real DeepSpeed engines: stages agree, runs continue bit for bit, on any number of
workers, and a checkpoint is complete or does not exist."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import free_port
from safetensors.torch import load_file

from models.variants import parameters
from pipeline.data.augment import Augment
from pipeline.data.shards import open_dataset, write_dataset
from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.training.loop import make_plan
from pipeline.training.recipes import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig
from pipeline.training.schedule import ScheduleConfig

STEPS = 6


def _worker(rank: int, world: int, port: int, jobs: list) -> None:
    """Runs `jobs` (name, config) one after the other in one process group; losses of every step go to <output>/losses.json."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from pipeline.training.loop import train

    for config in jobs:
        lines: list[str] = []
        result = train(
            config, rank=rank, world=world, local_rank=rank, device=torch.device("cpu"), say=lines.append, run=None
        )
        if rank == 0:
            steps = [line.split() for line in lines if line.startswith("step") and "loss" in line and "lr" in line]
            losses = {words[1].split("/")[0]: words[words.index("loss") + 1] for words in steps}
            Path(config.output, "result.json").write_text(json.dumps({"losses": losses, "lines": lines, **result}))
    torch.distributed.destroy_process_group()


def run(world: int, *jobs: PretrainConfig) -> list[dict]:
    torch.multiprocessing.spawn(_worker, args=(world, free_port(), jobs), nprocs=world)
    return [json.loads(Path(job.output, "result.json").read_text()) for job in jobs]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """96 noisy pictures of three colours."""
    root = str(tmp_path_factory.mktemp("data") / "set")
    generator = np.random.default_rng(0)

    def rows():
        for i in range(96):
            picture = generator.integers(0, 90, (20, 20, 3), dtype=np.uint8)
            picture[:, :, i % 3] += 150
            yield f"{i:04d}", cv2.imencode(".png", picture)[1].tobytes(), i % 3, 20, 20

    write_dataset(root, rows(), classes=["red", "green", "blue"], row_group_bytes=8_000)
    return root


@pytest.fixture(scope="module")
def base(data) -> PretrainConfig:
    return PretrainConfig(
        data=data,
        steps=f"{STEPS}steps",
        batch_size=16,
        image_size=16,
        model=ModelConfig(variant="mu/8", depth=2, dropout=0.1),
        augment=Augment(size=16),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup="2steps"),
        engine=EngineConfig(zero=1, precision="fp32", micro_batch=4),
        average=0.5,
        lanes=4,
        log_every="1steps",
        checkpoint_every="2steps",
        keep=10,
    )


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory) -> dict[str, tuple[PretrainConfig, dict]]:
    """Two workers, one process group: every stage and precision, then runs continued from the middle of others."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {
        f"zero{stage}": replace(base, output=str(root / f"zero{stage}"), engine=replace(base.engine, zero=stage))
        for stage in (0, 1, 2, 3)
    }
    jobs["bf16"] = replace(base, output=str(root / "bf16"), engine=replace(base.engine, precision="bf16"))
    jobs["sgd"] = replace(
        base, output=str(root / "sgd"), optimizer=OptimizerConfig(name="sgd", lr=1e-2, weight_decay=0)
    )
    jobs["validated"] = replace(
        base, output=str(root / "validated"), validation=data, steps="2steps", engine=jobs["zero3"].engine
    )
    results = run(2, *jobs.values())
    return {name: (job, result) for (name, job), result in zip(jobs.items(), results, strict=True)}


def continued(job: PretrainConfig, tmp_path: Path, step: int) -> PretrainConfig:
    """A copy of a run as it was right after `step`."""
    copy = replace(job, output=str(tmp_path / f"continued-{Path(job.output).name}"))
    shutil.copytree(checkpoint.folder(job.output, step), checkpoint.folder(copy.output, step))
    return copy


def test_stages_agree(runs):
    reference = [float(x) for x in runs["zero0"][1]["losses"].values()]
    assert len(reference) == STEPS
    assert reference[-1] < 0.8 * reference[0]
    for name in ("zero1", "zero2", "zero3"):
        assert [float(x) for x in runs[name][1]["losses"].values()] == pytest.approx(reference, abs=2e-4)
    assert [float(x) for x in runs["bf16"][1]["losses"].values()] == pytest.approx(reference, abs=0.05)


def test_model_file_is_what_any_library_reads(runs):
    _job, result = runs["zero3"]
    weights = load_file(Path(result["checkpoint"], "model.safetensors"))
    reference = load_file(Path(runs["zero1"][1]["checkpoint"], "model.safetensors"))
    assert weights["blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert weights.keys() == reference.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], reference[name], atol=1e-3, rtol=1e-2)
    average = load_file(Path(result["checkpoint"], "average.safetensors"))
    assert average.keys() == weights.keys()
    assert any(not torch.equal(average[name], weights[name]) for name in weights)


def test_validation_counts_every_image_once(runs):
    assert 0.0 <= runs["validated"][1]["val/top1"] <= 1.0
    assert (96 * runs["validated"][1]["val/top1"]) % 1 == pytest.approx(0, abs=1e-6)


def test_continues_bit_for_bit_and_on_another_number_of_workers(runs, tmp_path):
    """From step 4 to 6 again: equal bits on two workers, for each stage, precision and optimiser; close on one worker."""
    names = ["zero0", "zero1", "zero2", "zero3", "bf16", "sgd"]
    again = [continued(runs[name][0], tmp_path, 4) for name in names]
    for name, result in zip(names, run(2, *again), strict=True):
        original = runs[name][1]
        assert result["losses"] == {step: original["losses"][step] for step in ("5", "6")}, name
        for file in ("model.safetensors", "average.safetensors"):
            ours = load_file(Path(result["checkpoint"], file))
            for key, value in load_file(Path(original["checkpoint"], file)).items():
                assert torch.equal(ours[key], value), (name, file, key)


def test_other_number_of_workers_and_stage_see_the_same_samples(base, tmp_path):
    plain = replace(base, model=replace(base.model, dropout=0.0), output=str(tmp_path / "two"))
    (two,) = run(2, plain)
    one = continued(plain, tmp_path, 4)
    third = replace(
        continued(replace(plain, output=plain.output), tmp_path / "z", 4), engine=replace(base.engine, zero=3)
    )
    for result in run(1, one, third):
        assert [float(x) for x in result["losses"].values()] == pytest.approx(
            [float(two["losses"][step]) for step in ("5", "6")], abs=2e-4
        )


def test_damaged_checkpoint_is_passed_over(runs, tmp_path, capsys):
    job = continued(runs["zero1"][0], tmp_path, 2)
    shutil.copytree(checkpoint.folder(runs["zero1"][0].output, 4), checkpoint.folder(job.output, 4))
    assert checkpoint.latest(job.output).step == 4
    victim = Path(checkpoint.folder(job.output, 4), "model.safetensors")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert checkpoint.latest(job.output).step == 2
    assert "does not have the content that was written" in capsys.readouterr().out
    victim.write_bytes(content[:-10])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.resolve(checkpoint.folder(job.output, 4))
    Path(checkpoint.folder(job.output, 4), "COMMIT.json").unlink()
    assert [c.step for c in checkpoint.find(job.output)] == [2]
    assert checkpoint.remove_orphans(job.output) == ["step-00000004"]
    assert checkpoint.resolve(job.output).step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1000}, "larger than"),
        ({"lanes": 5}, "not divisible by lanes"),
        ({"engine": EngineConfig(micro_batch=3)}, "does not divide"),
        ({"steps": "fast"}, "horizon"),
        ({"keep_tokens": 0.0}, "keep_tokens"),
        ({"augment": Augment(size=99)}, "augment.size"),
        ({"model": ModelConfig(variant="Q/16")}, "unknown model"),
    ],
)
def test_what_cannot_work_is_said_before_any_worker_starts(base, change, message):
    def check() -> None:
        plan = make_plan(replace(base, **change), open_dataset(base.data), 1)
        parameters(plan.model_options)

    with pytest.raises(UserError, match=message):
        check()


def test_workers_must_divide_lanes(base):
    with pytest.raises(UserError, match="3 workers do not divide the 4 lanes"):
        make_plan(base, open_dataset(base.data), 3)
