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


@contextlib.contextmanager
def ray_head(
    home: Path, token: str, port: int | None = None, keep: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(address of the job server, environment without the token, environment with it); `home` is HOME in both.

    port: of Ray's control store, for who joins it by address. keep: RAY_ variables of this process that the head gets, too.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    port, dashboard = port or free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if name in keep or not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with_token = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1", f"--temp-dir={folder}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={free_port()}"]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(command, env=with_token, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait(address, process, folder / "head.log")
        yield address, environment, with_token
    finally:
        process.terminate()
        process.wait(120)
        for left in psutil.process_iter(["cmdline"]):
            if str(folder) in " ".join(left.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    left.kill()
        shutil.rmtree(folder, ignore_errors=True)


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
