r"""Visualize a trained model: embedding filters, position similarity, attention distance, attention rollout.

    python jobs/visualize.py --checkpoint runs/x --output figures/x
    python jobs/visualize.py --checkpoint runs/x --images photos/ \
        --output figures/x

Writes filters.png, positions.png, distance.png, rollout.png (figures 7, 6 and 14 of the paper) and numbers.json, and
logs them to the MLflow experiment "visualize". By default the images come from the run's validation set; a run without
one uses the sample photographs of scikit-learn. The paper averages attention distance over 128 images. """

import dataclasses
import io
import json
import logging
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config import parse_command, run_job
from pipeline.errors import UserError, plural
from pipeline.lines import fit
from pipeline.operations.options import VisualizeConfig
from pipeline.outputs import check_output

if TYPE_CHECKING:
    from pipeline.operations.visualization import Inspection

logger = logging.getLogger("jobs.visualize")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(VisualizeConfig):
    """jobs/visualize.py"""

    json: bool = False
    """Print only numbers.json."""


def main(argv: list[str]) -> int:
    options = parse_command(argv, Command, prog="jobs/visualize.py", description=__doc__ or "")
    if options.limit < 1:
        raise UserError(f"--limit {options.limit} must be at least 1")
    check_output(options.output)
    # Slow imports (torch, matplotlib, MLflow) are here so that --help stays fast.
    import torch

    from models.vit import VisionTransformer
    from pipeline.data.loading.samples import sample_images
    from pipeline.operations.visualization import inspect_model, sample_uri
    from pipeline.weights import open_model

    model, config = open_model(options.checkpoint, options.tracking_uri)
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{options.checkpoint}: {model.config['variant']} is a ResNet and has no attention to visualize"
        )
    source = options.images or sample_uri(config)
    size, channels = model.config["image_size"], model.config["channels"]
    images = torch.from_numpy(sample_images(source, size, options.limit, channels))
    logger.info(
        "%s of %s", plural(len(images), "image"), source or "scikit-learn's photographs: give your own with --images"
    )
    with torch.inference_mode():
        inspection = inspect_model(model, images)
    numbers = {
        "checkpoint": options.checkpoint,
        "variant": model.config["variant"],
        "images": len(images),
        "source": source,
        **inspection.numbers(),
    }
    write_inspection(inspection, numbers, options.output)
    if options.json:
        print(json.dumps(numbers))
    else:
        print_inspection(inspection, options.output)
    if options.log:
        log_inspection(inspection, numbers, options.checkpoint, options.tracking_uri)
    return 0


def write_inspection(inspection: "Inspection", numbers: dict[str, Any], output: str) -> None:
    for name, figure in inspection.figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        storage.write_bytes(storage.join(output, f"{name}.png"), picture.getvalue())
    storage.write_json(storage.join(output, "numbers.json"), numbers)


def print_inspection(inspection: "Inspection", output: str) -> None:
    for name in inspection.figures:
        print(fit(f"wrote {storage.join(output, f'{name}.png')}"))
    for name, reason in inspection.missing.items():
        print(fit(f"no {name}: {reason}"))
    nearest, farthest = inspection.distance.min(axis=1), inspection.distance.max(axis=1)
    first, last = (f"layer {nearest[i]:.0f}-{farthest[i]:.0f} px" for i in (0, -1))
    print(fit(f"mean attention distance: first {first}, last {last}"))


def log_inspection(
    inspection: "Inspection", numbers: dict[str, Any], checkpoint: str, tracking_uri: str | None
) -> None:
    """Logs the figures to an MLflow run that is linked to the training run of the checkpoint."""
    from pipeline import tracking
    from pipeline.tracking import artifacts, names, registry
    from pipeline.tracking.description import Description, checkpoint_name
    from pipeline.weights import locate

    server = tracking.resolve_tracking_uri(tracking_uri)
    place = checkpoint if checkpoint.startswith(artifacts.SCHEMES) else locate(checkpoint)
    title = checkpoint_name(place)
    about = Description(
        what=f"Inspection of {numbers['variant']}: filters, positions, attention distance and rollout.",
        data=[f"checkpoint {place}", f"{plural(numbers['images'], 'image')} of {numbers['source'] or 'scikit-learn'}"],
        to_continue="repeat the command to draw the figures again.",
    )
    tags = {names.CHECKPOINT: place}
    with tracking.start_run(names.VISUALIZE, title, tags=tags, about=about, tracking_uri=server) as run:
        if trained_by := registry.run_of(place, server):
            run.link("pretrain", trained_by)
        for name, figure in inspection.figures.items():
            run.log_figure(figure, f"{name}.png")
        run.log_dict(numbers, "numbers.json")


if __name__ == "__main__":
    run_job(main)
