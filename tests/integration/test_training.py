"""Training with two real workers and real DeepSpeed engines: stages agree, runs continue bit for bit, on any number of
workers, and a checkpoint is complete or does not exist."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models import create_model
from models.cost import parameters
from pipeline import storage
from pipeline.data import Loader
from pipeline.data.format import open_dataset
from pipeline.data.loading.augment import Augment
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.training import checkpoint
from pipeline.training.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig
from pipeline.training.loop import share_weights
from pipeline.training.plan import make_plan
from pipeline.training.run import claim, find_record, finished_checkpoint, pretrain, restore_record
from pipeline.training.schedule import ScheduleConfig
from pipeline.weights import checkpoints
from tests.datasets import write_tinted
from tests.faultproxy import FaultProxy
from tests.ports import free_port
from tests.runs import changed, flip_bit, lines_of_log, pretrain_config
from tests.workers import continued, run, work

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """96 noisy pictures of three colours."""
    return write_tinted(str(tmp_path_factory.mktemp("data") / "set"), 96, 20, row_group_bytes=8_000)


@pytest.fixture(scope="module")
def base(data) -> PretrainConfig:
    return pretrain_config(
        data=data,
        steps=f"{STEPS}steps",
        batch_size=16,
        image_size=16,
        model=ModelConfig(variant="mu/8", depth=2, dropout=0.1),
        augment=Augment(size=16),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup="2steps"),
        engine=EngineConfig(zero=1, precision="fp32", micro_batch=4),
        ema_decay=0.5,
        lanes=4,
        log_every="1steps",
        checkpoint_every="2steps",
        keep_last=10,
    )


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory) -> dict[str, tuple[PretrainConfig, dict]]:
    """Two workers, one process group: every stage and precision, then runs continued from the middle of others."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {
        f"zero{stage}": changed(base, output=str(root / f"zero{stage}"), engine=replace(base.engine, zero=stage))
        for stage in (0, 1, 2, 3)
    }
    jobs["bf16"] = changed(base, output=str(root / "bf16"), engine=replace(base.engine, precision="bf16"))
    jobs["sgd"] = changed(
        base, output=str(root / "sgd"), optimizer=OptimizerConfig(name="sgd", lr=1e-2, weight_decay=0)
    )
    jobs["validated"] = changed(
        base, output=str(root / "validated"), validation=data, steps="2steps", engine=jobs["zero3"].engine
    )
    results = run(2, *jobs.values())
    return {name: (job, result) for (name, job), result in zip(jobs.items(), results, strict=True)}


def test_stages_agree(runs):
    reference = [float(x) for x in runs["zero0"][1]["losses"].values()]
    assert len(reference) == STEPS
    assert reference[-1] < 0.8 * reference[0]
    for name in ("zero1", "zero2", "zero3"):
        assert [float(x) for x in runs[name][1]["losses"].values()] == pytest.approx(reference, abs=2e-4)
    assert [float(x) for x in runs["bf16"][1]["losses"].values()] == pytest.approx(reference, abs=0.05)


def test_model_file_can_be_read_by_any_library(runs):
    _job, result = runs["zero3"]
    weights = load_file(Path(result["checkpoint"], "model.safetensors"))
    reference = load_file(Path(runs["zero1"][1]["checkpoint"], "model.safetensors"))
    assert weights["blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert weights.keys() == reference.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], reference[name], atol=1e-3, rtol=1e-2)
    ema = load_file(Path(result["checkpoint"], "ema.safetensors"))
    assert ema.keys() == weights.keys()
    assert any(not torch.equal(ema[name], weights[name]) for name in weights)


def test_validation_counts_every_image_once(runs):
    assert 0.0 <= runs["validated"][1]["val/top1"] <= 100.0
    right = 96 * runs["validated"][1]["val/top1"] / 100
    assert right == pytest.approx(round(right), abs=1e-6)


def test_continues_bit_for_bit_and_on_another_number_of_workers(runs, tmp_path):
    """Repeats steps 4 to 6: bit for bit equal on two workers, for each stage, precision and optimiser, and with images
    from several processes; approximately equal on one worker."""
    names = ["zero0", "zero1", "zero2", "zero3", "bf16", "sgd"]
    again = [continued(runs[name][0], tmp_path, 4) for name in names]
    again[1] = changed(again[1], loading_processes=2)
    for name, result in zip(names, run(2, *again), strict=True):
        original = runs[name][1]
        assert result["losses"] == {step: original["losses"][step] for step in ("5", "6")}, name
        for file in ("model.safetensors", "ema.safetensors"):
            ours = load_file(Path(result["checkpoint"], file))
            for key, value in load_file(Path(original["checkpoint"], file)).items():
                assert torch.equal(ours[key], value), (name, file, key)


def test_other_number_of_workers_and_stage_see_the_same_samples(base, tmp_path):
    plain = changed(base, model=replace(base.model, dropout=0.0), output=str(tmp_path / "two"))
    (two,) = run(2, plain)
    one = continued(plain, tmp_path, 4)
    third = changed(
        continued(changed(plain, output=plain.runtime.output), tmp_path / "z", 4), engine=replace(base.engine, zero=3)
    )
    for result in run(1, one, third):
        assert [float(x) for x in result["losses"].values()] == pytest.approx(
            [float(two["losses"][step]) for step in ("5", "6")], abs=2e-4
        )


@pytest.mark.slow
def test_every_stage_continues_with_one_and_four_workers(base, tmp_path):
    plain = changed(base, model=replace(base.model, dropout=0.0))
    names = [f"zero{stage}" for stage in (1, 2, 3)]
    jobs = [
        changed(plain, output=str(tmp_path / name), engine=replace(base.engine, zero=stage))
        for stage, name in enumerate(names, start=1)
    ]
    two = dict(zip(names, run(2, *jobs), strict=True))
    for world in (1, 4):
        again = [continued(job, tmp_path / str(world), 2) for job in jobs]
        for name, result in zip(names, run(world, *again), strict=True):
            expected = {step: float(two[name]["losses"][step]) for step in ("3", "4", "5", "6")}
            assert {k: float(v) for k, v in result["losses"].items()} == pytest.approx(expected, abs=2e-4), (
                name,
                world,
            )


def _with_weights_of_rank_0(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(rank)
    model = create_model("mu/8", 3, 16)
    share_weights(model, torch.device("cpu"))
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_rank_0_reads_the_weights_for_all(tmp_path):
    """A run of 64 workers that continues reads its model from the store once, and not 64 times."""
    torch.multiprocessing.spawn(_with_weights_of_rank_0, args=(2, free_port(), str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    expected = create_model("mu/8", 3, 16).state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(found) == list(expected)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def _recording(rank: int, world: int, port: int, jobs: list, dies_at: int | None) -> None:
    """`work` that records the keys of every batch, and can be killed when it requests a batch."""
    from pipeline.training import loop

    folders = (job.runtime.output for job in jobs)

    class RecordingLoader(Loader):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.file = Path(next(folders), f"keys-{world}-{rank}")
            self.delivered = options["epoch"] * self.steps_per_epoch + options["step"]

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for batch in super().__iter__():
                self.delivered += 1
                if self.delivered == dies_at and rank == world - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                with self.file.open("a") as file:
                    file.write(json.dumps([self.delivered, batch["key"]]) + "\n")
                yield batch

    loop.Loader = RecordingLoader
    work(rank, world, port, jobs)


def record(world: int, jobs: list[PretrainConfig], dies_at: int | None = None) -> None:
    for job in jobs:
        Path(job.runtime.output).mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_recording, args=(world, free_port(), jobs, dies_at), nprocs=world)


def keys(job: PretrainConfig, world: int) -> dict[int, list[str]]:
    """Step -> the samples that all its workers had, sorted."""
    seen: dict[int, list[str]] = {}
    for rank in range(world):
        for line in Path(job.runtime.output, f"keys-{world}-{rank}").read_text().splitlines():
            step, batch = json.loads(line)
            seen[step] = sorted([*seen.get(step, []), *batch])
    return seen


def test_a_checkpoint_has_only_the_scores_of_its_own_step(base, data, tmp_path):
    """A run that validates less often than it saves, whole and continued from a checkpoint with scores."""
    job = changed(base, output=str(tmp_path / "run"), validation=data, validate_every="4steps", steps="8steps")
    run(1, job)
    again = continued(job, tmp_path, 4)
    run(1, again)
    for output in (job.runtime.output, again.runtime.output):
        commits = {found.step: found.commit["metrics"] for found in checkpoints.find(output)}
        assert {step: "val/top1" in metrics for step, metrics in commits.items() if step >= 4} == {
            4: True,
            6: False,
            8: True,
        }


def test_a_stop_during_a_validation_saves_the_step_and_the_next_start_validates_it(base, data, tmp_path):
    """Two workers, one of which is told to leave while both validate after step 4 of 8, and after the last step."""
    whole = changed(base, output=str(tmp_path / "whole"), validation=data, validate_every="4steps", steps="8steps")
    stopped = changed(whole, output=str(tmp_path / "stopped"))
    first, second, expected, result = run(2, stopped, stopped, whole, stopped, stops_at=(4, 8))
    assert (first["left"], second["left"]) == ("saved at step 4", "saved at step 8")
    assert second["lines"][-2] == "step 8/8  the validation is stopped; the next start repeats it"
    assert result["lines"][-1].startswith("step 8/8  validation  ")
    scores = [
        [(c.step, c.commit["metrics"].get(names.VAL_TOP1)) for c in checkpoints.find(job.runtime.output)]
        for job in (whole, stopped)
    ]
    assert scores[0] == scores[1]
    assert [step for step, score in scores[0] if score is not None] == [4, 8]
    same = [load_file(Path(r["checkpoint"], "model.safetensors")) for r in (expected, result)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


@pytest.mark.slow
def test_samples_after_a_kill_are_those_of_an_uninterrupted_run_on_any_number_of_workers(base, tmp_path):
    """Five seeds: two workers, one of them killed at a random step; the rest of the run on one and on four."""
    whole = changed(base, output=str(tmp_path / "whole"), steps="12steps")
    record(2, [whole])
    expected = keys(whole, 2)
    assert [len(set(batch)) for batch in expected.values()] == [16] * 12
    left: list[tuple[PretrainConfig, int]] = []
    for seed in range(5):
        killed = changed(whole, output=str(tmp_path / f"killed-{seed}"))
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            record(2, [killed], dies_at=random.Random(seed).randrange(4, 12))
        left.append((killed, checkpoints.latest(killed.runtime.output).step))
    for world in (1, 4):
        rest = [changed(job, output=f"{job.runtime.output}-on-{world}") for job, _ in left]
        for (job, _), copy in zip(left, rest, strict=True):
            shutil.copytree(Path(job.runtime.output, "checkpoints"), Path(copy.runtime.output, "checkpoints"))
        record(world, rest)
        for (_, step), copy in zip(left, rest, strict=True):
            assert keys(copy, world) == {k: batch for k, batch in expected.items() if k > step}


def written(run: str | Path, *steps: int, **options) -> checkpoint.Writer:
    """Checkpoints of a small model as one worker writes them."""
    model = create_model("mu/8", num_classes=3, image_size=16, depth=1)
    writer = checkpoint.Writer(str(run), model, **{"keep_last": 10, **options})
    writer.start()
    for step in steps:
        writer.save(step, tensors_of(writer, step), {"metrics": {}})
    writer.wait()
    return writer


def tensors_of(writer: checkpoint.Writer, value: float) -> Callable[[], dict[str, torch.Tensor]]:
    """A snapshot that is `value` everywhere."""
    tensors = {
        f"{kind}:{name}:0": torch.full((shape.numel(),), float(value))
        for kind in ("param", "exp_avg", "exp_avg_sq")
        for name, shape in writer.shapes.items()
    }
    return lambda: tensors


def test_damaged_checkpoint_is_skipped(tmp_path, caplog):
    """A changed byte, missing bytes, a truncated commit, and no commit: each is
    reported with the checkpoint that is used instead."""
    written(tmp_path, 2, 4, 6, 8)
    two, four, six, eight = (Path(checkpoints.folder(str(tmp_path), step)) for step in (2, 4, 6, 8))
    assert checkpoints.latest(str(tmp_path)).step == 8
    (eight / "COMMIT.json").unlink()
    (six / "COMMIT.json").write_text((six / "COMMIT.json").read_text()[:-40])
    victim = four / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    caplog.clear()
    assert checkpoints.latest(str(tmp_path)).step == 2
    assert f"a checkpoint is skipped: {six}/COMMIT.json: not valid JSON" in caplog.text
    wrong = "model.safetensors does not match its checksum"
    assert f"{four} is skipped: {wrong}; going back to {two}" in caplog.text
    victim.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"damaged checkpoint: model\.safetensors has"):
        checkpoints.resolve(str(four))
    # transfer, evaluate and export do not use an earlier checkpoint by themselves
    with pytest.raises(UserError, match=rf"step-00000006/COMMIT.json: not valid JSON.*; use {two}"):
        checkpoints.resolve(str(tmp_path))
    shutil.rmtree(six)
    with pytest.raises(UserError, match=rf"step-00000004: damaged checkpoint: .*; use {two}"):
        checkpoints.resolve(str(tmp_path))
    assert checkpoint.remove_orphans(str(tmp_path)) == ["step-00000008"]
    shutil.rmtree(four)
    assert checkpoints.resolve(str(tmp_path)).step == 2
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run: no complete checkpoint yet"):
        checkpoints.resolve(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r'rnu: no complete checkpoint, and no such folder \(did you mean "run"\?\)'):
        checkpoints.resolve(str(tmp_path / "rnu"))


def damaged_by(kind: str, folder: Path) -> None:
    """Damage to the last checkpoint that leaves all sizes."""
    if kind == "step":
        commit = folder / "COMMIT.json"
        commit.write_text(commit.read_text().replace('"step": 8,', '"step": 9,'))
    else:
        flip_bit(next(folder.glob(f"**/{kind}")))


@pytest.mark.parametrize("kind", ["model.safetensors", "exp_avg-*", "config.json", "step"])
def test_a_run_with_a_damaged_last_checkpoint_is_not_finished(base, tmp_path, kind):
    """Nothing hands it on: the same command continues from the checkpoint before."""
    plan = make_plan(changed(base, output=str(tmp_path), steps="8steps"), open_dataset(base.runtime.data), 1)
    written(tmp_path, 4, 8)
    last = finished_checkpoint(plan)
    assert last is not None
    assert last.step == 8
    damaged_by(kind, Path(last.uri))
    assert finished_checkpoint(plan) is None
    assert checkpoints.latest(str(tmp_path)).step == 4
    assert checkpoint.repair(str(tmp_path))[1] is False


def test_a_finished_run_registers_only_what_is_not_damaged(base, data, tmp_path):
    """The best checkpoint by validation is damaged: the next best one is registered, and the last one as always."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = changed(base, output=str(tmp_path / "run"), steps="8steps", workers=1, tracking_uri=uri, register="demo")
    claim(make_plan(job, open_dataset(data), 1), job.runtime.output)
    writer = written(tmp_path / "run")
    for step, top1 in ((2, 50.0), (4, 90.0), (6, 70.0), (8, 60.0)):
        metrics = {names.VAL_TOP1: top1}
        writer.save(step, tensors_of(writer, step), {"metrics": metrics, "config": {"classes": ["a", "b", "c"]}})
    writer.wait()
    two, four, six, eight = (checkpoints.folder(job.runtime.output, step) for step in (2, 4, 6, 8))
    flip_bit(Path(four, "model.safetensors"))
    with lines_of_log() as lines:
        result = pretrain(job)
    assert result["registered"] == {"demo/1": six, "demo/2": eight}
    assert any(f"not registered: {four}/model.safetensors: damaged" in line for line in lines)
    assert two not in result["registered"].values()


def test_a_run_is_not_finished_before_the_validation_that_a_stop_has_prevented(base, data, tmp_path):
    job = changed(base, output=str(tmp_path), steps="8steps")
    writer = written(tmp_path, 4)
    writer.save(8, tensors_of(writer, 8), {"metrics": {}, "unvalidated": True})
    writer.wait()
    validated, plain = (make_plan(changed(job, validation=uri), open_dataset(data), 1) for uri in (data, None))
    assert finished_checkpoint(plain) is not None
    assert finished_checkpoint(validated) is None


def test_a_checkpoint_of_another_format_is_neither_skipped_nor_removed(tmp_path):
    written(tmp_path, 1, 2)
    commit = Path(checkpoints.folder(str(tmp_path), 2)) / "COMMIT.json"
    commit.write_text(commit.read_text().replace(f'"format": {checkpoints.FORMAT}', '"format": 99'))
    for look in (checkpoints.find, checkpoints.resolve, lambda run: checkpoint.repair(run, delete=True)):
        with pytest.raises(UserError, match=r"step-00000002: its format version is 99, but this program reads \d+"):
            look(str(tmp_path))
    assert commit.exists()


def test_repair_lists_every_checkpoint_and_removes_when_asked(tmp_path):
    written(tmp_path, 1, 2, 3, 4)
    one, two, three, four = (Path(checkpoints.folder(str(tmp_path), step)) for step in (1, 2, 3, 4))
    assert checkpoint.repair(str(tmp_path))[1]
    (four / "COMMIT.json").unlink()
    (three / "config.json").write_bytes(b"")
    (two / "COMMIT.json").write_text('{"step": 2}')
    lines, is_sound = checkpoint.repair(str(tmp_path))
    assert not is_sound
    assert lines[0].startswith(f"complete     {one}: step 1, 5 files")
    assert lines[1].startswith(f"damaged      {two}: its COMMIT.json is invalid")
    assert lines[2].startswith(f"damaged      {three}: config.json has 0 bytes")
    assert lines[3].startswith(f"uncommitted  {four}: ")
    assert lines[4] == f"resumes from {one}"
    assert four.exists()
    assert checkpoint.repair(str(tmp_path), delete=True)[1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"]
    with pytest.raises(UserError, match="no checkpoints; give"):
        checkpoint.repair(str(tmp_path / "elsewhere"))


def test_files_of_others_beside_the_checkpoints_are_never_removed(tmp_path):
    """Own notes, an export, another run, and a committed copy under another name."""
    written(tmp_path, 2)
    root = tmp_path / "checkpoints"
    for name in (
        "README.txt",
        "my-export/model.onnx",
        "resnet50-sota/epoch_90.pt",
        "step-2/x",
        "step-best/COMMIT.json",
    ):
        storage.write_bytes(str(root / name), b"{}")
    storage.write_bytes(str(root / "step-00000004" / "model.safetensors"), b"interrupted")
    shutil.copytree(checkpoints.folder(str(tmp_path), 2), root / "zz-copy")
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "step-00000004" not in path.parts}
    lines, is_sound = checkpoint.repair(str(tmp_path))
    assert not is_sound
    assert [line.split()[0] for line in lines] == ["complete", "uncommitted", "resumes"]
    assert lines[-1] == f"resumes from {checkpoints.latest(str(tmp_path)).uri}"
    checkpoint.repair(str(tmp_path), delete=True)
    written(tmp_path, 6, 8, keep_last=1)
    for path, content in kept.items():
        assert path.exists() == ("step-00000002" not in path.parts), path
        assert not path.exists() or path.read_bytes() == content
    assert not (root / "step-00000004").exists()


def test_superseded_attempt_commits_nothing(tmp_path):
    """A worker that outlived a killed driver, or the same command started twice."""
    old = written(tmp_path, 2)
    new = written(tmp_path)
    old.save(4, dict, {})
    with pytest.raises(UserError, match="was taken over by another attempt of this run"):
        old.wait()
    assert checkpoints.latest(str(tmp_path)).step == 2
    new.close()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device (os error 28)")])
def test_full_disk_costs_one_checkpoint_and_the_next_one_is_written(tmp_path, monkeypatch, error):
    def refuse(*arguments):
        raise error

    with lines_of_log() as lines:
        writer = written(tmp_path, 2)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", refuse)
            writer.save(4, tensors_of(writer, 4), {})
            writer.save(6, tensors_of(writer, 6), {})
            with pytest.raises(checkpoint.StorageFull, match="No space left"):
                writer.wait()
        writer.save(8, tensors_of(writer, 8), {})
        writer.wait()
    assert "warning: the checkpoint of step 4 could not be written; training continues: " in lines[0]
    assert checkpoints.latest(str(tmp_path)).step == 8


def test_damaged_checkpoints_do_not_count_and_valid_ones_are_not_removed_early(tmp_path):
    """If the newest checkpoints are damaged, training continues from an older one; new checkpoints are kept, and
    damaged ones are removed at the end."""
    writer = written(tmp_path, 2, 10, 12, keep_last=2)
    for step in (10, 12):
        flip_bit(Path(checkpoints.folder(str(tmp_path), step), "model.safetensors"))
    assert checkpoints.latest(str(tmp_path)) is None
    resumed = written(tmp_path, 4, keep_last=2)
    assert checkpoints.latest(str(tmp_path)).step == 4
    resumed.save(6, tensors_of(writer, 6), {"metrics": {}})
    resumed.wait()
    assert [found.step for found in checkpoints.find(str(tmp_path))] == [4, 6]


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_checkpoint_damaged_during_the_run_does_not_count(tmp_path, s3, place):
    """Step 4 is damaged after this attempt has committed it: step 2 stays until there are two valid ones without it."""
    where = str(tmp_path) if place == "disk" else f"{s3}/run"
    writer = written(where, 2, 4, keep_last=2)
    damaged = storage.join(checkpoints.folder(where, 4), "model.safetensors")
    content = bytearray(storage.read_bytes(damaged))
    content[-1] ^= 1
    storage.write_bytes(damaged, bytes(content))
    left = []
    for step in (6, 8):
        writer.save(step, tensors_of(writer, step), {"metrics": {}})
        writer.wait()
        left.append([found.step for found in checkpoints.find(where) if checkpoints.damage(found) is None])
    assert left == [[2, 6], [6, 8]]
    assert [found.step for found in checkpoints.find(where)] == [6, 8]


def test_an_output_that_is_removed_during_the_run_costs_only_what_was_in_it(base, tmp_path):
    """`rm -rf` on the output: the run goes on, writes its next checkpoints, and can be continued from them."""
    job = changed(base, output=str(tmp_path / "run"), steps="8steps")
    plan = make_plan(job, open_dataset(base.runtime.data), 1)
    record = claim(plan, job.runtime.output)
    writer = written(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run")
    with lines_of_log() as lines:
        writer.save(4, tensors_of(writer, 4), {"metrics": {}})
        writer.wait()
        restore_record(job.runtime.output, record)
    assert sum("was removed during the run; it is written again" in line for line in lines) == 2
    assert checkpoints.latest(job.runtime.output).step == 4
    assert find_record(plan, job.runtime.output) == record
    written(tmp_path / "run")  # another attempt takes over
    writer.save(6, tensors_of(writer, 6), {"metrics": {}})
    with pytest.raises(UserError, match="was taken over by another attempt"):
        writer.wait()


def test_a_checkpoint_stays_when_an_old_one_cannot_be_removed(tmp_path, monkeypatch):
    writer = written(tmp_path, 2, keep_last=1)

    def refuse(uri, recursive=False):
        raise OSError(errno.EACCES, "Permission denied", uri)

    with lines_of_log() as lines, monkeypatch.context() as patch:
        patch.setattr(storage, "remove", refuse)
        writer.save(4, tensors_of(writer, 4), {"metrics": {}})
        writer.wait()
    assert any("old checkpoints of" in line and "Permission denied" in line for line in lines)
    assert checkpoints.latest(str(tmp_path)).step == 4
    assert writer.failed == []


def test_damaged_checkpoint_is_written_again_when_training_reaches_its_step(tmp_path):
    written(tmp_path, 2, 4)
    flip_bit(Path(checkpoints.folder(str(tmp_path), 4), "model.safetensors"))
    (Path(checkpoints.folder(str(tmp_path), 4)) / "state" / "param-00000-of-00002.safetensors").write_bytes(
        b"left over"
    )
    written(tmp_path, 4)
    found = checkpoints.latest(str(tmp_path))
    assert found.step == 4
    assert len(list((Path(found.uri) / "state").iterdir())) == 3


def test_superseded_attempt_does_not_change_a_committed_checkpoint(tmp_path):
    old = written(tmp_path, 2)
    written(tmp_path, 4)
    committed = {path: path.read_bytes() for path in Path(checkpoints.folder(str(tmp_path), 4)).rglob("*.*")}
    old.save(4, tensors_of(old, 99), {})
    with pytest.raises(UserError, match="was taken over by another attempt"):
        old.wait()
    assert {path: path.read_bytes() for path in committed} == committed


def test_worker_reads_only_the_files_it_needs(tmp_path, s3):
    """On S3: with the same number of workers, each worker reads its own files."""
    written(f"{s3}/run", 2).close()
    start = checkpoints.latest(f"{s3}/run")
    with checkpoint.StateReader(start.uri, list(start.commit["files"])) as reader:
        assert reader.kinds == {"param", "exp_avg", "exp_avg_sq"}
        assert torch.equal(reader.read("exp_avg", "head.bias", 1, 2), torch.tensor([2.0, 2.0]))
        assert os.listdir(reader.scratch) == ["exp_avg-00000-of-00001.safetensors"]
        with pytest.raises(UserError, match=r"has 3 of 4 values of param head\.bias"):
            reader.read("param", "head.bias", 0, 4)
    assert not os.path.exists(reader.scratch)


@pytest.mark.slow
def test_uploads_run_in_parallel_and_are_retried(s3, s3_server, monkeypatch):
    """The first request for every file is refused or reset. Later responses are slow, and no upload waits for
    another."""
    with FaultProxy(s3_server, stall=4.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        arrived: dict[str, float] = {}

        def fault(method: str, path: str, n: int) -> str | None:
            if method != "PUT" or "/state/" not in path:
                return None
            if n == 1:
                return "reset" if "param" in path else "503"
            arrived.setdefault(path, time.monotonic())
            return "stall"

        proxy.fault = fault
        written(f"{s3}/run", 2).close()
        assert len(arrived) == 3
        assert max(arrived.values()) - min(arrived.values()) < 3.5
        assert checkpoints.latest(f"{s3}/run").step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1000}, "larger than"),
        ({"lanes": 5}, "not divisible by lanes"),
        ({"loading_processes": 0}, "loading_processes 0 must be a number of at least 1"),
        ({"loading_processes": 3}, "--loading-processes 3 cannot share the 4 lanes"),
        ({"engine": EngineConfig(micro_batch=3)}, "does not divide"),
        ({"steps": "fast"}, "not a length of training"),
        ({"patch_keep_rate": 0.0}, "patch_keep_rate"),
        ({"augment": Augment(size=99)}, "augment.size"),
        ({"model": ModelConfig(variant="Q/16")}, "unknown model"),
    ],
)
def test_invalid_settings_are_reported_before_any_worker_starts(base, change, message):
    def check() -> None:
        plan = make_plan(changed(base, **change), open_dataset(base.runtime.data), 1)
        parameters(plan.model_options)

    with pytest.raises(UserError, match=message):
        check()


def test_workers_must_divide_lanes(base):
    with pytest.raises(UserError, match=r"3 workers cannot share batches of .* in 4 lanes"):
        make_plan(base, open_dataset(base.runtime.data), 3)
