"""`prepare` loses its process, a worker or a node at any time and produces the
same bytes; known problems of Ray Data."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.data.format import open_dataset
from tests.prepared import content, job, many

PROJECT = Path(__file__).parents[2]
JOB = str(PROJECT / "jobs" / "prepare.py")
OPTIONS = ("--max-reject-fraction", "1", "--deduplicate", "exact", "--splits", "train=0.9", "test=0.1")

# Runs on a cluster of two nodes and kills a process as soon as three units are done.
LOSS = """
import glob, os, signal, sys, threading, time
import psutil, ray
from ray.cluster_utils import Cluster
from pipeline import cluster as joining
from pipeline.data.prepare import PrepareConfig, prepare
from jobs_config import CONFIG

what, source, output = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, logging_level="error", log_to_driver=False, runtime_env=joining.runtime_env(ship_project=False))

def take_away():
    while len(glob.glob(output + "/_work/unit-*")) < 3:
        time.sleep(0.02)
    if what == "node":
        cluster.remove_node(node, allow_graceful=False)
    else:
        workers = [p for p in psutil.Process().children(recursive=True) if "MapBatches" in " ".join(p.cmdline())]
        for worker in workers[:1]:
            os.kill(worker.pid, signal.SIGKILL)
        assert workers, "no worker to take away"
    print("took away a", what, flush=True)

threading.Thread(target=take_away, daemon=True).start()
manifests = prepare(PrepareConfig(source=(source,), output=output, **CONFIG))
print("rows", sum(manifest.rows for manifest in manifests.values()), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """4,051 inputs in 16 units, one of them broken, most of them duplicates; and the dataset of an uninterrupted
    run."""
    import cv2
    import numpy as np

    root = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(150):
            pixels = cv2.resize(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8), (360, 300))
            cv2.imwrite(str(root / "images" / name / f"{i:03d}.jpg"), pixels)
    source = many(root / "images", copies=8)
    result = job("--source", source, "--output", root / "whole", *OPTIONS)
    assert result.returncode == 0, result.stderr
    return source, content(root / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(corpus, tmp_path, seed):
    """SIGKILL to the whole process group, three times, anywhere between its start and its end."""
    source, whole = corpus
    generator, kills = random.Random(seed), 0
    command = [
        sys.executable,
        JOB,
        "--no-tracking",
        "--source",
        str(source),
        "--output",
        str(tmp_path / "torn"),
        *OPTIONS,
    ]
    while kills < 3:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        work = tmp_path / "torn" / "_work"
        before = len(list(work.glob("*"))) if work.exists() else 0
        wanted, deadline = before + generator.randrange(1, 10), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and len(list(work.glob("*"))) < wanted:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.3)
        if process.poll() is not None:  # it was faster
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills
    result = job(*command[3:])
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "torn") == whole
    print(f"seed {seed}: killed {kills} times, byte-identical")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["worker", "node"])
def test_a_worker_or_a_node_is_lost(corpus, tmp_path, what):
    source, whole = corpus
    config = {"max_reject_fraction": 1.0, "deduplicate": "exact", "splits": ("train=0.9", "test=0.1")}
    (tmp_path / "jobs_config.py").write_text(f"CONFIG = {config!r}\n")
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{tmp_path}"}
    command = [sys.executable, "-c", LOSS, what, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=tmp_path)
    assert f"took away a {what}" in result.stdout, result.stderr[-2000:]
    assert result.returncode == 0, result.stderr[-2000:]
    assert content(tmp_path / "out") == whole
    print(f"lost a {what}: byte-identical")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cpus", [1, 2])
def test_known_problems_of_ray_data_do_not_occur(corpus, tmp_path, cpus):
    """A second run appends nothing, files have the requested size independently of the block size, a bad image is a row
    of a table and does not end the job, and one or two CPUs are enough to continue a stopped one."""
    source, _ = corpus
    options = ("--num-cpus", cpus, "--shard-bytes", 1_000_000, "--row-group-bytes", 250_000)
    (source / "bee" / "text.jpg").write_text("no picture")
    for name, data in (("cut.jpg", (source / "bee" / "001.jpg").read_bytes()[:900]), ("nothing.jpg", b"")):
        (source / "bee" / name).write_bytes(data)
    command = ["--source", source, "--output", tmp_path / "out", "--splits", "train=0.9", "test=0.1", *options]
    process = subprocess.Popen([sys.executable, JOB, "--no-tracking", *map(str, command)], start_new_session=True)
    while process.poll() is None and len(list((tmp_path / "out" / "_work").glob("unit-*"))) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(2):  # complete, and once more
        result = job(*command)
        assert result.returncode == 0, result.stderr
    train, test = (open_dataset(tmp_path / "out" / split) for split in ("train", "test"))
    counted = [pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("*/part-*.parquet")]
    assert sum(counted) == len(train) + len(test)
    assert len(counted) == len(train.manifest.shards) + len(test.manifest.shards)
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "train").glob("part-*")]
    assert len(sizes) > 17  # more than one for a unit
    assert max(sizes) < 1_350_000
    reasons = {**train.manifest.rejects, **test.manifest.rejects}
    assert set(reasons) == {"truncated", "not an image", "empty"}
    assert train.manifest.inputs + test.manifest.inputs == 4_054
    for name in ("text.jpg", "cut.jpg", "nothing.jpg"):
        (source / "bee" / name).unlink()
