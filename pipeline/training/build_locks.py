"""Stale build locks of torch extensions. A build that finds one waits forever."""

import contextlib
import glob
import os


def clear_stale_locks(folder: str | None = None) -> list[str]:
    """Removes build locks of extensions whose build process was killed. Returns their paths.

    torch creates a lock file before it builds an extension, keeps it open, and removes it afterwards; other processes
    wait until it is gone. So a lock file that no process has open is stale. folder: build folder; None: torch's
    default."""
    if folder is None:
        from torch.utils.cpp_extension import get_default_build_root

        folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    # torch's default root contains one folder per Python version and device; a custom root does not.
    found = [
        os.path.realpath(path) for depth in ("*", "*/*") for path in glob.glob(os.path.join(folder, depth, "lock"))
    ]
    made = {path: _made(path) for path in found}
    if not made or not os.path.isdir("/proc/self/fd"):
        return []
    held = set()
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            held.add(os.readlink(descriptor))
    stale = sorted(path for path in made.keys() - held if _made(path) == made[path])  # not recreated in the meantime
    for path in stale:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    return stale


def _made(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except FileNotFoundError:
        return 0
