"""jobs/pipeline.py has the name of the package and is in the first folder of the search path of every job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))


def python(*words, cwd=ROOT, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("job", JOBS)
def test_every_job_finds_the_package(job):
    done = python(str(ROOT / "jobs" / job), "--help")
    assert done.returncode == 0, done.stderr
    assert "python jobs/" in done.stdout


@pytest.mark.parametrize("where", ["jobs", "."])
def test_from_any_folder_and_by_any_spelling_of_the_path(where):
    done = python(os.path.relpath(ROOT / "jobs/pipeline.py", ROOT / where), "status", "nowhere.yaml", cwd=ROOT / where)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere.yaml: no such pipeline file\n"


def test_through_a_link_to_the_folder(tmp_path):
    (tmp_path / "link").symlink_to(ROOT / "jobs")
    assert python(str(tmp_path / "link" / "pretrain.py"), "--list-recipes", cwd=tmp_path).returncode == 0


PACKAGE = "import pipeline, pipeline.config; assert pipeline.__path__ == [{!r}], pipeline; assert pipeline.__spec__.submodule_search_locations"


def test_whoever_has_the_folder_of_jobs_first_gets_the_package():
    """As in Ray's workers, whose path contains the folder of the driver's script."""
    first = f"import sys; sys.path.insert(0, {str(ROOT / 'jobs')!r}); "
    done = python("-c", first + PACKAGE.format(str(ROOT / "pipeline")))
    assert done.returncode == 0, done.stderr


def test_spawned_processes_and_threads(tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT / "jobs")!r})
import concurrent.futures, multiprocessing

def place(_):
    sys.path.insert(0, {str(ROOT / "jobs")!r})
    import pipeline.config
    return pipeline.__path__

if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(place, range(8)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        found += list(pool.map(place, range(2)))
    assert found == [[{str(ROOT / "pipeline")!r}]] * 10, found
"""
    )
    done = python(str(script))
    assert done.returncode == 0, done.stderr


def test_a_missing_package_raises_the_usual_error(tmp_path):
    (tmp_path / "pipeline.py").write_text((ROOT / "jobs/pipeline.py").read_text())
    done = python(
        "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pipeline", cwd=tmp_path, PYTHONPATH=""
    )
    assert "ModuleNotFoundError: No module named 'pipeline'" in done.stderr
