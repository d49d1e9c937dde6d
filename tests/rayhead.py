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
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import psutil

from tests.ports import free_port

BIN = Path(sys.executable).parent
STARTS = 8
"""A node ends when its agent does not start in 15 s, which it may not on a busy machine; then it is started again."""
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
    mark: str | None = None,
) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(address of the job server, environment without the token, environment with it); `home` is HOME in both.

    port: that of Ray's control store, for nodes that join by address. dashboard: port of the job server. keep: RAY_
    variables of this
    process that the head gets, too. more: options of `ray start`, the last of a name counts.
    mark: for `kill_marked`.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    mark = mark or folder.name
    port, dashboard = port or free_port(), dashboard or free_port()
    environment = {name: value for name, value in os.environ.items() if name in keep or not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with_token = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1", f"--temp-dir={folder}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={free_port()}", *more]
    address = f"http://127.0.0.1:{dashboard}"
    process = None
    try:
        process = _start(command, with_token | {MARK: mark}, folder / "head.log", lambda: _asks_for_a_token(address))
        yield address, environment, with_token
    finally:
        _end(process, mark)
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
    process = None
    try:
        process = _start(command, environment | {MARK: mark}, folder / "node.log")
        yield
    finally:
        _end(process, mark)
        shutil.rmtree(folder, ignore_errors=True)


def kill_marked(mark: str) -> None:
    """Kills a head or node with all its processes, like the loss of a machine. Returns when all have ended."""
    while found := [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(MARK) == mark]:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _kill(folder: Path) -> None:
    """Kills all processes with the folder of a head in their command line."""
    for left in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(left.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                left.kill()


def _start(
    command: Sequence[str | Path], environment: dict[str, str], log: Path, ready: Callable[[], bool] = lambda: True
) -> subprocess.Popen:
    """The process of `ray start`, after its node has started and `ready` returns True."""
    mark = environment[MARK]
    for _ in range(STARTS):
        with open(log, "a") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        deadline = time.time() + 180
        while process.poll() is None and time.time() < deadline:
            if _is_up(mark) and ready():
                return process
            time.sleep(0.5)
        _end(process, mark)
    raise AssertionError(f"the Ray node does not start: {log.read_text()}")


def _end(process: subprocess.Popen | None, mark: str) -> None:
    if process is not None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        kill_marked(mark)
        process.wait(60)


def _is_up(mark: str) -> bool:
    """Whether the node with this mark has an agent, which starts last."""
    for process in psutil.process_iter(["name", "cmdline", "environ"]):
        if process.info["name"] == "raylet" and (process.info["environ"] or {}).get(MARK) == mark:
            options = dict(
                word.split("=", 1) for word in process.info["cmdline"] if word.startswith("--") and "=" in word
            )
            return (Path(options["--session_dir"]) / f"metrics_agent_port_{options['--node_id']}").exists()
    return False


def _asks_for_a_token(address: str) -> bool:
    """Whether the job server answers."""
    try:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        pass
    return False
