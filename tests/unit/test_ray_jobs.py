"""Stages as Ray jobs, with a job server that is away, restarts, or refuses. The client is Ray's."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from pipeline.errors import TRY_LATER, Unavailable, UserError
from pipeline.graph import rayjobs
from pipeline.graph.executor import Attempt, Ended
from tests.ports import free_port


class JobServer(http.server.ThreadingHTTPServer):
    """Answers like Ray's job server. `fault`: (status, text) of every answer instead; `refusal`: of submissions."""

    daemon_threads = True

    def __init__(self, port):
        super().__init__(("127.0.0.1", port), Answer)
        self.fault = self.refusal = None
        self.jobs = {}


class Answer(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, value = self.server.fault or self.choose(body)
        text = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def choose(self, body):
        jobs, name = self.server.jobs, self.path.rpartition("/")[2]
        if self.path.startswith("/api/version"):
            return 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
        if self.path.startswith("/api/packages"):
            return 200, {}
        if self.command == "GET":
            found = list(jobs.values()) if name == "" else jobs.get(name)
            return (200, found) if found is not None else (404, f"Job {name} does not exist")
        if self.server.refusal:
            return self.server.refusal
        job = json.loads(body)["submission_id"]
        jobs[job] = {"type": "SUBMISSION", "submission_id": job, "status": "RUNNING", "entrypoint": "python"}
        return 200, {"job_id": job, "submission_id": job}

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(port):
    with JobServer(port) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "restored after the test")
    return f"http://127.0.0.1:{free_port()}"


def port(address):
    return int(address.rpartition(":")[2])


def attempt(job="p-data-1"):
    return Attempt(job=job, title="p/data", words=["jobs/prepare.py"], environment={}, log="unused", memory=0.1)


def test_a_server_that_stays_away_is_no_failure_of_the_pipeline(address, monkeypatch, tmp_path):
    with serving(port(address)):
        executor = rayjobs.RayJobs(address)
        executor.start(attempt())
        assert executor.look("p-data-1", str(tmp_path / "log")) is None
    monkeypatch.setattr(rayjobs, "PATIENCE", 0.3)
    assert executor.look("p-data-1", str(tmp_path / "log")) is None
    time.sleep(0.3)
    with pytest.raises(Unavailable, match=r"has not answered .* continues when it is back") as away:
        executor.look("p-data-1", str(tmp_path / "log"))
    assert away.value.exit_code == TRY_LATER


@pytest.mark.parametrize(
    "fault",
    [
        *((status, "<html>Bad Gateway</html>") for status in (502, 503, 504)),
        (500, "No available agent to submit job, please try again later."),
    ],
)
def test_a_submission_without_an_answer_is_repeated_later(address, tmp_path, fault):
    with serving(port(address)) as server:
        executor = rayjobs.RayJobs(address)
        server.refusal = fault
        executor.start(attempt("lost"))
        ended = executor.look("lost", str(tmp_path / "log"))
        assert ended.code == TRY_LATER
        assert f"status code {fault[0]}" in ended.reason
        assert executor.look("lost", str(tmp_path / "log")) == Ended(
            code=None, reason="the cluster does not know the job; its head was restarted"
        )
        server.refusal = (400, "ValueError: runtime_env is invalid")
        with pytest.raises(UserError, match=r"the cluster does not accept the stage p/data: .*runtime_env is invalid"):
            executor.start(attempt("wrong"))


def test_a_submission_that_was_accepted_after_all_is_lost_with_its_head(address, tmp_path):
    with serving(port(address)) as server:
        executor = rayjobs.RayJobs(address)
        server.refusal = (502, "<html>Bad Gateway</html>")
        executor.start(attempt("late"))
        server.jobs["late"] = {"type": "SUBMISSION", "submission_id": "late", "status": "RUNNING", "entrypoint": "x"}
        assert executor.look("late", str(tmp_path / "log")) is None
        server.jobs.clear()
        ended = executor.look("late", str(tmp_path / "log"))
        assert ended == Ended(code=None, reason="the cluster does not know the job; its head was restarted")


def test_a_server_that_restarts_is_told_from_a_wrong_address(address):
    with serving(port(address)) as server:
        server.fault = (503, "no healthy upstream")
        with pytest.raises(Unavailable, match=r"no Ray job server at .*503"):
            rayjobs.RayJobs(address)
        server.fault = (404, "a web site")
        with pytest.raises(UserError, match=r"no Ray job server at .*404") as wrong:
            rayjobs.RayJobs(address)
        assert not isinstance(wrong.value, Unavailable)
    with pytest.raises(UserError, match="check the address") as nobody:
        rayjobs.RayJobs(address)
    assert not isinstance(nobody.value, Unavailable)
