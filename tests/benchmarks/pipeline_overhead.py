"""What a pipeline adds to its jobs: seconds a stage, the answer of one whose stages are all done, the plan of 1,000 stages.

    python tests/benchmarks/pipeline_overhead.py

The stages are a script that writes one file, in place of the job; everything else is real: processes, state.json, MLflow's run
with its picture and page. Each command is a process of its own, so that its start and imports count. CPU seconds are those of the
command and what it starts, without the scripts of the stages. Writes tests/benchmarks/results/pipeline_overhead.json.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

from pipeline.graph import commands, kinds  # noqa: E402

JOB = """
import os, sys
output = sys.argv[sys.argv.index("--output") + 1]
os.makedirs(output, exist_ok=True)
open(output + "/manifest.json", "w").write('{"fingerprint": "' + os.path.basename(output) + '"}')
"""
FIELDS = {"source": "demo:digits", "size": 32}


def with_job(script: str, words: list[str]) -> int:
    """jobs/pipeline.py in this process, with a script in place of the job prepare."""
    kinds.KINDS["prepare"] = dataclasses.replace(kinds.KINDS["prepare"], script=script)
    return commands.main(words, "", print)


def measure(words: list[str], folder: str) -> tuple[float, float]:
    """(seconds, CPU seconds) of a command with all that it waits for."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *words], check=True, cwd=folder, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, used


def chain(folder: str, count: int) -> str:
    """The file of a pipeline of so many stages, one after the other."""
    stages: dict = {}
    for i in range(count):
        stages[f"s{i}"] = {"job": "prepare", "fields": {**FIELDS, "seed": i}, "after": [f"s{i - 1}"] if i else []}
    place = Path(folder) / f"chain{count}.yaml"
    place.write_text(yaml.safe_dump({"name": f"chain{count}", "output": f"{folder}/{count}", "stages": stages}))
    return str(place)


def wide(folder: str) -> str:
    """1,000 stages in a matrix."""
    stage = {"job": "prepare", "fields": FIELDS, "matrix": {"seed": list(range(1000))}}
    place = Path(folder) / "wide.yaml"
    place.write_text(yaml.safe_dump({"name": "wide", "output": f"{folder}/wide", "stages": {"data": stage}}))
    return str(place)


def main() -> None:
    program = str(PROJECT / "jobs" / "pipeline.py")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.py"
        script.write_text(JOB)
        job, job_cpu = measure([str(script), "--output", f"{folder}/alone"], folder)
        rows["the job alone"] = {"seconds": job, "cpu_seconds": job_cpu}
        for count in (1, 10):
            file = chain(folder, count)
            seconds, cpu = measure([__file__, str(script), "run", file], folder)
            added = {"seconds": (seconds - count * job) / count, "cpu_seconds": (cpu - count * job_cpu) / count}
            rows[f"added to each of {count} stages"] = added
            seconds, cpu = measure([program, "run", file], folder)
            rows[f"{count} stages, all done"] = {"seconds": seconds, "cpu_seconds": cpu}
        seconds, cpu = measure([program, "run", wide(folder), "--dry-run"], folder)
        rows["1,000 stages planned"] = {"seconds": seconds, "cpu_seconds": cpu}
    rows = {what: {key: round(value, 2) for key, value in row.items()} for what, row in rows.items()}
    host = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}
    result = {**rows, "host": host}
    target = PROJECT / "tests" / "benchmarks" / "results" / "pipeline_overhead.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(with_job(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else main())
