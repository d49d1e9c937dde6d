"""One flipped bit in the weights of a checkpoint: every command refuses them with one line that names the file."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import create_model
from pipeline.data.format.writer import write_dataset
from pipeline.weights import save_checkpoint_weights
from tests.runs import commit_checkpoint, flip_bit

PROJECT = Path(__file__).parents[2]
COMMANDS = {
    "export": "--checkpoint run --to safetensors --output out",
    "visualize": "--checkpoint run --output out --no-log",
    "transfer": "--checkpoint run --suite folder --data sets --output out",
    "pretrain": "--init-from run --data sets/own/train --output out --dry-run --batch-size 8 --workers 1",
    "evaluate": "--runs run --suite folder --data sets --once --output out",
}


@pytest.fixture
def place(tmp_path):
    """A folder with a run of one damaged checkpoint, and a small data set."""
    torch.manual_seed(0)
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    model = create_model("mu/8", 3, 24)
    save_checkpoint_weights(model, {"classes": ["a", "b", "c"]}, str(folder))
    commit_checkpoint(folder, 7)
    flip_bit(folder / "model.safetensors")
    pictures = np.random.default_rng(0).integers(0, 255, (12, 24, 24, 3), dtype=np.uint8)
    rows = [(f"{i}", cv2.imencode(".png", picture)[1].tobytes(), i % 3, 24, 24) for i, picture in enumerate(pictures)]
    for split in ("train", "test"):
        write_dataset(str(tmp_path / "sets" / "own" / split), rows, classes=["a", "b", "c"])
    return tmp_path


@pytest.mark.parametrize("job", COMMANDS)
def test_damaged_weights_are_refused_by_every_command(place, job):
    tracking = [] if job in ("visualize", "export") else ["--tracking-uri", f"sqlite:///{place}/mlflow.db"]
    command = [sys.executable, str(PROJECT / "jobs" / f"{job}.py"), *COMMANDS[job].split(), *tracking]
    failed = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=250)
    assert failed.returncode in ((1, 2) if job == "evaluate" else (2,)), failed.stderr
    assert "step-00000007/model.safetensors: damaged" in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr
