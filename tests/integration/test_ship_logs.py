"""infra/ship_logs.py: logs of a node are copied to storage while it runs, and when it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline import storage

SCRIPT = Path(__file__).parents[2] / "infra" / "ship_logs.py"


def node(folder: Path) -> Path:
    """Creates Ray's folders of a node; returns the folder of its logs."""
    logs = folder / "session_2026-01-01" / "logs"
    (logs / "old").mkdir(parents=True)
    (folder / "session_latest").symlink_to(logs.parent)
    (logs / "job-driver-1.log").write_text("started\n")
    (logs / "empty.err").write_text("")
    (logs / "old" / "gcs.out").write_text("".join(f"line {i}\n" for i in range(1000)))
    (logs / "link.log").symlink_to("/etc/passwd")
    return logs


def command(folder: Path, to: str, *arguments: str) -> list[str]:
    session = f"--session={folder}/session_latest"
    return [sys.executable, str(SCRIPT), f"--to={to}", session, "--node=10.0.0.7", *arguments]


def shipped(to: str) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(storage.join(to, file.path)) for file in storage.list_files(to)}


def test_logs_of_a_dead_head_can_be_read(tmp_path, s3):
    logs, to = node(tmp_path), f"{s3}/logs"
    process = subprocess.Popen(command(tmp_path, to, "--every=0.2"))
    try:
        wait_for(lambda: len(shipped(to)) == 2)
        with open(logs / "job-driver-1.log", "a") as log:
            log.write("step 10\n")
        wait_for(lambda: b"step 10" in shipped(to)["session_2026-01-01/10.0.0.7/job-driver-1.log"])
        process.send_signal(signal.SIGSTOP)
        (logs / "last.log").write_text("the head ends\n")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert shipped(to)["session_2026-01-01/10.0.0.7/last.log"] == b"the head ends\n"
    assert not any("link" in name or "empty" in name for name in shipped(to))


def test_long_logs_keep_their_end(tmp_path):
    node(tmp_path)
    done = subprocess.run(command(tmp_path, str(tmp_path / "to"), "--once", "--most=0.0001"))
    assert done.returncode == 0
    kept = shipped(str(tmp_path / "to"))["session_2026-01-01/10.0.0.7/old/gcs.out"].decode()
    assert kept.endswith("line 999\n")
    assert kept.startswith("line ")
    assert len(kept) <= 100


def test_storage_that_cannot_be_written_is_reported(tmp_path):
    node(tmp_path)
    (tmp_path / "file").write_text("")
    done = subprocess.run(command(tmp_path, str(tmp_path / "file"), "--once"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "ship_logs: job-driver-1.log: " in done.stderr


def wait_for(condition) -> None:
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline
        time.sleep(0.1)
