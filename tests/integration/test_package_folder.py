"""Jobs whose output would be in the copy of the project that `ray job submit
--working-dir` unpacks, on a real Ray head."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rayhead import ray_head

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """(environment with the token, its home, a working folder that looks like a checkout with a run of the demo)"""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("project")
    make = f"""
import numpy as np, cv2
from models import create_model
from pipeline.data.format import write_dataset
from pipeline.weights import save_checkpoint_weights
from tests.runs import commit_checkpoint
pictures = np.random.default_rng(0).integers(0, 255, (64, 8, 8, 3), np.uint8)
rows = [(f"{{i}}", cv2.imencode(".png", p)[1].tobytes(), i % 2, 8, 8) for i, p in enumerate(pictures)]
for name in ("data", "data/train", "data/test"):
    write_dataset(r"{folder}/sets/" + name, rows, classes=["a", "b"])
step = r"{folder}/run/checkpoints/step-00000007"
save_checkpoint_weights(create_model("mu/8", 2, 8), {{"classes": ["a", "b"]}}, step)
commit_checkpoint(step, 7)
"""
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, timeout=300)
    with ray_head(home, "4a1c" * 16) as (address, _, environment):
        yield address, environment, home, folder


COMMANDS = {
    "pretrain": ("pretrain.py --recipe demo --data sets/data --output out", "--output"),
    "pretrain's default": ("pretrain.py --recipe demo --data sets/data", "--output"),
    "transfer's default": ("transfer.py --suite folder --checkpoint run --data sets", "--output"),
    "evaluate's default": ("evaluate.py --runs run --suite folder --data sets --once", "--output"),
    "SQLite": (
        "pretrain.py --recipe demo --data sets/data --output {home}/run --tracking-uri sqlite:///mlflow.db",
        "tracking URI",
    ),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_the_refusal_names_the_flag_to_set(what, head):
    address, environment, home, folder = head
    words, names = COMMANDS[what]
    job, *rest = words.format(home=home).split()
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    options = [f"--address={address}", f"--working-dir={folder}", f"--runtime-env-json={runtime}"]
    command = ["ray", "job", "submit", *options, "--", sys.executable, str(ROOT / "jobs" / job), *rest]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(rf"error: {names} \S+.*(Ray's temporary copy|Ray's copy).*absolute path", text), text
    assert "Traceback (most recent call last)" not in text.partition("error:")[0]
    assert not (home / "run").exists()


def test_without_an_mlflow_address_the_job_reports_where_it_records(head):
    address, environment, home, folder = head
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    options = [f"--address={address}", f"--working-dir={folder}", f"--runtime-env-json={runtime}"]
    job = [
        sys.executable,
        str(ROOT / "jobs" / "transfer.py"),
        "--suite",
        "folder",
        "--checkpoint",
        "run",
        "--data",
        "nowhere",
    ]
    done = subprocess.run(
        ["ray", "job", "submit", *options, "--", *job, "--output", str(home / "out")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert f"MLFLOW_TRACKING_URI is not set, so MLflow writes to sqlite:///{home}/mlflow.db on this node" in (
        done.stdout + done.stderr
    )
