"""Runs infra/slurm with bash and substitutes for Slurm's programs; Ray, its token and the training are real.

`ray symmetric-run` is also substituted, because it ends all Ray processes of
the user, including those of other tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.format import write_dataset
from tests.ports import free_port
from tests.rayhead import ray_head

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "slurm" / "pretrain.sbatch"
BIN = Path(sys.executable).parent

STAND_INS = {
    "python": 'exec "$REAL/python" "$@"',
    "scontrol": 'test "$*" = "show hostnames node[1-1]" && echo node1',
    # srun's options, then the command that it runs on the nodes
    "srun": 'while [[ "$1" == --* ]]; do echo "$1" >> "$CALLS"; shift; done; exec "$@"',
    "hostname": 'test "$*" = --ip-address && echo 127.0.0.1 10.0.0.7',
    "ray": 'if [ "$1" != symmetric-run ]; then exec "$REAL/ray" "$@"; fi\n'
    'echo "$@" >> "$CALLS"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
}


@pytest.fixture
def submitted(tmp_path):
    """The folder of a Slurm user: the project, its .venv with the fake commands first, and a home folder."""
    for name in ("pipeline", "models", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    generator = np.random.default_rng(0)
    image = {"height": 32, "width": 32, "patch_size": 8, "channels": 3}
    patches = ((f"{i:03d}", generator.integers(0, 256, (16, 192), np.uint8), i % 2, 32, 32) for i in range(64))
    write_dataset(str(tmp_path / "data"), patches, classes=["a", "b"], encoding="patches", image=image)
    return tmp_path


def test_the_batch_script_trains(submitted):
    port = free_port()
    slurm = {"SLURM_SUBMIT_DIR": submitted, "SLURM_JOB_NODELIST": "node[1-1]", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "1", "RECIPE": "demo", "DATA": submitted / "data"}
    slurm |= {"OUTPUT": submitted / "out", "MLFLOW_TRACKING_URI": f"sqlite:///{submitted}/mlflow.db"}
    slurm |= {"CALLS": submitted / "calls", "REAL": BIN, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    small = ["--steps", "2", "--batch-size", "8", "--lanes", "1", "--validation", "None", "--augment.crop", "squash"]
    with ray_head(submitted / "home", "51ab" * 16, port) as (_, _, with_token):
        environment = with_token | {name: str(value) for name, value in slurm.items()}
        environment |= {"PATH": f"{submitted}/.venv/bin:{os.environ['PATH']}"}
        done = subprocess.run(["bash", SCRIPT, *small], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (submitted / "calls").read_text()
    assert "--nodelist=node1" in calls
    assert "symmetric-run --address 127.0.0.1:6379 --min-nodes 1 --num-cpus 1 --num-gpus 1" in calls
    (commit,) = (submitted / "out" / "checkpoints").glob("*/COMMIT.json")
    assert json.loads(commit.read_text())["step"] == 2


def test_the_batch_script_requires_an_mlflow_server(submitted):
    environment = {"PATH": os.environ["PATH"], "HOME": str(submitted / "home"), "SLURM_SUBMIT_DIR": str(submitted)}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MLFLOW_TRACKING_URI: is not set: give the address of your MLflow server" in done.stderr
