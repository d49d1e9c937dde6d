"""Export a checkpoint for another library, and check that the library computes the same logits.

    python jobs/export.py --checkpoint runs/x --to timm --output exported/x

    --to timm           timm.create_model("local-dir:exported/x",
                        pretrained=True)
    --to huggingface    ViTForImageClassification.from_pretrained("exported/x")
    --to onnx           onnxruntime.InferenceSession("exported/x/model.onnx")
    --to torch-export   torch.export.load("exported/x/model.pt2")
    --to safetensors    pipeline.weights.load_model("exported/x")

The exported model takes float images (B, C, H, W) in [-1, 1], which is pixels / 127.5 - 1. ONNX and torch-export accept
any batch size. A checkpoint with the tanh layer of pre-training becomes an encoder in timm and Hugging Face (Hugging
Face's pooler is that layer). Hugging Face's ViT always has a class token, so it cannot hold a model that pools in
another way, such as the demo's. Checkpoints of every ZeRO stage can be exported without a GPU. When the logits differ
by more than --tolerance, nothing is written and the exit code is 1."""

import dataclasses
import json
import tempfile

from models.compatibility import check_huggingface, check_timm
from pipeline import storage
from pipeline.config import parse_command, run_job
from pipeline.errors import plural
from pipeline.lines import fit
from pipeline.operations.export_output import check_unused, claim, publish
from pipeline.operations.options import ExportConfig
from pipeline.outputs import check_output


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(ExportConfig):
    """jobs/export.py"""

    json: bool = False
    """Print only the result, as JSON."""


def main(argv: list[str]) -> int:
    options = parse_command(argv, Command, prog="jobs/export.py", description=__doc__ or "")
    output = storage.normalise(options.output)
    check_output(output)
    check_unused(output)
    # Slow imports (torch, MLflow, the target libraries) come after the checks that do not need them.
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
    with claim(output), tempfile.TemporaryDirectory(prefix="export-") as scratch, torch.inference_mode():
        parity = export(model, config, options.to, scratch, images)
        passed = parity.within(options.tolerance)
        if passed:
            publish(scratch, output)
    if options.json:
        result = {"output": options.output, "format": options.to, **dataclasses.asdict(parity), "passed": passed}
        print(json.dumps(result))
    else:
        text = (
            f"parity: {options.to} against this project on {plural(parity.images, 'image')}: {parity.what} differ by at most "
            f"{parity.max_difference:.1e} (largest {parity.max_value:.2f}), same maximum on {parity.same_argmax} of "
            f"{parity.images}"
        )
        end = f"wrote {options.output}" if passed else f"above the tolerance of {options.tolerance:g}: nothing written"
        print(fit(f"{text}\n{end}"))
    return 0 if passed else 1


if __name__ == "__main__":
    run_job(main)
