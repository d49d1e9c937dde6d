"""Executor that runs stages as processes on this machine. They survive the runner; a new runner finds them by files:

<folder>/<attempt>/lock        locked while the process lives, so that no attempt is started twice
<folder>/<attempt>/pid         its process group
<folder>/<attempt>/code        its exit code, written last
<folder>/<attempt>/spent.json  resources used so far
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import psutil

from pipeline import storage
from pipeline.cluster import PROJECT
from pipeline.errors import UserError
from pipeline.graph.executor import Attempt, Ended, last_error

# The shell ignores signals, waits for the job and writes its exit code, which a later runner reads.
_WAIT = 'trap : TERM INT HUP; "$@"; code=$?; echo $code > "$STAGE_FOLDER/code.tmp"; mv "$STAGE_FOLDER/code.tmp" "$STAGE_FOLDER/code"'
SAMPLE = 1.0
"""Seconds between two measurements of the CPU time of the processes."""


class Processes:
    """Executor on this machine."""

    pause = 0.1

    def __init__(self, folder: str) -> None:
        """folder: local folder for the files of the attempts; it is created."""
        self.folder = folder
        self.cpus: float = float(len(os.sched_getaffinity(0)))
        self.gpus = float(_gpus())
        self._meters: dict[str, _Meter] = {}
        self._children: dict[str, subprocess.Popen] = {}

    def start(self, attempt: Attempt) -> None:
        """Starts an attempt in its own session unless it is already running."""
        place = os.path.join(self.folder, attempt.job)
        os.makedirs(place, exist_ok=True)
        log = attempt.log if not storage.is_remote(attempt.log) else os.path.join(place, "log")
        os.makedirs(os.path.dirname(log), exist_ok=True)
        environment = {**os.environ, **attempt.environment, "STAGE_FOLDER": place}
        script = os.path.join(PROJECT, attempt.words[0])
        command = ["/bin/sh", "-c", _WAIT, "stage", sys.executable, script, *attempt.words[1:]]
        with storage.open_regular(os.path.join(place, "lock"), "a") as lock, storage.open_regular(log, "ab") as output:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            # The process inherits the open file and with it the lock, which is therefore held without a gap.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        with open(os.path.join(place, "pid"), "w") as file:
            file.write(str(process.pid))
        self._children[attempt.job] = process

    def look(self, job: str, log: str) -> Ended | None:
        """Returns the end of an attempt; None while its process lives."""
        place = os.path.join(self.folder, job)
        if job in self._children:
            self._children[job].poll()  # reaps the process
        if _held(os.path.join(place, "lock")):
            if job not in self._meters:
                self._meters[job] = _Meter(place)
            return None
        if meter := self._meters.pop(job, None):
            meter.close()
        self._children.pop(job, None)
        local = os.path.join(place, "log")
        if storage.is_remote(log) and os.path.exists(local):
            with contextlib.suppress(UserError, OSError):
                storage.copy_file(local, log)
        else:
            local = log
        return Ended(code=_code(place), reason=_tail_error(local), spent=_spent(place))

    def stop(self, job: str) -> None:
        """Sends SIGTERM to the processes of an attempt. The job finishes its step and saves it."""
        if not _held(os.path.join(self.folder, job, "lock")):
            return
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            with storage.open_regular(os.path.join(self.folder, job, "pid"), "r") as file:
                for process in psutil.Process(int(file.read())).children():
                    process.send_signal(signal.SIGTERM)

    def forget(self, job: str) -> None:
        """Removes the files of an attempt except its log."""
        shutil.rmtree(os.path.join(self.folder, job), ignore_errors=True)


def _held(lock: str) -> bool:
    """Whether some process holds a lock file."""
    try:
        with storage.open_regular(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _code(place: str) -> int | None:
    try:
        with storage.open_regular(os.path.join(place, "code")) as file:
            code = int(file.read())
    except (OSError, ValueError):
        return None
    return None if code == 128 + signal.SIGKILL else code


def _tail_error(log: str) -> str:
    try:
        with storage.open_regular(log) as file:
            file.seek(max(0, os.path.getsize(log) - 16_384))
            return last_error(file.read().decode(errors="replace"))
    except OSError:
        return ""


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])


# ---------------------------------------------------------------- CPU time


class _Meter:
    """Measures the CPU time of the processes of an attempt, including those of its Ray."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._seen: dict[tuple[int, float], float] = {}
        self._before = _spent(place)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(SAMPLE if self._seen else 0.05):
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                self._look()

    def _look(self) -> None:
        with open(os.path.join(self.place, "pid")) as file:
            root = psutil.Process(int(file.read()))
        for process in root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system

    def close(self) -> None:
        """Writes the CPU time used."""
        self._closing.set()
        self._thread.join(5)
        total = {"cpu_hours": sum(self._seen.values()) / 3600 + self._before.get("cpu_hours", 0.0)}
        with contextlib.suppress(OSError), open(os.path.join(self.place, "spent.json"), "w") as file:
            json.dump(total, file)


def _spent(place: str) -> dict[str, float]:
    try:
        with storage.open_regular(os.path.join(place, "spent.json")) as file:
            return {key: float(value) for key, value in json.load(file).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
