"""A user who submits to a scheduler that starts Ray itself: the project, a .venv, a data set and a home folder.

The nodes of a job are Ray nodes of this machine. `ray` in the user's .venv gives them ports of their own, which nodes on
separate machines do not need."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from pipeline.data.format import write_dataset
from tests.ports import free_port
from tests.rayhead import MARK, kill_marked

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NODE_OPTIONS = "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats"
PROGRAMS = {
    "python": 'exec "$REAL/python" "$@"',
    "hostname": 'test "$*" = --ip-address && echo 127.0.0.1 10.0.0.7',
    # `ray stop` would end the Ray processes of other tests
    "ray": f"""[ "$1" != stop ] || exit 1
[ "$1" = start ] || exec "$REAL/ray" "$@"
echo "$@" >> "$CALLS"
[[ " $* " != *" --head "* ]] || set -- "$@" $HEAD_OPTIONS
exec "$REAL/ray" "$@" {NODE_OPTIONS}""",
}


@dataclass(frozen=True, kw_only=True)
class User:
    """The folder from which a user submits: the project, its .venv, a data set and a home folder."""

    folder: Path
    environment: dict[str, str]

    @property
    def calls(self) -> str:
        """The arguments of each `ray start`, in lines; further programs may add theirs."""
        return (self.folder / "calls").read_text()

    def processes(self) -> list[psutil.Process]:
        """The processes of all jobs of this user."""
        mark = self.environment[MARK]
        return [p for p in psutil.process_iter(["environ", "cmdline"]) if (p.info["environ"] or {}).get(MARK) == mark]

    def left(self) -> list[str]:
        """The command lines of the processes, as soon as there are none, or after a minute."""
        deadline = time.monotonic() + 60
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [" ".join(process.info["cmdline"] or []) for process in found]


@contextlib.contextmanager
def user(folder: Path, programs: Mapping[str, str] | None = None) -> Iterator[User]:
    """A user whose jobs write to `folder`/out. programs: {name: shell script}, further ones in the .venv."""
    for name in ("pipeline", "models", "jobs", "infra", "tests"):
        (folder / name).symlink_to(ROOT / name)
    place = folder / ".venv" / "bin"
    place.mkdir(parents=True)
    for name, body in (PROGRAMS | dict(programs or {})).items():
        (place / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (place / name).chmod(0o755)
    (folder / "home").mkdir()
    write_pictures(folder / "data")
    sessions = tempfile.mkdtemp(prefix="ray")  # the path of a socket has at most 107 characters
    mark = Path(sessions).name
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    head = f"--temp-dir={sessions} --dashboard-port={free_port()} --ray-client-server-port={free_port()}"
    environment |= {"HOME": str(folder / "home"), "HEAD_OPTIONS": head, "RAY_PORT": str(free_port()), MARK: mark}
    environment |= {"CALLS": str(folder / "calls"), "REAL": str(BIN), "RECIPE": "demo", "DATA": str(folder / "data")}
    environment |= {"OUTPUT": str(folder / "out"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{place}:{environment['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    try:
        yield User(folder=folder, environment=environment)
    finally:
        kill_marked(mark)
        shutil.rmtree(sessions, ignore_errors=True)


def write_pictures(folder: Path) -> None:
    generator = np.random.default_rng(0)
    image = {"height": 32, "width": 32, "patch_size": 8, "channels": 3}
    patches = ((f"{i:03d}", generator.integers(0, 256, (16, 192), np.uint8), i % 2, 32, 32) for i in range(64))
    write_dataset(str(folder), patches, classes=["a", "b"], encoding="patches", image=image)
