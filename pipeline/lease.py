"""A lock on an output folder, so that a second launch is refused with an error that names the first.

    with Lease(output, "b16_imagenet"):
        ...

<output>/launch.json names the process that holds the lock and renews it while it runs. The lock of a killed process
becomes free: immediately on the same machine and in the same container, elsewhere after `2 * RENEW_EVERY` seconds
without renewal. In addition, `training.checkpoint.Writer` prevents a superseded attempt from committing checkpoints."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

import psutil

from pipeline import storage
from pipeline.errors import InUse, StorageError, UserError

LAUNCH = "launch.json"
LAST_TIME = 1e11  # seconds since 1970 (year 5138); larger values are invalid
RENEW_EVERY = 20.0
SETTLE = 0.5
"""Seconds between overwriting the file of a dead process and reading it again. Of two simultaneous launches the last
writer wins."""

logger = logging.getLogger(__name__)


class Lease:
    """Holds the lock of an output. Raises InUse if another process holds it."""

    def __init__(
        self,
        output: str,
        name: str,
        *,
        doing: str = "being trained in",
        remedy: str = "stop that one first, or choose another --output",
    ):
        """name: name of the work. doing, remedy: texts for the error of a second launch."""
        self.doing, self.remedy = doing, remedy
        self.output, self.uri = output, storage.join(output, LAUNCH)
        me = psutil.Process()
        self.mine: dict[str, Any] = {
            "id": uuid.uuid4().hex[:12],
            "name": name,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": me.pid,
            "started": me.create_time(),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        was_there = storage.exists(self.uri)
        holder = self._read()
        if holder is not None and _is_alive(holder, self.uri):
            raise self._refusal(holder)
        if was_there:  # the file of a dead process, or a damaged one: several processes may overwrite it
            self._write()
            time.sleep(SETTLE)
        else:
            storage.create_bytes(self.uri, self._text())  # the store lets only one process create it
        holder = self._read()
        if holder is not None and holder["id"] != self.mine["id"]:
            raise self._refusal(holder)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(5)
        with contextlib.suppress(UserError, OSError):  # if the store is unavailable, the lease expires
            holder = self._read()
            if holder is not None and holder["id"] == self.mine["id"]:
                storage.remove(self.uri)

    def _refusal(self, holder: dict[str, Any]) -> InUse:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["started"]))
        return InUse(
            f"{self.output} is {self.doing} by {holder['name']}, process {holder['pid']} on {holder['host']}, started "
            f"{since}; {self.remedy}"
        )

    def _text(self) -> bytes:
        return json.dumps({**self.mine, "renewed": time.time()}).encode()

    def _write(self) -> None:
        storage.write_bytes(self.uri, self._text())

    def _read(self) -> dict[str, Any] | None:
        return _read_holder(self.uri)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_EVERY):
            with contextlib.suppress(UserError, OSError):  # if the store is unavailable, the next renewal may succeed
                holder = self._read()
                if holder is not None and holder["id"] == self.mine["id"]:
                    self._write()
                elif holder is None and not storage.exists(self.uri):  # somebody has removed it
                    storage.create_bytes(self.uri, self._text())


def _read_holder(uri: str) -> dict[str, Any] | None:
    """The content of launch.json; None if it is missing or invalid (it is then overwritten)."""
    if not storage.exists(uri):
        return None
    try:
        holder = storage.read_json(uri)
    except StorageError:
        raise
    except (UserError, FileNotFoundError):
        return None
    else:
        types: dict[str, Any] = {
            "id": str,
            "name": str,
            "host": str,
            "machine": str,
            "pid": int,
            "started": (int, float),
            "renewed": (int, float),
        }
        times = ("started", "renewed")
        if (
            isinstance(holder, dict)
            and all(isinstance(holder.get(key), kind) for key, kind in types.items())
            and all(0 <= holder[key] < LAST_TIME for key in times)
        ):
            return holder
    return None


def _machine() -> str:
    """What the process ids of this process belong to: the boot of the kernel, and the namespace of process ids.

    Containers may share a host name with others and with their host (`--network host`, `localhost`). Where there is no
    /proc, the host name has to do."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_running_here(holder: dict[str, Any]) -> bool | None:
    """Whether a process of this machine and container is running; None for another one, and if this user may not
    look."""
    if holder["machine"] != _machine():
        return None
    try:
        process = psutil.Process(holder["pid"])
        is_same = abs(process.create_time() - holder["started"]) < 1
        return is_same and process.status() != psutil.STATUS_ZOMBIE  # in a container nobody may wait for the dead
    except psutil.AccessDenied:
        return None
    except (psutil.Error, OverflowError):
        return False


def _is_alive(holder: dict[str, Any], uri: str) -> bool:
    """Whether the process that wrote launch.json is still running."""
    is_here = _is_running_here(holder)
    if is_here is not None:
        return is_here
    if time.time() - holder["renewed"] > 30 * RENEW_EVERY:  # the clocks of two machines may differ by minutes
        return False
    logger.info(
        "%s on %s may still use this output; checking for %.0f s",
        holder["name"],
        holder["host"],
        2 * RENEW_EVERY,
    )
    until = time.monotonic() + 2 * RENEW_EVERY
    while time.monotonic() < until:
        time.sleep(min(1.0, RENEW_EVERY / 4))
        now = _read_holder(uri)
        if now is None:
            return False
        if (now["id"], now["renewed"]) != (holder["id"], holder["renewed"]):
            return True
    return False


def current_holder(output: str) -> dict[str, Any] | None:
    """The process that holds an output according to launch.json, without waiting:
    {"name", "host", "pid", "started", ...}; or None."""
    uri = storage.join(output, LAUNCH)
    holder = _read_holder(uri)
    if holder is None:
        return None
    is_here = _is_running_here(holder)
    if is_here is None:
        is_here = time.time() - holder["renewed"] < 6 * RENEW_EVERY
    return holder if is_here else None
