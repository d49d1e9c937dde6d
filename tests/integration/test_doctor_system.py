"""The doctor's checks of the operating system and of the upload, on valid and invalid files and servers."""

import email.utils
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.hardware import MINIMUM_DRIVER
from pipeline.operations.doctor import system, upload
from tests.rayhead import ray_head

ROOT = Path(__file__).parents[2]
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\nGCC version: gcc 12.2.0\n"


@pytest.mark.parametrize(
    ("version", "cuda", "status", "message"),
    [
        ("580.65.06", "13.0", "ok", "580, supports CUDA 13.0"),
        ("550.163.01", "13.0", "error", "driver 550 is older than 580, which PyTorch's CUDA 13.0 needs"),
        ("550.163.01", "12.8", "ok", "supports"),
    ],
)
def test_the_driver_fits_pytorchs_cuda(tmp_path, version, cuda, status, message):
    file = tmp_path / "version"
    file.write_text(DRIVER.format(version))
    found = system.driver(True, str(file), cuda)
    assert (found.status, message in found.message) == (status, True), found


def test_no_driver_and_no_version(tmp_path):
    assert system.driver(False, str(tmp_path / "none")).status == "ok"
    (tmp_path / "version").write_text("something else\n")
    assert system.driver(True, str(tmp_path / "version"), "13.0").status == "warning"


def test_the_driver_in_infra_and_documents_is_the_required_one():
    """torch 2.13 includes CUDA 13. The driver version is in pipeline/hardware.py, infra and the documents."""
    need = str(MINIMUM_DRIVER[13])
    assert f"driver {need} or later" in " ".join((ROOT / "docs" / "clusters.md").read_text().split())
    assert f"nvidia-{need}" in (ROOT / "infra" / "ray-up" / "gcp.yaml").read_text()
    assert f"driver {need} or later" in (ROOT / "infra" / "ray-up" / "aws.yaml").read_text()


class Clock(BaseHTTPRequestHandler):
    """A server whose clock is `server.off` seconds behind ours, and that answers 404 to everything."""

    def do_HEAD(self):
        self.send_response_only(404)
        self.send_header("Date", email.utils.formatdate(time.time() - self.server.off, usegmt=True))
        self.end_headers()


@pytest.mark.parametrize(
    ("off", "status", "message"),
    [(0, "ok", "agrees"), (120, "warning", "s ahead of"), (-1200, "error", "s behind")],
)
def test_the_clock(off, status, message):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Clock)
    server.off, server.daemon_threads = off, True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        found = system.clock(f"http://127.0.0.1:{server.server_port}/minio")
    finally:
        server.shutdown()
        server.server_close()
    assert (found.status, message in found.message) == (status, True), found


def test_an_unreachable_clock_is_not_a_fault():
    assert system.clock("sqlite:///mlflow.db").status == "ok"
    assert system.clock("http://127.0.0.1:9/").status == "ok"


def test_open_files():
    assert system.limits(wanted=16).status == "ok"
    assert system.limits(is_node=True, wanted=16).status == "ok"
    found = system.limits(wanted=1 << 40)
    assert found.check == "open files"
    assert found.status == "warning"


def test_rdma_devices(tmp_path):
    assert "TCP" in system.network(True, str(tmp_path / "none")).message
    for i in range(6):
        (tmp_path / f"efa_{i}").mkdir()
    found = system.network(False, str(tmp_path))
    assert "6 RDMA devices: efa_0, efa_1, efa_2, efa_3 ..." in found.message


def test_a_large_working_folder_is_named(tmp_path):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    (tmp_path / "data" / "photos" / "all.tar").write_bytes(b"x" * 900)
    (tmp_path / "code.py").write_bytes(b"x" * 50)
    assert upload.working_folder(str(tmp_path), 10_000).status == "ok"
    assert upload.working_folder(str(tmp_path), 1_500).status == "warning"
    found = upload.working_folder(str(tmp_path), 900)
    assert found.status == "error"
    assert "data/photos/ 0 MB" in found.message
    (tmp_path / ".rayignore").write_text("data\n")
    assert upload.working_folder(str(tmp_path), 900).status == "ok"


def test_this_project_is_small_enough_to_submit():
    assert upload.working_folder().status == "ok"


@pytest.mark.slow
def test_ray_refuses_what_the_doctor_refuses(tmp_path):
    """A folder above the limit, submitted to a real head: Ray's own answer names neither the limit nor the file."""
    import os

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "noise.bin").write_bytes(os.urandom(101 << 20))
    assert upload.working_folder(str(tmp_path / "package")).status == "error"
    with ray_head(tmp_path, "6b2d" * 16) as (address, _, with_token):
        words = ["ray", "job", "submit", f"--address={address}", f"--working-dir={tmp_path / 'package'}", "--", "true"]
        done = subprocess.run(words, env=with_token, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0, done.stdout


CODE = "from pipeline.operations.doctor import system; print(system.limits({}), system.limits(False).status)"


@pytest.mark.parametrize(("is_node", "status"), [(True, "warning"), (False, "ok")])
def test_a_low_soft_limit_matters_to_nodes_only(is_node, status):
    """`ulimit -S -n 1024` is the default of many systems; ray.init raises it, `ray start` does not."""
    command = f"ulimit -S -n 1024 && {sys.executable} -c '{CODE.format(is_node)}'"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert f"status='{status}'" in done.stdout, done.stdout + done.stderr
    assert ("soft limit" in done.stdout and "before `ray start`" in done.stdout) == is_node


def test_the_doctor_runs_inside_a_ray_job(tmp_path):
    with ray_head(tmp_path, "9f3a" * 16) as (address, _, with_token):
        words = ["ray", "job", "submit", f"--address={address}", f"--working-dir={ROOT}", "--"]
        words += ["python", "jobs/doctor.py", f"--output={tmp_path}/out", f"--data={tmp_path}/none", "--json"]
        done = subprocess.run(words, env=with_token, capture_output=True, text=True, timeout=280)
    assert '"check": "open files"' in done.stdout, done.stdout + done.stderr
    assert '"check": "clock"' in done.stdout
