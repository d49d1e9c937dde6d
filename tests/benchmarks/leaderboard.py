"""Time of the leaderboard with many runs: MLflow's search compared with reading its database directly.

    python tests/benchmarks/leaderboard.py [RUNS]

Makes a SQLite database with RUNS (1,000) pre-training runs of a recipe's parameters, as many transfer runs of 19 tasks, and a child
run for each task of the first fifty. Prints the seconds of reading and of the page, and writes
tests/benchmarks/results/leaderboard.json.
"""

import json
import os
import random
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sql

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

from pipeline.config import flatten, to_dict  # noqa: E402
from pipeline.tracking import names, search, server  # noqa: E402
from pipeline.tracking.leaderboard import leaderboard  # noqa: E402
from pipeline.tracking.pages import leaderboard_page  # noqa: E402
from pipeline.training.recipes import RECIPES  # noqa: E402
from pipeline.vtab.tasks import TASKS  # noqa: E402

WITH_CHILDREN = 50


class Database:
    """Rows of runs, written at once: MLflow's client would take minutes."""

    def __init__(self, uri: str):
        self.uri, self.rows = uri, {"runs": [], "params": [], "tags": [], "latest_metrics": []}
        self.experiments = {name: server.experiment_id(uri, name) for name in (names.PRETRAIN, names.TRANSFER)}

    def add(self, experiment: str, name: str, params: dict, metrics: dict, tags: dict) -> str:
        run, started = uuid.uuid4().hex, 1_700_000_000_000 + len(self.rows["runs"])
        about = {
            "run_uuid": run,
            "name": name,
            "status": "FINISHED",
            "start_time": started,
            "lifecycle_stage": "active",
        }
        self.rows["runs"].append(
            {**about, "experiment_id": int(self.experiments[experiment]), "source_type": "LOCAL", "user_id": "x"}
        )
        self.rows["params"] += [{"run_uuid": run, "key": k, "value": str(v)} for k, v in params.items()]
        self.rows["tags"] += [{"run_uuid": run, "key": k, "value": str(v)} for k, v in tags.items()]
        point = {"run_uuid": run, "timestamp": started, "step": 0, "is_nan": False}
        self.rows["latest_metrics"] += [{**point, "key": k, "value": v} for k, v in metrics.items()]
        return run

    def write(self) -> None:
        engine = sql.create_engine(self.uri)
        with engine.begin() as connection:
            for name, rows in self.rows.items():
                connection.execute(sql.table(name, *map(sql.column, rows[0])).insert(), rows)
        engine.dispose()


def fill(uri: str, count: int) -> None:
    database, generator = Database(uri), random.Random(0)
    recipe = flatten(to_dict(RECIPES["b16_imagenet"]()))
    params = {key: value for key, value in recipe.items() if not names.is_place(key)}
    for i in range(count):
        rate = 10 ** generator.uniform(-4, -2)
        metrics = {names.VAL_TOP1: 70.0, names.LOSS: 2.0, names.IMAGES_SEEN: 4.1e8, names.GPU_HOURS: 30.0}
        about = {names.RECIPE: "b16_imagenet", "data.uri.train": "s3://bucket/imagenet/train"}
        run = database.add(names.PRETRAIN, f"b16 · {i}", params | {"optimizer.lr": f"{rate:.2g}"}, metrics, about)
        scores = {names.SCORE + task: generator.uniform(20, 95) for task in TASKS}
        mean = sum(scores.values()) / len(scores)
        tags = {names.CHECKPOINT: f"s3://bucket/b16-{i}/checkpoints/step-1", names.LINEAGE + "pretrain": run}
        suite = {"suite": "vtab1k", "seeds": 3}
        parent = database.add(names.TRANSFER, f"vtab1k · {i}", suite, scores | {names.MEAN_SCORE: mean}, tags)
        for task in TASKS if i < WITH_CHILDREN else ():
            database.add(names.TRANSFER, task, {"task": task}, {names.MEAN_SCORE: 50.0}, {names.PARENT: parent})
    database.write()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory(prefix="leaderboard-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        fill(uri, count)
        leaderboard(uri=uri)  # imports PyTorch
        result = {"command": "python tests/benchmarks/leaderboard.py", "runs": count}
        start, cpu = time.perf_counter(), time.process_time()
        rows = leaderboard(uri=uri)
        result |= {"read_s": time.perf_counter() - start, "read_cpu_s": time.process_time() - cpu, "rows": len(rows)}
        start = time.perf_counter()
        page = leaderboard_page(rows, inside="/")
        result |= {"page_s": time.perf_counter() - start, "page_bytes": len(page)}
        start, cpu = time.perf_counter(), time.process_time()
        found = sum(1 for name in (names.PRETRAIN, names.TRANSFER) for _ in search.search_runs(name, uri=uri))
        result |= {"search_s": time.perf_counter() - start, "search_cpu_s": time.process_time() - cpu, "found": found}
    result |= {"load_average": os.getloadavg()[0], "date": datetime.now(UTC).isoformat(timespec="seconds")}
    (PROJECT / "tests/benchmarks/results/leaderboard.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
