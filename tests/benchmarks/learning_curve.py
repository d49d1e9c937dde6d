"""The learning curve of one training run, as recorded in MLflow: a figure and the numbers behind it.

    python tests/benchmarks/learning_curve.py --run RUN_ID --tracking-uri sqlite:///mlflow.db --name cifar10

Writes docs/NAME.png and tests/benchmarks/results/NAME.json.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from mlflow import MlflowClient

from pipeline.tracking import names

PROJECT = Path(__file__).parents[2]
SHOWN = (
    "model.variant",
    "steps",
    "batch_size",
    "image_size",
    "engine.precision",
    "engine.zero",
    "patch_keep_rate",
    "workers",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    client = MlflowClient(options.tracking_uri)
    run = client.get_run(options.run)

    def history(metric: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in client.get_metric_history(options.run, metric))

    batch = int(run.data.params["batch_size"])
    loss, top1 = history(names.LOSS), history(names.VAL_TOP1)
    rates = [rate for _, rate in history(names.IMAGES_PER_SECOND)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([step * batch / 1000 for step, _ in loss], [value for _, value in loss], lw=1)
    left.set(title="Training loss", xlabel="thousand images seen", ylabel="cross-entropy")
    right.plot([step * batch / 1000 for step, _ in top1], [value for _, value in top1], "o-", ms=3)
    right.set(title=f"Top-1 on held-out images: {top1[-1][1]:.2f}% at the end", xlabel="thousand images seen")
    right.set_ylabel("%")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(PROJECT / f"docs/{options.name}.png", dpi=110)
    about = {
        "run": run.info.run_name,
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        "hours": round((run.info.end_time - run.info.start_time) / 3.6e6, 2),
        "images_per_second_fastest": round(max(rates), 1),
        "images_per_second_median": round(sorted(rates)[len(rates) // 2], 1),
        "params": {name: run.data.params[name] for name in SHOWN},
        "top1_percent_by_step": dict(top1),
        "loss_by_step": dict(loss),
    }
    (PROJECT / f"tests/benchmarks/results/{options.name}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
