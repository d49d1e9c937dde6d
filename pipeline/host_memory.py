"""What Ray says when it ends a process because its node ran out of memory: a hundred lines, of which one is of use."""

import re

_NODE = re.compile(r"running low on memory.*?\(IP: ([^,)]+).*? was ([\d.]+)GB used / ([\d.]+)GB limit", re.DOTALL)
_PROCESS = re.compile(r"pid=(\d+), actual memory used=([\d.]+)GB")


def describe(message: str) -> str | None:
    """Which process was ended, where, and how much memory was in use, in one line; None for messages of other things."""
    if "running low on memory" not in message:
        return None
    node, process = _NODE.search(message), _PROCESS.search(message)
    who = f"process {process[1]} ({float(process[2]):.1f} GB) was ended" if process else "a process was ended"
    if not node:
        return f"{who}: its node ran out of host memory"
    return f"{who}: node {node[1]} ran out of host memory ({float(node[2]):.1f} of {float(node[3]):.1f} GB in use by all programs)"
