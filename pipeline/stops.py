"""SIGTERM and SIGHUP stop a job as Ctrl-C does: they raise an exception where the main thread is.

Two places lose the exception. While Ray waits in C++, it replaces the exit code by 1, so `exit_code` restores it. In
callbacks of the garbage collector, Python ignores exceptions, so the signal is sent again."""

import os
import signal
import sys
import threading
import time
import types
from typing import Any

ONE_STOP = 5.0
"""Seconds in which further signals belong to the first one."""
RESEND_AFTER = 0.1  # seconds until a signal whose exception was ignored is sent again

_received: list[tuple[int, float]] = []
"""(signal, time) of the stop."""


class Stop(SystemExit):
    """The job was stopped by a signal. The exit code is 128 + the signal."""


def handle_signals() -> None:
    """Makes SIGTERM and SIGHUP (unless nohup ignores it) raise Stop, so that `finally` blocks run as with Ctrl-C.

    One stop may send the signal twice: `timeout` signals the process and then its group, Slurm all processes of a job,
    whose batch script passes the signal on. Signals of the next seconds therefore count as the same stop."""
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def stop(signum: int, frame: types.FrameType | None) -> None:
        if _received and time.monotonic() < _received[-1][1] + ONE_STOP:
            return
        _received.append((signum, time.monotonic()))
        if signum == signal.SIGHUP:
            for stream in terminals:  # the terminal is closed, so writing would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise Stop(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, stop)
    sys.unraisablehook = _send_again(sys.unraisablehook)


def exit_code(error: BaseException | None) -> int | str | None:
    """The exit code of a job that ends with this KeyboardInterrupt or SystemExit."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if _received:
        return 128 + _received[-1][0]
    return getattr(error, "code", None)


def _send_again(report: Any) -> Any:
    """A hook for ignored exceptions that sends the signal again, and reports other exceptions with `report`."""

    def hook(ignored: Any) -> None:
        if isinstance(ignored.exc_value, Stop) and _received:
            signum, _ = _received.pop()
        elif isinstance(ignored.exc_value, KeyboardInterrupt):
            signum = signal.SIGINT
        else:
            report(ignored)
            return
        threading.Timer(RESEND_AFTER, os.kill, (os.getpid(), signum)).start()

    return hook
