"""What a run would find wrong later is said before anything is written."""

import importlib
from dataclasses import replace

import cv2
import numpy as np
import pytest

from models import create_model
from pipeline.data.format import write_dataset
from pipeline.errors import UserError
from pipeline.outputs import check_output
from pipeline.training.plan import check_values
from pipeline.training.recipes import RECIPES
from pipeline.weights import save_checkpoint_weights
from tests.runs import changed, commit_checkpoint

DEMO = RECIPES["demo"]()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder of Ray, with a dataset and a checkpoint that jobs find there; the working directory."""
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


def picture(seed):
    return cv2.imencode(".png", np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(DEMO, keep_last=-1), "keep_last -1"),
        (changed(DEMO, cpus_per_worker=-1.0), "cpus_per_worker -1.0"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, lr=float("nan"))), "optimizer.lr nan"),
        (changed(DEMO, ema_decay=1.0), "ema_decay 1.0"),
        (changed(DEMO, image_size=64), "validation_resize 32 is less than image_size 64; give --validation-resize 73"),
        (changed(DEMO, workers=0), "workers 0"),
        (changed(DEMO, workers=2, min_workers=3), "min_workers 3 must be between 1 and workers"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        check_values(config)


def test_output_that_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is not a folder"):
            check_output(str(output))
    check_output(str(tmp_path / "new" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_on_a_file_system_that_takes_no_files():
    """/proc looks writable to root, and is not: only writing tells."""
    with pytest.raises(UserError, match="--output /proc/run: /proc cannot be written"):
        check_output("/proc/run")


def test_output_in_a_bucket_that_does_not_exist(s3):
    with pytest.raises(UserError, match="--output s3://no-such-bucket-here/run cannot be written"):
        check_output("s3://no-such-bucket-here/run")
    check_output(f"{s3}/run")


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
    """Each job, defaults too, is started in a copy of the project as `ray job submit --working-dir` unpacks it."""
    name, *rest = job.split()
    main = importlib.import_module(f"jobs.{name}").main
    with pytest.raises(UserError, match=r"Ray's temporary copy .* absolute path .* s3://"):
        main([*rest, *JOBS[job].split()])
    assert not (package / "out").exists()
    assert not (package / "mlflow.db").exists()
