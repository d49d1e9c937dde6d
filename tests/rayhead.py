"""A Ray head with its job server and token authentication, as infra/ starts it, on ports of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from tests.ports import free_port

BIN = Path(sys.executable).parent
MARK = "VIT_TEST_NODE"
"""In the environment of all processes of one node: those of one machine share the session's folder."""


@contextlib.contextmanager
def ray_head(
    home: Path,
    token: str,
    port: int | None = None,
    keep: Collection[str] = (),
    more: Collection[str] = (),
    dashboard: int | None = None,
    mark: str = "head",
) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(address of the job server, environment without the token, environment with it); `home` is HOME in both.

    port: of Ray's control store, for who joins it by address. dashboard: of the job server. keep: RAY_ variables of this
    process that the head gets, too. more: options of `ray start`, the last of a name counts.
    mark: for `kill_marked`.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    port, dashboard = port or free_port(), dashboard or free_port()
    environment = {name: value for name, value in os.environ.items() if name in keep or not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with_token = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1", f"--temp-dir={folder}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={free_port()}", *more]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(command, env=with_token | {MARK: mark}, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait(address, process, folder / "head.log")
        yield address, environment, with_token
    finally:
        process.terminate()
        process.wait(120)
        _kill(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(port: int, environment: dict[str, str], mark: str, more: Collection[str] = ()) -> Iterator[None]:
    """Another node of the cluster whose control store listens at `port`.

    environment: with the token. mark: for `kill_marked`. more: options of `ray start`.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    command = [BIN / "ray", "start", f"--address=127.0.0.1:{port}", "--block", "--disable-usage-stats", *more]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    with open(folder / "node.log", "w") as log:
        process = subprocess.Popen(command, env=environment | {MARK: mark}, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(120)
        kill_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def kill_marked(mark: str) -> None:
    """Kills a head or node with all that runs on it, at once: what a machine that is lost does."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(MARK) == mark:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _kill(folder: Path) -> None:
    """Ends at once whatever has the folder of a head in its command line."""
    for left in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(left.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                left.kill()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    """Until the job server asks for the token."""
    deadline = time.time() + 180
    while time.time() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=2).close()
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
        except OSError:
            pass
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(f"the Ray head does not answer: {log.read_text()}")
