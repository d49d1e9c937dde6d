"""Locks that a killed compiler of torch extensions left behind: whoever finds one waits for it for ever."""

import contextlib
import glob
import os


def clear_stale_locks(folder: str | None = None) -> list[str]:
    """Removes the locks of compiled extensions whose builder has been killed; returns their paths.

    torch builds an extension behind a file that it keeps open and removes at the end; whoever finds the file waits. A live
    builder has the file open, so a lock that no process of this machine holds belongs to nobody. folder: where extensions
    are built, by default torch's own.
    """
    if folder is None:
        from torch.utils.cpp_extension import get_default_build_root

        folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    # torch puts a folder per Python and device between its default root and the extensions, and none under a chosen one
    found = [
        os.path.realpath(path) for depth in ("*", "*/*") for path in glob.glob(os.path.join(folder, depth, "lock"))
    ]
    made = {path: _made(path) for path in found}
    if not made or not os.path.isdir("/proc/self/fd"):
        return []
    held = set()
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process ended meanwhile, or is another user's
            held.add(os.readlink(descriptor))
    stale = sorted(path for path in made.keys() - held if _made(path) == made[path])  # not one made meanwhile
    for path in stale:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    return stale


def _made(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except FileNotFoundError:
        return 0
