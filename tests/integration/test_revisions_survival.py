"""`prepare --append` and `prepare delete` as commands, killed with SIGKILL, produce the bytes of an uninterrupted
run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data.format import open_dataset
from pipeline.data.format.verify import verify_dataset
from tests.images import tinted
from tests.prepared import JOB, content, job

OPTIONS = ("--size", "32", "--splits", "train=0.9", "test=0.1", "--shard-bytes", "100000", "--row-group-bytes", "20000")


def write_images(folder: Path, count: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = tinted(generator, 90, 100, label, noise=200, tint=40)
            cv2.imwrite(str(folder / name / f"{i:03d}.jpg"), picture)
    return folder


def kill_once(arguments: list[str], work: Path, generator: random.Random) -> bool:
    """Starts the command and kills its process group somewhere between its first file in the work folder and its end."""
    process = subprocess.Popen(
        [sys.executable, JOB, *arguments], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wanted, deadline = generator.randrange(1, 8), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(list(work.glob("*"))) < wanted:
        time.sleep(0.005)
    time.sleep(generator.random() * 0.5)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_appends_and_deletions_end_in_the_same_bytes(tmp_path):
    first, second = write_images(tmp_path / "first", 300, 1), write_images(tmp_path / "second", 300, 2)
    assert job("--source", first, "--output", tmp_path / "torn", *OPTIONS).returncode == 0
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    shutil.copytree(torn, whole)
    append = ["--append", "--source", str(second), *OPTIONS]
    result = job(*append, "--output", whole)
    assert result.returncode == 0, result.stderr
    train = open_dataset(f"{whole}/train")
    keys = [train[i]["key"] for i in range(0, len(train), 211)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    delete = ["--keys", str(tmp_path / "keys.txt")]
    result = job("delete", whole, *delete, "--purge")
    assert result.returncode == 0, result.stderr
    assert f"train@3: deleted={len(keys)}" in result.stdout
    assert "train: purged @1, @2" in result.stdout

    generator, kills = random.Random(0), 0
    for command in (["--no-tracking", *append, "--output", str(torn)], ["delete", str(torn), *delete, "--purge"]):
        for _ in range(3):
            kills += kill_once(command, torn / "_work", generator)
            for name in ("train", "test"):
                problems = verify_dataset(f"{torn}/{name}")
                assert [line for line in problems if "not in the manifest" not in line] == []
        result = job(*[word for word in command if word != "--no-tracking"])
        assert result.returncode == 0, result.stderr
    assert kills >= 3
    assert content(torn) == content(whole)
    assert verify_dataset(f"{torn}/train") == verify_dataset(f"{torn}/test") == []
