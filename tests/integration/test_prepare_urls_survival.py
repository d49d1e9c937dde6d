"""Downloads as a job on Ray: killed and continued, on several processes, with the counts of the result."""

import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest

from tests.prepared import JOB, content, job
from tests.webserver import web_server

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("only", [False, True])
def test_a_killed_download_continues_and_gives_the_same_bytes(tmp_path, only):
    with web_server() as server:
        rows = [f"{server.url}/image/{i}.jpg,{'ab'[i % 2]}" for i in range(1, 801)]
        rows += [f"{server.url}/status/404/{i},a" for i in range(5)] + [f"{server.url}/html/{i},b" for i in range(5)]
        (tmp_path / "list.csv").write_text("url,label\n" + "\n".join(rows) + "\n")
        flags = ["--source", str(tmp_path / "list.csv"), "--allow-private-hosts", "--num-cpus", "2", "--size", "32"]
        flags += ["--download-only"] if only else []
        whole = job(*flags, "--output", tmp_path / "whole", "--json")
        assert whole.returncode == 0, whole.stderr
        result = json.loads(whole.stdout)
        counts = result["rejects"] if only else result["dataset"]["rejects_by_reason"]
        assert counts == {"http 404": 5, "not an image": 5}

        slow = [*flags, "--output", str(tmp_path / "killed"), "--no-tracking"]
        process = subprocess.Popen([sys.executable, JOB, *slow, "--download.rate", "100"])
        work = tmp_path / "killed" / "_work"
        deadline = time.monotonic() + 1200
        while not list(work.glob("unit-*.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        for part in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        process.wait()
        done = list(work.glob("unit-*.json"))
        assert 0 < len(done) < 13
        server.hits.clear()
        again = job(*flags, "--output", tmp_path / "killed")
        assert again.returncode == 0, again.stderr
        assert sum(count for path, count in server.hits.items() if path.startswith("/image")) < 800
        assert content(tmp_path / "whole") == content(tmp_path / "killed")
