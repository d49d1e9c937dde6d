"""An attempt is suspended between the ownership check and its write, and continues after another attempt has committed.
The process is stopped (SIGSTOP), or its request hangs in the store."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from models import create_model
from pipeline import storage
from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.weights import checkpoints
from pipeline.weights.checkpoints import damage
from tests.faultproxy import FaultProxy

ROOT = Path(__file__).parents[2]
ATTEMPT = """
    import os, signal, sys
    import torch
    from models import create_model
    from pipeline.training import checkpoint
    from pipeline.weights import checkpoints

    run, event, name, before = sys.argv[1:]
    writer = checkpoint.Writer(run, create_model("mu/8", num_classes=3, image_size=16, depth=1), keep_last=2)
    tensors = {f"param:{name}:0": torch.ones(shape.numel()) for name, shape in writer.shapes.items()}
    writer.start()
    if before:
        writer.save(2, lambda: tensors, {"metrics": {}})
        writer.wait()

    stopped = []

    def stop(what, arguments):
        if what == event and name in str(arguments[0]) and not stopped:
            stopped.append(what)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(stop)
    writer.save(4, lambda: tensors, {"metrics": {}})
    try:
        writer.wait()
    except Exception as error:
        print(error)
"""


def attempt(run: str, value: float, *steps: int) -> checkpoints.Checkpoint:
    """Another start of the run, which writes these steps; its last checkpoint."""
    writer = checkpoint.Writer(run, create_model("mu/8", num_classes=3, image_size=16, depth=1), keep_last=2)
    tensors = {f"param:{name}:0": torch.full((shape.numel(),), value) for name, shape in writer.shapes.items()}
    writer.start()
    for step in steps:
        writer.save(step, lambda: tensors, {"metrics": {}})
    writer.wait()
    writer.close()
    return checkpoints.latest(run)


def content(found: checkpoints.Checkpoint) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(file.uri) for file in storage.list_files(found.uri)}


@pytest.mark.parametrize("before", ["", "a checkpoint"], ids=["first of the run", "later"])
@pytest.mark.parametrize(
    ("event", "name"),
    [("os.mkdir", "step-00000004"), ("open", "config.json"), ("open", "COMMIT.json."), ("os.rename", "COMMIT.json.")],
    ids=["before the state", "before the configuration", "before the commit", "in the commit"],
)
def test_suspended_attempt_wakes_up_after_another_has_committed(tmp_path, event, name, before):
    run = str(tmp_path / "run")
    command = [sys.executable, "-c", textwrap.dedent(ATTEMPT), run, event, name, before]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "ended before it got there"
        theirs = attempt(run, 7.0, 4, 6, 8)
        before_it_woke = content(theirs)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert content(theirs) == before_it_woke
    assert damage(theirs) is None
    assert checkpoints.latest(run).uri == theirs.uri
    assert [found.step for found in checkpoints.find(run) if damage(found) is None][-2:] == [6, 8]


@pytest.mark.parametrize("name", ["state/param", "model.safetensors", "COMMIT.json"])
def test_upload_that_hangs_until_another_attempt_has_committed(s3, s3_server, monkeypatch, name):
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        hangs, go_on = threading.Event(), threading.Event()

        def fault(method: str, path: str, n: int) -> None:
            if method in ("PUT", "POST") and name in path and not hangs.is_set():
                hangs.set()
                go_on.wait(120)

        proxy.fault = fault
        run = f"{s3}/run"

        def superseded() -> None:
            with contextlib.suppress(UserError, OSError):
                attempt(run, 1.0, 4, 6)

        first = threading.Thread(target=superseded)
        first.start()
        assert hangs.wait(120)
        proxy.fault = lambda method, path, n: None
        theirs = attempt(run, 7.0, 4, 6, 8)
        before_it_woke = content(theirs)
        go_on.set()
        first.join(120)
        assert content(theirs) == before_it_woke
        assert checkpoints.latest(run).uri == theirs.uri
