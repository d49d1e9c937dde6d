"""Overhead of a pipeline: seconds per stage, time of a run whose stages are all done, and the plan of 1,000 stages.

    python tests/benchmarks/pipeline_overhead.py

A script that writes one file, at once or after five seconds, takes the place of the job. All else is real: processes,
state.json, the run in MLflow with its picture and page. Each command is a process of its own, so its start and imports count.
Every row is the fastest of five measurements, those of 1,000 stages that run are single. MLflow's database is there before.
CPU seconds are those of the command and what it starts, without the scripts. Writes tests/benchmarks/results/pipeline_overhead.json.
"""

import dataclasses
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[2]
PROGRAM = str(PROJECT / "jobs" / "pipeline.py")
sys.path.insert(0, str(PROJECT))

from pipeline.graph import commands, kinds  # noqa: E402

JOB = """
import os, sys, time
time.sleep({seconds})
output = sys.argv[sys.argv.index("--output") + 1]
os.makedirs(output, exist_ok=True)
open(output + "/manifest.json", "w").write('{{"fingerprint": "' + os.path.basename(output) + '"}}')
"""
LIMITS = {
    "added to one stage of 5 s": 2,
    "added to each of 10 stages": 2,
    "10 stages, all done": 3,
    "1,000 stages planned": 2,
}
"""Seconds."""
REPEATS = 5
FIELDS = {"source": "demo:digits", "size": 32}


def with_job(script: str, words: list[str]) -> int:
    """Runs jobs/pipeline.py in this process, with a script instead of the job prepare."""
    kinds.KINDS["prepare"] = dataclasses.replace(kinds.KINDS["prepare"], script=script)
    return commands.main(words, "", print)


def measure(words: list[str], folder: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) of a command and its child processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *words], check=True, cwd=folder, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, used


def chain(folder: Path, count: int) -> str:
    """The file of a pipeline of `count` consecutive stages."""
    stages: dict = {}
    for i in range(count):
        stages[f"s{i}"] = {"job": "prepare", "fields": {**FIELDS, "seed": i}, "after": [f"s{i - 1}"] if i else []}
    return written(folder, "chain", stages)


def wide(folder: Path) -> str:
    """1,000 stages in a matrix, one CPU each."""
    fields = {**FIELDS, "num_cpus": 1}
    return written(
        folder, "wide", {"data": {"job": "prepare", "fields": fields, "matrix": {"seed": list(range(1000))}}}
    )


def written(folder: Path, name: str, stages: dict) -> str:
    place = folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump({"name": name, "output": str(folder / name), "stages": stages}))
    return str(place)


def once(folder: Path) -> dict[str, tuple[float, float]]:
    """{row: (seconds, CPU seconds)} of pipelines that start in an empty folder."""
    scripts = {}
    for seconds in (0, 5):
        scripts[seconds] = folder / f"job{seconds}.py"
        scripts[seconds].write_text(JOB.format(seconds=seconds))
    alone = {s: measure([str(script), "--output", f"{folder}/alone"], folder) for s, script in scripts.items()}
    rows = {"the script alone": alone[0]}
    for name, seconds, count in (("one stage of 5 s", 5, 1), ("each of 10 stages", 0, 10)):
        place = folder / name.replace(" ", "-")
        place.mkdir()
        measure([__file__, str(scripts[0]), "run", chain(place, 2)], place)  # makes the database
        shutil.rmtree(place / "chain")
        file = chain(place, count)
        taken = measure([__file__, str(scripts[seconds]), "run", file], place)
        job = alone[seconds]
        rows[f"added to {name}"] = tuple((whole - count * one) / count for whole, one in zip(taken, job, strict=True))
        rows["10 stages, all done"] = measure([PROGRAM, "run", file], place)
    rows["1,000 stages planned"] = measure([PROGRAM, "run", wide(folder), "--dry-run"], folder)
    return rows


def thousand(folder: Path) -> dict[str, tuple[float, float]]:
    """The same for 1,000 stages, with one running stage per CPU."""
    script = folder / "job.py"
    script.write_text(JOB.format(seconds=0))
    job = measure([str(script), "--output", f"{folder}/alone"], folder)
    file = wide(folder)
    seconds, cpu = measure([__file__, str(script), "run", file], folder)
    added = (seconds / 1000, cpu / 1000 - job[1])
    return {
        "each of 1,000 stages, with the script": added,
        "1,000 stages, all done": measure([PROGRAM, "run", file], folder),
    }


def main() -> None:
    load = os.getloadavg()[0]
    runs = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(once(Path(folder)))
    rows = {row: [run[row] for run in runs] for row in runs[0]}
    with tempfile.TemporaryDirectory() as folder:
        rows |= {row: [values] for row, values in thousand(Path(folder)).items()}
    result: dict[str, dict] = {}
    for row, values in rows.items():
        seconds, cpu = (round(min(column), 2) for column in zip(*values, strict=True))
        result[row] = {"seconds": seconds, "cpu_seconds": cpu} | ({"limit": LIMITS[row]} if row in LIMITS else {})
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    result["host"] = {"cpus": os.cpu_count(), "load_before_and_after": loads, "python": platform.python_version()}
    target = PROJECT / "tests" / "benchmarks" / "results" / "pipeline_overhead.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(with_job(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else main())
