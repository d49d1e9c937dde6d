"""Parses Ray's message about a process that was ended because its node ran out of memory."""

import re

_NODE = re.compile(r"running low on memory.*?\(IP: ([^,)]+).*? was ([\d.]+)GB used / ([\d.]+)GB limit", re.DOTALL)
_PROCESS = re.compile(r"pid=(\d+), actual memory used=([\d.]+)GB")


def describe_out_of_memory(message: str) -> str | None:
    """One line with the process, the node and the memory in use; None for other messages."""
    if "running low on memory" not in message:
        return None
    node, process = _NODE.search(message), _PROCESS.search(message)
    who = f"process {process[1]} ({float(process[2]):.1f} GB) was ended" if process else "a process was ended"
    if not node:
        return f"{who}: its node ran out of host memory"
    return f"{who}: node {node[1]} ran out of host memory ({float(node[2]):.1f} of {float(node[3]):.1f} GB in use by all programs)"
