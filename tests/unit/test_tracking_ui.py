"""`python -m pipeline.tracking ui`: a second start, and a port in use."""

import http.server
import socket
import threading
import time

import pytest
import uvicorn

from pipeline.errors import UserError
from pipeline.tracking.ui import serve, with_pages


async def blank(scope, receive, send):
    """Stands for MLflow's application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"<head></head>"})


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def running(tmp_path, port):
    """The UI of the database mlflow.db, on a port."""
    app = with_pages(blank, f"sqlite:///{tmp_path}/mlflow.db")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield port
    server.should_exit = True
    thread.join()


def test_a_second_start_says_where_the_ui_is_running(running, tmp_path, capsys):
    serve(port=running, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert f"already running. MLflow: http://127.0.0.1:{running} " in capsys.readouterr().out
    with pytest.raises(
        UserError, match=rf"port {running} is in use by the UI of another database.*--port {running + 1}"
    ):
        serve(port=running, tracking_uri=f"sqlite:///{tmp_path}/other.db")


def test_a_port_of_another_program(port, tmp_path):
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", port), Quiet) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=f"port {port} is in use by another program"):
            serve(port=port, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        other.shutdown()
    with pytest.raises(UserError, match="cannot listen there"):
        serve(host="203.0.113.1", port=port, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
