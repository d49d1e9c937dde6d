"""Only one launch can use a run folder at a time, whatever the machine."""

import contextlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import psutil
import pytest

from pipeline import lease, storage, workqueue
from pipeline.data.prepare.change import lock_output
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.prepare.run import prepare
from pipeline.errors import InUse, UserError
from pipeline.lease import Lease
from tests.images import picture


def written(path, **changes):
    holder = {**Lease(str(path), "first").mine, "renewed": time.time(), **changes}
    storage.write_json(str(path / lease.LAUNCH), holder)


def test_second_launch_is_refused_by_the_name_of_the_first(tmp_path):
    with Lease(str(tmp_path), "b16"):
        with pytest.raises(UserError, match=r"is being trained in by b16, process \d+ on .*; stop that one first"):
            Lease(str(tmp_path), "other").__enter__()
    assert not (tmp_path / lease.LAUNCH).exists()
    with Lease(str(tmp_path), "other"):
        assert json.loads((tmp_path / lease.LAUNCH).read_text())["name"] == "other"


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"started": 1.0}, {"machine": "another", "renewed": 1.0}, {"pid": "many"}, {"id": None}],
    ids=["process gone", "number used again", "not renewed for long", "no number", "no id"],
)
def test_a_launch_that_ended_holds_no_lock(tmp_path, changes):
    written(tmp_path, **changes)
    with Lease(str(tmp_path), "next"):
        pass


@pytest.mark.parametrize("renews", [True, False])
def test_a_process_of_another_user_that_may_not_be_examined_is_alive_while_it_renews(tmp_path, monkeypatch, renews):
    class Hidden(psutil.Process):
        def status(self):
            raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(lease, "RENEW_EVERY", 0.2)
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    other = Lease(str(tmp_path), "first")
    with other if renews else contextlib.nullcontext():
        written(tmp_path, id=other.mine["id"])
        monkeypatch.setattr(psutil, "Process", Hidden)
        assert lease.current_holder(str(tmp_path))["name"] == "first"
        with pytest.raises(InUse, match="by first") if renews else contextlib.nullcontext():
            with Lease(str(tmp_path), "next"):
                pass


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"'])
def test_launch_json_of_any_content_is_replaced(tmp_path, text):
    (tmp_path / lease.LAUNCH).write_text(text)
    with Lease(str(tmp_path), "next"):
        assert json.loads((tmp_path / lease.LAUNCH).read_text())["name"] == "next"


@pytest.mark.parametrize("renews", [True, False])
def test_launch_on_another_machine_is_alive_while_it_renews(tmp_path, monkeypatch, renews):
    monkeypatch.setattr(lease, "RENEW_EVERY", 0.2)
    written(tmp_path, host="elsewhere", machine="another")
    looks = lease.time.sleep

    def sleep(seconds):
        looks(seconds)
        if renews:
            written(tmp_path, host="elsewhere", machine="another", renewed=time.time() + 1)

    monkeypatch.setattr(lease.time, "sleep", sleep)
    if renews:
        with pytest.raises(UserError, match="on elsewhere"):
            Lease(str(tmp_path), "next").__enter__()
    else:
        with Lease(str(tmp_path), "next"):
            pass


def test_a_container_with_the_same_host_name_is_another_machine(tmp_path):
    """Its process ids mean nothing here: number 4194305 is no process of ours and may be one there."""
    written(tmp_path, machine="the same boot pid:[4026531999]", pid=2**22 + 1)
    assert lease.current_holder(str(tmp_path))["name"] == "first"
    written(tmp_path, pid=2**22 + 1)
    assert lease.current_holder(str(tmp_path)) is None


def test_a_lock_that_somebody_removes_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_EVERY", 0.05)
    with Lease(str(tmp_path), "first"):
        (tmp_path / lease.LAUNCH).unlink()
        until = time.monotonic() + 60
        while not (tmp_path / lease.LAUNCH).exists() and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(InUse, match="by first"):
            Lease(str(tmp_path), "second").__enter__()


def test_of_many_concurrent_launches_one_remains(tmp_path):
    def enter(number):
        try:
            return Lease(str(tmp_path), f"launch {number}").__enter__()
        except InUse:
            return None

    with ThreadPoolExecutor(8) as pool:
        entered = [holder for holder in pool.map(enter, range(8)) if holder]
    assert len(entered) == 1
    entered[0].__exit__()


def test_of_two_launches_after_a_dead_one_the_last_writer_remains(tmp_path, monkeypatch):
    written(tmp_path, started=1.0)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: written(tmp_path))
    with pytest.raises(UserError, match="by first"):
        Lease(str(tmp_path), "second").__enter__()


def test_a_killed_process_that_nobody_waited_for_holds_no_lock(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = psutil.Process(process.pid).create_time()
    written(tmp_path, pid=process.pid, started=started)
    with pytest.raises(InUse):
        Lease(str(tmp_path), "second").__enter__()
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with Lease(str(tmp_path), "second"):
        pass
    process.wait()


def test_a_second_preparation_of_one_output_is_refused_by_name(tmp_path):
    (tmp_path / "photos" / "red").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "photos" / "red" / "1.png"), picture())
    config = PrepareConfig(source=(str(tmp_path / "photos"),), output=str(tmp_path / "out"), size=16)
    with workqueue.without_ray():
        with lock_output(str(tmp_path / "out" / "_work")):
            with pytest.raises(InUse, match=r"is being written by prepare, process \d+ on .*; repeat the command"):
                prepare(config)
        assert prepare(config)[""].rows == 1
    assert not (tmp_path / "out" / "_work").exists()
