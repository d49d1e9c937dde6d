#!/usr/bin/env python3
"""Copies the Ray logs of this node to storage, so that they outlive the node and the cluster.

    python infra/ship_logs.py --to s3://bucket/vit/logs           next to `ray start`: until SIGTERM, then one more round
    python infra/ship_logs.py --to s3://bucket/vit/logs --once    one round

Changed files are copied to TO/SESSION/NODE/NAME. The output of jobs is in job-driver-ID.log of the head, that of
workers in worker-*.out and worker-*.err. Only the last --most MB of a file are copied. If storage is unavailable, the
next round retries; Ray is not affected."""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import storage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, help="folder or s3:// address")
    parser.add_argument("--session", default="/tmp/ray/session_latest", help="folder of Ray's session")
    parser.add_argument("--node", default=socket.gethostname(), help="name of this node below TO")
    parser.add_argument("--every", type=float, default=60, help="seconds between rounds")
    parser.add_argument("--most", type=float, default=64, help="maximum MB per file, from its end")
    parser.add_argument("--once", action="store_true", help="one round, then exit")
    options = parser.parse_args()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    shipped: dict[str, tuple[int, int]] = {}
    failed = ship(options, shipped)
    while not options.once and not stopped.is_set():
        stopped.wait(options.every)
        failed = ship(options, shipped)
    return 1 if failed else 0


def ship(options: argparse.Namespace, shipped: dict[str, tuple[int, int]]) -> int:
    """Copies the files that changed since the last round. Returns the number of failures."""
    session = Path(options.session).resolve()  # session_latest is a link; each session has a folder in TO
    failed = 0
    for file in sorted((session / "logs").rglob("*")):
        try:
            if not file.is_file() or file.is_symlink():
                continue
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if state[0] == 0 or shipped.get(str(file)) == state:
                continue
            target = storage.join(options.to, session.name, options.node, str(file.relative_to(session / "logs")))
            storage.write_bytes(target, end_of(file, int(options.most * 1e6)))
            shipped[str(file)] = state
        except Exception as error:
            failed += 1
            print(f"ship_logs: {file.name}: {error}", file=sys.stderr, flush=True)
    return failed


def end_of(file: Path, most: int) -> bytes:
    """The last `most` bytes of a file, starting at a line."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - most))
        if size > most:
            stream.readline()
        return stream.read()


if __name__ == "__main__":
    sys.exit(main())
