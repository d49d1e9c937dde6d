"""What a model learned, as pictures: embedding filters, position similarity, attention distance, attention rollout.

    python jobs/visualize.py --checkpoint runs/x --images photos/ --output figures/x

Writes filters.png, positions.png, distance.png, rollout.png and numbers.json (the figures of the paper, 7, 6 and 14) and
logs them to a run of the MLflow experiment "inspect". --checkpoint is a
checkpoint or run folder, local or s3://, or an MLflow URI; --images a folder of images or a dataset, by default photographs
that scikit-learn installs (the paper averages attention distance over 128 images).
"""

import dataclasses
import io
import json
import os

import tyro

from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """jobs/visualize.py"""

    checkpoint: str
    """Checkpoint or run folder, or an MLflow URI."""
    output: str
    """Folder for the figures, local or s3://."""
    images: str | None = None
    """Folder of images, or a prepared dataset."""
    limit: int = 128
    """Images at most."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""
    log: bool = True
    """Log the figures to MLflow."""
    json: bool = False
    """Print numbers.json, and nothing else, on stdout."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Command, prog="jobs/visualize.py", description=__doc__, args=argv)
    if options.limit < 1:
        raise UserError("--limit must be at least 1")

    import torch

    from models import inspect
    from models.vit import VisionTransformer
    from pipeline.data.loading.samples import sample_images
    from pipeline.weights import open_model

    model, _ = open_model(options.checkpoint, options.tracking_uri)
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{model.config['variant']} has no attention to look at")
    size, channels = model.config["image_size"], model.config["channels"]
    images = torch.from_numpy(sample_images(options.images, size, options.limit, channels))
    with torch.inference_mode():
        figures, missing = inspect.figures(model, images)
        distance = inspect.attention_distance(model, images)
    numbers = {
        "checkpoint": options.checkpoint,
        "variant": model.config["variant"],
        "images": len(images),
        "mean_attention_distance": {f"layer {i + 1}": row for i, row in enumerate(distance.round(2).tolist())},
        "missing": missing,
    }
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        storage.write_bytes(storage.join(options.output, f"{name}.png"), picture.getvalue())
    storage.write_json(storage.join(options.output, "numbers.json"), numbers)
    if options.json:
        print(json.dumps(numbers))
    else:
        for name in figures:
            print(f"wrote {storage.join(options.output, f'{name}.png')}")
        for name, reason in missing.items():
            print(f"no {name}: {reason}")
        nearest, farthest = distance.min(axis=1), distance.max(axis=1)
        print(
            f"mean attention distance: first layer {nearest[0]:.0f}-{farthest[0]:.0f} px, "
            f"last layer {nearest[-1]:.0f}-{farthest[-1]:.0f} px"
        )
    if options.log:
        from pipeline.tracking import artifacts, names, registry, start_run, tracking_uri
        from pipeline.weights import locate

        uri = tracking_uri(options.tracking_uri)
        kept_there = options.checkpoint.startswith(artifacts.SCHEMES)
        checkpoint = options.checkpoint if kept_there else locate(options.checkpoint)
        tags = {names.CHECKPOINT: checkpoint}
        with start_run(names.INSPECT, os.path.basename(checkpoint.rstrip("/")), tags=tags, tracking_uri=uri) as run:
            if trained_by := registry.run_of(checkpoint, uri):
                run.link("pretrain", trained_by)
            for name, figure in figures.items():
                run.log_figure(figure, f"{name}.png")
            run.log_dict(numbers, "numbers.json")
    return 0


if __name__ == "__main__":
    run_job(main)
