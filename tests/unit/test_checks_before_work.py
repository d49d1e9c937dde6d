"""Errors are reported before anything is written."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from models import create_model
from pipeline.config import fingerprint
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.errors import UserError
from pipeline.operations import doctor
from pipeline.operations.planning import preview
from pipeline.outputs import check_output
from pipeline.training import run
from pipeline.training.config import EngineConfig, FewShotConfig, ModelConfig
from pipeline.training.plan import check_values
from pipeline.training.recipes import RECIPES
from pipeline.training.schedule import ScheduleConfig
from pipeline.weights import save_checkpoint_weights
from tests.datasets import write_tinted_patches
from tests.runs import changed, commit_checkpoint, pretrain_config

ROOT = Path(__file__).parents[2]

PROJECT = Path(__file__).parents[2]
DEMO = RECIPES["demo"]()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The working directory: a package folder of Ray with a dataset and a checkpoint."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    rows = [(f"{i}", picture(i), i % 2, 8, 8) for i in range(64)]
    for name in ("data", "runs/demo/data/train", "runs/demo/data/val"):
        write_dataset(str(folder / name), rows, classes=["a", "b"])
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "images" / "a" / "one.png").write_bytes(picture(0))
    (folder / "raw").mkdir()
    checkpoint = folder / "run" / "checkpoints" / "step-00000007"
    save_checkpoint_weights(create_model("mu/8", 2, 8), {"classes": ["a", "b"]}, str(checkpoint))
    commit_checkpoint(checkpoint, 7)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return folder


def main_of(job):
    """`main` of jobs/JOB.py, even if another module `jobs` is on the path."""
    name = f"job_{job}"
    spec = importlib.util.spec_from_file_location(name, PROJECT / "jobs" / f"{job}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def picture(seed):
    return cv2.imencode(".png", np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(DEMO, keep_last=-1), "keep_last -1"),
        (changed(DEMO, cpus_per_worker=-1.0), "cpus_per_worker -1.0"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, lr=float("nan"))), "optimizer.lr nan"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, lr=float("inf"))), "optimizer.lr inf"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, lr=-1e-3)), "optimizer.lr -0.001"),
        (changed(DEMO, augment=replace(DEMO.augment, mixup=float("nan"))), "augment.mixup nan"),
        (changed(DEMO, fewshot=FewShotConfig(l2=float("nan"))), "fewshot.l2 nan"),
        (changed(DEMO, register="a/b"), 'register "a/b" is not a valid model name'),
        (changed(DEMO, ema_decay=1.0), "ema_decay 1.0"),
        *(
            (changed(DEMO, optimizer=replace(DEMO.optimizer, betas=betas)), rf"optimizer\.betas\[{i}\] {value}")
            for i in (0, 1)
            for value in (-1.0, 1.0, 2.0)
            for betas in [tuple(value if i == j else 0.9 for j in (0, 1))]
        ),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, betas=(0.9, float("nan")))), r"optimizer\.betas nan"),
        *(
            (changed(DEMO, optimizer=replace(DEMO.optimizer, momentum=x)), f"optimizer.momentum {x}")
            for x in (-0.1, 1.0)
        ),
        *((changed(DEMO, optimizer=replace(DEMO.optimizer, eps=x)), f"optimizer.eps {x}") for x in (-1e-8, 0.0)),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, weight_decay=-0.1)), "optimizer.weight_decay -0.1"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, muon_lr=-0.1)), "optimizer.muon_lr -0.1"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, clip=0.0)), "optimizer.clip 0.0"),
        (changed(DEMO, schedule=replace(DEMO.schedule, timescale=0)), "schedule.timescale 0"),
        (changed(DEMO, model=replace(DEMO.model, depth=0)), "model.depth 0"),
        (changed(DEMO, max_replaced=-1), "max_replaced -1"),
        (changed(DEMO, seed=1 << 63), "seed 9223372036854775808"),
        (
            changed(DEMO, image_size=64),
            "--validation-resize 32 is less than --image-size 64; give --validation-resize 73",
        ),
        (changed(DEMO, workers=0), "workers 0"),
        (changed(DEMO, workers=2, min_workers=3), "min_workers 3 must be between 1 and workers"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        check_values(config)


@pytest.fixture
def fields(tmp_path, monkeypatch):
    """Fields of a valid run: 64 labelled training images of 4 classes, and 16 validation images."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write(tmp_path / "data", 64, "abcd")
    write(tmp_path / "val", 16, "abcd")
    return {
        "data": str(tmp_path / "data"),
        "validation": str(tmp_path / "val"),
        "output": str(tmp_path / "run"),
        "steps": "4steps",
        "batch_size": 8,
        "image_size": 8,
        "model": ModelConfig(variant="mu/8", depth=1),
        "augment": Augment(size=8),
        "engine": EngineConfig(precision="fp32"),
        "lanes": 4,
    }


def write(folder, count, classes, label=lambda i, n: i % n):
    rows = ((f"{i}", picture(i), label(i, len(classes)), 8, 8) for i in range(count))
    write_dataset(str(folder), rows, classes=list(classes))
    return str(folder)


def others(folder):
    """The output of another project."""
    for name in ("checkpoints/resnet50/epoch_90.pt", "logs/1/events"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("theirs")
    return str(folder)


def weights(folder, run=False):
    """A checkpoint for two classes and 16 pixels."""
    if run:
        folder.mkdir()
        (folder / "run.json").write_text("{}")
    step = folder / "checkpoints" / "step-00000001"
    save_checkpoint_weights(create_model("S/16", 2, 16), {"classes": ["a", "b"]}, str(step))
    commit_checkpoint(step, 1)
    return str(folder)


def test_settings_that_mean_less_than_they_say_are_warned_of(fields, tmp_path, caplog):
    probe = FewShotConfig(train=write(tmp_path / "few", 10, "abcd"), shots=3)  # 3, 3, 2 and 2 images
    config = changed(pretrain_config(**fields), fewshot=probe, schedule=ScheduleConfig(warmup="5steps"))
    run.check_run(config)
    assert "--fewshot.shots 3: 2 classes of" in caplog.text
    assert "(2 of 4) with fewer than 3 images, such as c with 2: all of its images are used" in caplog.text
    assert "schedule.warmup 5steps (5 steps) is longer than the run of 4 steps" in caplog.text
    caplog.clear()
    run.check_run(changed(config, fewshot=replace(probe, shots=2), schedule=ScheduleConfig(warmup="4steps")))
    assert not caplog.records


def without_its_second_shard(folder):
    """Training data of which a shard was deleted."""
    write_dataset(str(folder), ROWS, classes=list("abcd"), shard_bytes=1, row_group_bytes=400)
    sorted(folder.glob("part-*"))[1].unlink()
    return str(folder)


def with_a_short_shard(folder):
    """Training data of which a shard was truncated."""
    write_dataset(str(folder), ROWS, classes=list("abcd"))
    (shard,) = folder.glob("part-*")
    shard.write_bytes(shard.read_bytes()[:-100])
    return str(folder)


ROWS = [(f"{i}", cv2.imencode(".png", np.full((8, 8, 3), i, np.uint8))[1].tobytes(), i % 4, 8, 8) for i in range(64)]


def parent_of_splits(folder):
    for name in ("test", "train", "val"):
        write(folder / name, 8, "abcd")
    return str(folder)


def raw_images(folder):
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"")
    return str(folder)


WRONG = {
    "data with its splits in folders": (
        lambda t: {"data": parent_of_splits(t / "sets")},
        "sets: no dataset here, but in its folders test, train, val(; name one of them, such as .*sets/train)?$",
    ),
    "data that is not prepared": (
        lambda t: {"data": raw_images(t / "photos")},
        "photos: images such as 1.png, but no dataset",
    ),
    "data without a shard": (
        lambda t: {"data": without_its_second_shard(t / "d")},
        "0001.parquet: the shard is missing",
    ),
    "data with a short shard": (
        lambda t: {"data": with_a_short_shard(t / "d")},
        "0000.parquet: the shard has .* bytes instead of",
    ),
    "validation without a shard": (
        lambda t: {"validation": without_its_second_shard(t / "d")},
        "0001.parquet: the shard is missing",
    ),
    "validation of another class": (
        lambda t: {"validation": write(t / "x", 8, "abce")},
        r"--validation .*: e is not among the run",
    ),
    "validation without labels": (
        lambda t: {"validation": write(t / "x", 8, "abcd", lambda i, n: -1)},
        "--validation .* has no labelled images",
    ),
    "validation that is not there": (lambda t: {"validation": str(t / "none")}, "none: no dataset here"),
    "few-shot sets that differ": (
        lambda t: {"fewshot": FewShotConfig(train=write(t / "x", 8, "ab"))},
        "must have the same classes",
    ),
    "mixture with a weight that cannot be": (
        lambda t: {"data": "a=1,b=0"},
        'the weight of "b" must be a number above 0',
    ),
    "mixture of other encodings": (
        lambda t: {"data": f"{t}/data=1,{write_tinted_patches(f'{t}/x', 8, 16, seed=0, noise=9, tint=9)}=1"},
        "cannot be mixed: their encodings are jpeg and patches",
    ),
    "mixture with a data set that is not there": (
        lambda t: {"data": f"{t}/data=1,{t}/none=1"},
        "none: no dataset here",
    ),
    "image smaller than a patch": (
        lambda t: {"image_size": 4, "augment": Augment(size=4)},
        "--image-size 4 is smaller than one patch of mu/8",
    ),
    "validation smaller than the image": (lambda t: {"validation_resize": 7}, "--validation-resize 7 is less than"),
    "GPUs that are not there": (lambda t: {"gpus": True}, "--gpus: this machine has no GPU"),
    "output that is no folder": (lambda t: {"output": str(t / "data" / "manifest.json" / "x")}, "is not a folder"),
    "output in a bucket without keys": (
        lambda t: {"output": "s3://no-such-bucket/x"},
        "--output s3://.* cannot be written",
    ),
    "output that holds other files": (lambda t: {"output": str(t / "val")}, "is not empty and does not contain a run"),
    "output that holds folders of others": (
        lambda t: {"output": others(t / "x")},
        "is not empty and does not contain a run .it has checkpoints, logs, but no run.json",
    ),
    "output that holds the checkpoints of a run": (
        lambda t: {"output": weights(t / "other", run=True) + "/checkpoints"},
        "other/checkpoints (is not empty|holds the checkpoints of the run)",
    ),
    "cache that cannot be written": (lambda t: {"cache": "/proc/cache"}, "--cache /proc/cache"),
    "weights that are not there": (lambda t: {"init_from": str(t / "none.npz")}, "none.npz"),
    "weights of another shape": (lambda t: {"init_from": weights(t / "other")}, "other|shape"),
    "tracking that MLflow does not know": (lambda t: {"tracking_uri": "nonsense://x"}, "has no store nonsense://"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("how", ["dry run", "doctor", "start"])
def test_errors_that_a_run_would_find_later(what, how, fields, tmp_path, monkeypatch):
    """The dry run, doctor and a real start report the same error and leave no files."""
    if (what, how) == ("GPUs that are not there", "dry run"):
        pytest.skip("a plan may be made on another machine: the next test")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    make, message = WRONG[what]
    config = pretrain_config(**{**fields, **make(tmp_path)})
    if how == "doctor":
        found = doctor.examine(config)
        assert [result for result in found if result.status == "error" and re.search(message, result.message)], found
    else:
        with pytest.raises(UserError, match=message):
            preview.dry_run(config, "", {}) if how == "dry run" else run.pretrain(config)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("how", ["dry run", "doctor", "start"])
def test_a_disk_without_space_for_one_checkpoint(how, fields, tmp_path, monkeypatch):
    """mu/8 with one block has 19,172 parameters of 16 bytes: 0.3 MB a checkpoint."""
    config = pretrain_config(**fields)
    free_space(monkeypatch, 100_000)
    message = "--output .*: 100 kB free, and a checkpoint of this run takes 324 kB"
    if how == "doctor":
        (found,) = [result for result in doctor.examine(config) if result.check == "run"]
        assert (found.status, found.remedy) == ("error", "free some space or choose another --output")
        assert re.search(message, found.message)
    else:
        with pytest.raises(UserError, match=message):
            preview.dry_run(config, "", {}) if how == "dry run" else run.pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_disk_without_space_for_all_kept_checkpoints(fields, monkeypatch):
    config = pretrain_config(**{**fields, "keep_last": 3})
    free_space(monkeypatch, 900_000)  # of three, the best one and the next one
    warning = "900 kB free, and 4 kept checkpoints and the next one take 1.62 MB; free some space or lower --keep-last"
    assert warning in " ".join(preview.dry_run(config, "", {}).split())
    (found,) = [result for result in doctor.examine(config) if result.check == "run"]
    assert found.status == "warning"
    assert f"{found.message}; {found.remedy}".endswith(warning)
    free_space(monkeypatch, 1_700_000)
    assert "free some space" not in " ".join(preview.dry_run(config, "", {}).split())
    free_space(monkeypatch, 100_000)
    plan = run.check_run(config)
    there = dataclasses.replace(plan, config=changed(plan.config, output="s3://bucket/run"))
    assert "goes through this folder; free some space there or set TMPDIR" in run.check_space(there)


def free_space(monkeypatch, count):
    """A disk with `count` free bytes."""
    usage = shutil.disk_usage("/")._replace(free=count)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_checkpoints_of_another_run_are_not_continued(fields, tmp_path):
    """A folder of checkpoints that was copied into the output of a run with another seed."""
    config = pretrain_config(**fields)
    plan, output = run.check_run(config), fields["output"]
    run.claim(plan, output)
    place = tmp_path / "run" / "checkpoints"
    for step, identity in ((2, fingerprint(plan.identity)), (3, "of another run")):
        (place / f"step-{step:08d}").mkdir(parents=True)
        commit_checkpoint(place / f"step-{step:08d}", step, identity=identity)
    with pytest.raises(UserError, match=r"step-00000003 belongs to another run than .*run\.json; move it away"):
        run.pretrain(config)
    shutil.rmtree(place / "step-00000003")
    assert run.find_record(plan, output) is not None


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "unfinished work", "unfinished splits"])
def test_dry_run_plans_for_data_that_can_still_be_prepared(what, fields, tmp_path):
    data = tmp_path / "sets" / "train"
    if what == "an empty folder":
        data.mkdir(parents=True)
    if what.startswith("unfinished"):
        work = (data if what == "unfinished work" else tmp_path / "sets") / "_work"
        work.mkdir(parents=True)
        (work / "plan.json").write_text("{}")
        data.mkdir(exist_ok=True)
        (data / "part-00000-0000.parquet").write_bytes(b"x")
    config = pretrain_config(**{**fields, "data": str(data), "validation": None})
    assert f"no dataset at {data} yet" in " ".join(preview.dry_run(config, "cifar10", {}).split())


def test_dry_run_refuses_a_file_in_place_of_data(fields, tmp_path):
    (tmp_path / "photos.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"photos.tar: no dataset here"):
        preview.dry_run(pretrain_config(**{**fields, "data": str(tmp_path / "photos.tar")}), "cifar10", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "/proc/run"}, "--output /proc/run"),
        ({"init_from": "none.npz"}, "none.npz"),
        ({"validation_resize": 7}, "--validation-resize 7"),
    ],
)
def test_dry_run_without_the_data_checks_everything_else(change, message, fields, tmp_path):
    config = pretrain_config(**{**fields, "data": str(tmp_path / "later"), "validation": None, **change})
    with pytest.raises(UserError, match=message):
        preview.dry_run(config, "cifar10", {})


@pytest.mark.parametrize("data", ["later", "data"])
def test_dry_run_of_a_gpu_run_on_a_machine_without_gpus(data, fields, tmp_path):
    """The plan is for the GPU of --gpu, whether the data exists or not, and a note says what this machine lacks."""
    changes = {"data": str(tmp_path / data), "validation": None, "gpus": True, "gpu": "l4"}
    text = preview.dry_run(pretrain_config(**{**fields, **changes}), "cifar10", {})
    assert "note planned for --gpu l4; --gpus: this machine has no GPU; to start here, use --no-gpus" in " ".join(
        text.split()
    )
    assert "on 1 x l4" in text


def test_output_that_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is not a folder"):
            check_output(str(output))
    check_output(str(tmp_path / "new" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_on_a_file_system_that_accepts_no_files():
    """/proc appears writable to root, so only an attempt to write shows that it is not."""
    with pytest.raises(UserError, match="--output /proc/run: /proc cannot be written"):
        check_output("/proc/run")


@pytest.mark.parametrize("name", ["n" * 300, "ü" * 150, "a\0b"])
def test_output_with_a_name_that_no_folder_can_have(name, tmp_path):
    with pytest.raises(UserError, match="no folder can have this name; choose another --output"):
        check_output(f"{tmp_path}/{name}/run")
    check_output(f"{tmp_path}/{'n' * 255}/run")


def test_output_in_a_bucket_that_does_not_exist(s3):
    with pytest.raises(UserError, match="--output s3://no-such-bucket-here/run cannot be written"):
        check_output("s3://no-such-bucket-here/run")
    check_output(f"{s3}/run")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("transfer --suite folder --checkpoint run --data nowhere --output out", "nowhere: no dataset with train"),
        (
            "transfer --suite folder --checkpoint run --data data --output out --lrs nan",
            "lrs nan must be a finite number",
        ),
        (
            "transfer --suite folder --checkpoint run --data data --output out --retries -1",
            "--retries must be at least 0",
        ),
        ("transfer --suite folder --checkpoint nowhere --data data --output out", "no complete checkpoint"),
        ("transfer --suite folder --checkpoint run --data data --output /proc/x", "--output /proc/x"),
        ("evaluate --suite nosuite --runs run --data data --output out", 'unknown suite "nosuite"'),
        ("evaluate --suite folder --runs run --data nowhere --output out", "nowhere: no dataset with train"),
        ("evaluate --suite folder --runs run --data nowhere --output out --dry-run", "nowhere: no dataset with train"),
        (
            "evaluate --suite folder --runs run --data data --output out --every-step 0",
            "--every-step must be at least 1",
        ),
        (
            "evaluate --suite folder --runs run --data data --output out --margin nan",
            "margin nan must be a finite number",
        ),
        ("evaluate --suite folder --model a/b --data data --output out", '--model "a/b"'),
        (
            "evaluate --suite folder --runs run --data data --output out --transfer.lrs inf",
            "lrs inf must be a finite number",
        ),
        ("evaluate --suite folder --runs run --data data --output /proc/x", "--output /proc/x"),
        ("evaluate --runs run --prune --keep-last -1", "--keep-last must be at least 1"),
        ("prepare --source images --output out --num-cpus 0", "--num-cpus must be at least 1"),
        (
            "prepare --source images --output out --max-reject-fraction nan",
            "max_reject_fraction nan must be a finite number",
        ),
        ("prepare --source images --output out --splits train=0.5 val=0.7", "fractions that add up to 1"),
        ("prepare --source images --output /proc/x", "--output /proc/x"),
        ("prepare --source images --output out --tracking-uri nonsense://x", "no store nonsense://"),
        ("prepare vtab dtd --raw nowhere --output out --no-tracking", "dtd"),
        ("prepare vtab dtd --raw raw --output /proc/x --no-tracking", "--output /proc/x|dtd"),
    ],
)
def test_other_jobs_check_before_they_work(command, message, package, monkeypatch, tmp_path):
    """Jobs in a working folder with data, a checkpoint and images leave no new files."""
    shutil.move(package, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    name, *rest = command.split()
    with pytest.raises(UserError, match=message):
        main_of(name)(rest)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


JOBS = {
    "prepare": "--source images --output out --no-tracking",
    "prepare vtab": "dtd --raw raw --output out --no-tracking",
    "prepare describe": "runs/demo/data/train",
    "pretrain": "--recipe demo",
    "pretrain --dry-run": "--recipe demo --data data",
    "transfer": "--suite demo --checkpoint run --data data",
    "evaluate": "--runs run --suite demo --data data --once",
    "export": "--checkpoint run --to safetensors --output out",
    "visualize": "--checkpoint run --output out",
    "compare": "--output out",
}


@pytest.mark.parametrize("job", JOBS)
def test_relative_output_in_the_package_folder_of_a_ray_job(job, package, monkeypatch, capsys):
    """Every job, also with default flags, is started in a copy of the project as
    unpacked by `ray job submit --working-dir`."""
    name, *rest = job.split()
    main = main_of(name)
    with pytest.raises(UserError, match=r"Ray's temporary copy .* absolute path .* s3://"):
        main([*rest, *JOBS[job].split()])
    assert not (package / "out").exists()
    assert not (package / "mlflow.db").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["prepare.py", "--source", "{folder}", "--output"],
        ["pipeline.py", "run", "--recipe", "demo", "--output"],
        ["plan.py", "--recipe", "b16_imagenet", "--scaling"],
    ],
    ids=lambda command: command[0],
)
def test_an_output_below_a_file_is_one_line_before_any_work(command, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "photos").mkdir()
    words = [word.format(folder=tmp_path / "photos") for word in command]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / words[0]), *words[1:], str(tmp_path / "file" / "out" / "a.png")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path / 'file'} is not a folder; choose another {words[-1]}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "why"),
    [("plots/a.png", "there is no folder {folder}/plots; create it, or"), ("a.pdf", "the file name must end in .png")],
)
def test_a_plot_that_cannot_be_written_is_one_line_and_makes_no_folder(file, why, tmp_path):
    place = str(tmp_path / file)
    with pytest.raises(UserError, match=re.escape(f"--scaling {place}: {why.format(folder=tmp_path)}")):
        main_of("plan")(["--recipe", "b16_imagenet", "--scaling", place])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/spool", "/proc/spool"])
@pytest.mark.parametrize("command", ["prepare --source photos --output out", "pretrain --dry-run"])
def test_records_that_could_not_be_kept_are_one_line_before_any_work(command, place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_SPOOL", place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    job, *words = command.split()
    with pytest.raises(UserError, match=f"VIT_SPOOL {os.path.abspath(place)}: .*choose another VIT_SPOOL"):
        main_of(job)(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_a_file_that_cannot_be_written_whole_is_named_and_leaves_nothing(tmp_path):
    """A limit on the file size of the process simulates a full disk."""
    code = "import resource, signal, sys; from pipeline import storage; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); storage.write_bytes(sys.argv[1], bytes(5000))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.bin")], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert f"File too large: '{tmp_path / 'a.bin'}'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_datasets_of_one_name_do_not_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("letters/train", "flowers/train"):
        write(tmp_path / name, 8, "abcd")
    describe = main_of("prepare")
    assert [describe(["describe", uri]) for uri in ("letters/train", str(tmp_path / "flowers/train/"))] == [0, 0]
    assert sorted(os.listdir("runs/describe")) == ["flowers-train", "letters-train"]
