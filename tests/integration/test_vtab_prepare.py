"""Runs the vtab command on real Ray Data, from and to an S3 endpoint, and kills it while it works."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import storage, workqueue
from pipeline.vtab import TASKS, miniature, open_split, prepare
from pipeline.vtab.build import WORK
from tests.objectstore import copy_folder

PROJECT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        str(PROJECT / "jobs" / "prepare.py"),
        "vtab",
        *arguments,
        "--no-tracking",
        "--num-cpus",
        "2",
    ]


def fingerprints(results: dict) -> dict:
    return {
        (task, split): counts["fingerprint"] for task, splits in results.items() for split, counts in splits.items()
    }


@pytest.mark.slow
def test_from_s3_to_s3(s3, tmp_path):
    """A tar, a zip, gzipped arrays and MATLAB files on S3 give the same datasets as local files."""
    tasks = ["cifar100", "eurosat", "smallnorb_azimuth", "svhn"]
    raw = miniature.write(tasks, str(tmp_path / "raw"), per_class=3)
    copy_folder(raw, f"{s3}/raw")
    done = subprocess.run(
        command(*tasks, "--raw", f"{s3}/raw", "--output", f"{s3}/sets", "--json"),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert open_split(f"{s3}/sets/svhn", "test").read([0])[0]["width"] == 32
    with workqueue.without_ray():
        assert fingerprints(results) == fingerprints(prepare(tasks, raw, str(tmp_path / "sets")))
    assert not [file for file in storage.list_files(f"{s3}/sets") if WORK in file.path]


@pytest.mark.slow
def test_a_killed_command_continues(tmp_path):
    raw = miniature.write("all", str(tmp_path / "raw"))
    arguments = command("all", "--raw", raw, "--output", str(tmp_path / "sets"))
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(receipts := list((tmp_path / "sets").glob(f"{WORK}/*.json"))) < 8:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # workers notice that their driver has died
    kept = {path: path.stat().st_mtime_ns for path in receipts if path.exists()}
    assert not list((tmp_path / "sets").rglob("manifest.json"))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").rglob("part-*.parquet")}
    subprocess.run(arguments, check=True, timeout=280, stdout=subprocess.DEVNULL)
    assert kept
    untouched = [path for path, written in shards.items() if path.exists() and path.stat().st_mtime_ns == written]
    assert len(untouched) >= len(kept)  # every finished unit has at least one shard, which was not written again
    with workqueue.without_ray():
        undisturbed = fingerprints(prepare(TASKS, raw, str(tmp_path / "again")))
    for (task, split), fingerprint in undisturbed.items():
        assert open_split(str(tmp_path / "sets" / task), split).manifest.fingerprint == fingerprint
