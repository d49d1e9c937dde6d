"""The origin of a run: user, commit, uncommitted changes, devices and installed packages."""

import contextlib
import functools
import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

from pipeline.tracking import names

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def user() -> str:
    """The name of the user, or the user id if there is no name (in a container)."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", PROJECT, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


@functools.cache
def code_diff() -> str:
    """The uncommitted changes of the project, at most 1 MiB; empty if there are none."""
    return _git("diff", "HEAD")[: 1 << 20]


@functools.cache
def code_tags() -> dict[str, str]:
    """Tags with the commit, from git or (in a copy without .git) from GIT_COMMIT."""
    commit = _git("rev-parse", "HEAD").strip() or os.environ.get("GIT_COMMIT", "")
    if not commit:
        return {}
    return {names.COMMIT: commit, names.SOURCE_COMMIT: commit, names.DIRTY: str(bool(code_diff())).lower()}


@functools.cache
def machine() -> dict[str, Any]:
    """Host, devices and every installed package, as the artifact environment.json."""
    gpus = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": gpus.strip().splitlines(),
        "packages": dict(sorted(packages.items(), key=lambda item: (item[0] or "").lower())),
    }
