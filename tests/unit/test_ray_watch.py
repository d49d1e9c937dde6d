"""A job whose embedded Ray loses a process ends with one line, whatever its main thread does at that time."""

import itertools
import shutil
import subprocess
import sys

import pytest

from pipeline import ray_watch

JOB = """
import subprocess, sys, threading, time
import psutil
from pipeline import ray_watch
from pipeline.config import run_job

def main(argv):
    process = subprocess.Popen([argv[0], "100"])
    ray_watch.watch([psutil.Process(process.pid)])
    {before}
    process.kill()
    {work}

run_job(main)
"""
WORK = {
    "sleeps": "time.sleep(90)",
    "waits for a lock": "threading.Event().wait()",
    "computes": "while True: pass",
    "fails because of it": "process.wait(); raise ValueError('connection lost')",
    "ignores errors": """while True:
        try: time.sleep(90)
        except Exception: pass""",
}


def run(tmp_path, name, work, before="pass"):
    sleeper = shutil.copy(shutil.which("sleep"), tmp_path / name)
    code = JOB.replace("{work}", work).replace("{before}", before)
    return subprocess.run([sys.executable, "-c", code, sleeper], capture_output=True, text=True, timeout=80)


@pytest.mark.parametrize(("work", "name"), zip(WORK, itertools.cycle(ray_watch.REQUIRED)))
def test_a_job_without_its_ray_ends_with_one_line(tmp_path, work, name):
    done = run(tmp_path, name, WORK[work])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: Ray's process {name} on this machine has ended")
    assert line.endswith("repeat the command to continue")


def test_processes_that_no_task_needs_do_not_end_a_job(tmp_path):
    done = run(tmp_path, "dashboard", "time.sleep(2.5)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_ray_that_the_job_itself_ends_is_not_missed(tmp_path):
    done = run(tmp_path, "raylet", "time.sleep(2.5)", before="ray_watch.release()")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_imports_the_project_goes_on(tmp_path):
    """As a notebook that calls `ray.shutdown()`."""
    sleeper = shutil.copy(shutil.which("sleep"), tmp_path / "raylet")
    code = f"""if True:
        import subprocess, time, psutil
        from pipeline import ray_watch
        process = subprocess.Popen(["{sleeper}", "100"])
        ray_watch.watch([psutil.Process(process.pid)])
        process.kill()
        time.sleep(2.5)
        assert ray_watch.ended() is None"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=80)
    assert (done.returncode, done.stderr) == (0, "")


def test_mlflow_shows_the_run_of_such_a_job_as_failed(tmp_path):
    """The exception is a SystemExit, which otherwise means that a user has stopped the job."""
    work = """from pipeline.tracking.run import status_of
    try: time.sleep(90)
    except SystemExit as error: print(*status_of(error))"""
    done = run(tmp_path, "raylet", work)
    assert done.stdout.startswith("FAILED Ray's process raylet"), done.stderr
