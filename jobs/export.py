"""Export a checkpoint for other libraries, and prove it: the artefact is loaded by that library and its logits compared.

    python jobs/export.py --checkpoint runs/x --to timm --output exported/x
        timm             timm.create_model("local-dir:exported/x", pretrained=True)
        huggingface      ViTForImageClassification.from_pretrained("exported/x"), with its image processor
        onnx             onnxruntime.InferenceSession("exported/x/model.onnx"), any batch size
        torch-export     torch.export.load("exported/x/model.pt2"), any batch size
        safetensors      pipeline.weights.load_model("exported/x")

Every artefact takes float images (B,C,H,W) in [-1, 1], that is pixels / 127.5 - 1. A checkpoint of pre-training with the
tanh layer goes to timm and Hugging Face as an encoder (Hugging Face's pooler is that layer). --checkpoint is a checkpoint
or run folder, local or s3://, or an MLflow URI (models:/NAME/VERSION, runs:/ID/PATH); checkpoints of any ZeRO stage work
without a GPU. Nothing is written when the parity check fails (exit code 1).
"""

import copy
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Run = Callable[["Tensor"], "Tensor"]
"""Logits (or features) of normalised images."""


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

    import torch

    from pipeline.data.loading.samples import sample_images
    from pipeline.weights import open_model

    model, config = open_model(options.checkpoint, options.tracking_uri)
    size, channels = model.config["image_size"], model.config["channels"]
    images = torch.from_numpy(sample_images(options.images, size, limit=8, channels=channels))
    x = images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
    with tempfile.TemporaryDirectory(prefix="export-") as folder, torch.inference_mode():
        reference, run = EXPORTERS[options.to](model, config, folder)
        expected, found = reference(x), run(x)
        difference = (expected - found).abs().max().item()
        largest = expected.abs().max().item()
        agree = int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
        result = {
            "output": options.output,
            "format": options.to,
            "what": "logits" if expected.shape[1] == model.config["num_classes"] else "features",
            "images": len(x),
            "max_difference": difference,
            "max_value": largest,
            "same_argmax": agree,
        }
        passed = difference <= options.tolerance * max(1.0, largest)
        if passed:
            storage.copy_tree(folder, options.output)
    if options.json:
        print(json.dumps({**result, "passed": passed}))
    else:
        print(
            f"parity: {options.to} against this project on {len(x)} images: {result['what']} differ by at most "
            f"{difference:.1e} (largest {largest:.2f}), same maximum on {agree} of {len(x)}"
        )
        print(f"wrote {options.output}" if passed else f"above the tolerance of {options.tolerance:g}: nothing written")
    return 0 if passed else 1


# ---------------------------------------------------------------- formats: (model, config, folder) -> (ours, theirs)


def to_timm(model: "nn.Module", config: dict[str, Any], folder: str) -> tuple[Run, Run]:
    from models import create_model
    from models.weights import to_timm as convert

    timm = _require("timm")
    weights, description = convert(model)
    _save(weights, folder)
    storage.write_json(storage.join(folder, "config.json"), description)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if "epsilons" in model.config and model.config["epsilons"] != "timm" and "R" in model.config["variant"]:
        print(
            "timm runs convolutional stages with epsilons of its own: compared with this model under the same",
            file=sys.stderr,
        )
        ours = create_model(**{**model.config, "epsilons": "timm"}).eval()
        ours.load_state_dict(model.state_dict())
    else:
        ours = copy.deepcopy(model)
    if description["num_classes"] == 0:  # the encoder alone
        import torch

        ours.pre_logits = torch.nn.Identity()
        return ours.features, theirs
    return ours, theirs


def to_huggingface(model: "nn.Module", config: dict[str, Any], folder: str) -> tuple[Run, Run]:
    from models.weights import to_huggingface as convert

    transformers = _require("transformers")
    weights, description, processor = convert(model, config.get("classes"))
    _save(weights, folder)
    storage.write_json(storage.join(folder, "config.json"), description)
    storage.write_json(storage.join(folder, "preprocessor_config.json"), processor)
    architecture = getattr(transformers, description["architectures"][0])
    theirs, loading = architecture.from_pretrained(folder, output_loading_info=True)
    wrong = {key: names for key, names in loading.items() if names and key.endswith("_keys")}
    if wrong:
        raise RuntimeError(f"transformers did not take every tensor: {wrong}")
    theirs.eval()
    if description["architectures"] == ["ViTModel"]:
        return model.features, lambda x: theirs(x).pooler_output
    return model, lambda x: theirs(x).logits


def to_onnx(model: "nn.Module", config: dict[str, Any], folder: str) -> tuple[Run, Run]:
    import torch

    onnxruntime = _require("onnxruntime")
    _require("onnxscript")
    path = os.path.join(folder, "model.onnx")
    torch.onnx.export(
        model,
        (_example(model),),
        path,
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    _describe_input(config, folder)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return model, lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def to_torch_export(model: "nn.Module", config: dict[str, Any], folder: str) -> tuple[Run, Run]:
    import torch

    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(model, (_example(model),), dynamic_shapes={"x": batch})
    path = os.path.join(folder, "model.pt2")
    torch.export.save(program, path)
    _describe_input(config, folder)
    return model, torch.export.load(path).module()


def to_safetensors(model: "nn.Module", config: dict[str, Any], folder: str) -> tuple[Run, Run]:
    from pipeline.weights import load_model, save_checkpoint_weights

    save_checkpoint_weights(model, {**config, "model": model.config}, folder)
    return model, load_model(folder)


EXPORTERS = {
    "timm": to_timm,
    "huggingface": to_huggingface,
    "onnx": to_onnx,
    "torch-export": to_torch_export,
    "safetensors": to_safetensors,
}


def _example(model: "nn.Module") -> "Tensor":
    import torch

    config: Any = model.config
    return torch.zeros(2, config["channels"], config["image_size"], config["image_size"])


def _save(weights: dict[str, "Tensor"], folder: str) -> None:
    import safetensors.torch

    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(contiguous, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def _describe_input(config: dict[str, Any], folder: str) -> None:
    about = {"input": "float32 (B,C,H,W), pixels / 127.5 - 1", **config}
    storage.write_json(storage.join(folder, "config.json"), about)


def _require(package: str) -> Any:
    """Imports a library of the `export` extra."""
    import importlib

    import torch

    if not torch.cuda.is_available() and package in ("timm", "transformers"):
        # torchvision, which both import, may be a CUDA build beside a CPU build of torch. Then its compiled part does not
        # load, and its Python part fails on operators that nothing here calls.
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed; pip install 'vit-pipeline[export]'") from error


_KEPT: list[Any] = []  # an operator library lives as long as its object


if __name__ == "__main__":
    run_job(main)
