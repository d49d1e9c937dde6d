"""Export a checkpoint for other libraries, and prove it: the artefact is loaded by that library and its logits compared.

    python jobs/export.py --checkpoint runs/x --to timm --output exported/x
        timm             timm.create_model("local-dir:exported/x", pretrained=True)
        huggingface      ViTForImageClassification.from_pretrained("exported/x"), with its image processor
        onnx             onnxruntime.InferenceSession("exported/x/model.onnx"), any batch size
        torch-export     torch.export.load("exported/x/model.pt2"), any batch size
        safetensors      pipeline.weights.load_model("exported/x")

Every artefact takes float images (B,C,H,W) in [-1, 1], that is pixels / 127.5 - 1. A checkpoint of pre-training with the
tanh layer goes to timm and Hugging Face as an encoder (Hugging Face's pooler is that layer). Hugging Face's ViT has a class
token: models that pool in another way, such as the demo's, go to the other formats. --checkpoint is a checkpoint or run
folder, local or s3://, or an MLflow URI (models:/NAME/VERSION, runs:/ID/PATH); checkpoints of any ZeRO stage work without
a GPU. Nothing is written when the parity check fails (exit code 1).
"""

import dataclasses
import json
import tempfile
from typing import Literal

import tyro

from models.compatibility import check_huggingface, check_timm
from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """jobs/export.py"""

    checkpoint: str
    """Checkpoint or run folder, or an MLflow URI."""
    to: Literal["timm", "huggingface", "onnx", "torch-export", "safetensors"]
    """Format of the artefact."""
    output: str
    """New folder, local or s3://."""
    images: str | None = None
    """Folder of images or dataset to compare on; default: photographs that scikit-learn installs."""
    tolerance: float = 1e-4
    """Largest difference allowed, relative to the largest logit (at least 1)."""
    tracking_uri: str | None = None
    """MLflow server that models:/ and runs:/ refer to."""
    json: bool = False
    """Print the result as JSON, and nothing else, on stdout."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Command, prog="jobs/export.py", description=__doc__, args=argv)
    if storage.exists(options.output) and storage.list_files(options.output):
        raise UserError(f"{options.output}: already holds files; give a new folder")
    # Imports that take seconds (torch, MLflow, the libraries) come after the checks that need none of them.
    from pipeline.weights import locate, read_config

    folder = locate(options.checkpoint, options.tracking_uri)
    model_config = read_config(folder)["model"]
    if options.to == "huggingface":
        check_huggingface(model_config)
    elif options.to == "timm":
        check_timm(model_config)

    import torch

    from pipeline.data.loading.samples import sample_images
    from pipeline.operations.export import export
    from pipeline.weights import open_model

    model, config = open_model(folder)
    size, channels = model.config["image_size"], model.config["channels"]
    images = torch.from_numpy(sample_images(options.images, size, limit=8, channels=channels))
    with tempfile.TemporaryDirectory(prefix="export-") as scratch, torch.inference_mode():
        parity = export(model, config, options.to, scratch, images)
        passed = parity.within(options.tolerance)
        if passed:
            storage.copy_tree(scratch, options.output)
    if options.json:
        result = {"output": options.output, "format": options.to, **dataclasses.asdict(parity), "passed": passed}
        print(json.dumps(result))
    else:
        print(
            f"parity: {options.to} against this project on {parity.images} images: {parity.what} differ by at most "
            f"{parity.max_difference:.1e} (largest {parity.max_value:.2f}), same maximum on {parity.same_argmax} of "
            f"{parity.images}"
        )
        print(f"wrote {options.output}" if passed else f"above the tolerance of {options.tolerance:g}: nothing written")
    return 0 if passed else 1


if __name__ == "__main__":
    run_job(main)
