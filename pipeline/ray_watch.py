"""Watches the processes of an embedded Ray: without them the job cannot go on, but Ray may let it wait forever, end it
without a message, or raise errors that do not name the cause.

If one of them ends, `RayEnded` is raised in the main thread, so that `finally` blocks run and MLflow gets the reason.
This happens only in jobs (`enable`): a notebook or a program that imports the project may end Ray by itself."""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Sequence

import psutil

REQUIRED = ("raylet", "gcs_server")
"""Names of the processes without which no task runs. Others, such as the dashboard, may end."""
INTERVAL = 1.0
"""Seconds between two checks of the processes."""
SIGNAL_TIMEOUT = 10.0
"""Seconds within which the main thread handles the signal; later, it hangs in Ray's C++ and this process is ended."""
EXIT_TIMEOUT = 120.0
"""Seconds after the exception within which the job ends by itself, for example to record the reason in MLflow."""

_enabled = threading.Event()
_required: list[tuple[str, psutil.Process]] = []
_released, _received = threading.Event(), threading.Event()


class RayEnded(SystemExit):
    """A process of the embedded Ray has ended. A SystemExit, because Ray's C++ ignores other exceptions while it waits."""

    code = 1


def enable() -> None:
    """Lets `watch` end this process. A job calls it at its start."""
    _enabled.set()


def watch(processes: Sequence[psutil.Process]) -> None:
    """Watches the required ones of the child processes `processes` until `release`, in jobs only. Outside the main thread no
    signal handler can be set, so then only `ended` looks at them."""
    if not _enabled.is_set():
        return
    _required.clear()
    _released.clear()
    _received.clear()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name() in REQUIRED:
                _required.append((process.name(), process))
    if _required and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, _on_signal)
        threading.Thread(target=_poll, name="ray-watch", daemon=True).start()


def release() -> None:
    """Ends the watch, because this process ends Ray or itself."""
    _released.set()


def ended() -> str | None:
    """What has ended and what to do, as one line; None while Ray runs, and after `release`."""
    gone = None if _released.is_set() else next((name for name, process in _required if _is_gone(process)), None)
    return gone and (
        f"Ray's process {gone} on this machine has ended (killed, or out of memory), and the job with it; its logs are in "
        "/tmp/ray/session_latest/logs; repeat the command to continue"
    )


def _on_signal(signum: int, frame: types.FrameType | None) -> None:
    _received.set()
    if text := ended():
        raise RayEnded(text)


def _poll() -> None:
    while not _released.wait(INTERVAL):
        if text := ended():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
            if not (_received.wait(SIGNAL_TIMEOUT) and _released.wait(EXIT_TIMEOUT)):
                os.write(2, f"error: {text}\n".encode())
                for child in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
                os._exit(1)
            return


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
