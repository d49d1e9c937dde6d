"""jobs/export.py end to end: the target library opens the exported model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import create_model
from pipeline import storage
from pipeline.errors import InUse, UserError
from pipeline.operations import export_output
from pipeline.weights import load_model, save_checkpoint_weights
from tests.runs import commit_checkpoint, flip_bit

PROJECT = Path(__file__).parents[2]
CLASSES = ["ant", "bee", "cat"]


def checkpoint(folder, variant="Ti/8", **options):
    torch.manual_seed(0)
    options = {"width": 32, "depth": 2, "heads": 4, **options}
    model = create_model(variant, len(CLASSES), image_size=32, **options).eval()
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint_weights(model, {"classes": CLASSES}, str(folder))
    return model


def export(*arguments):
    command = [sys.executable, "jobs/export.py", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def pictures(folder):
    """uint8 (n,32,32,3), read and fitted as a user would."""
    found = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in sorted(folder.rglob("*.png"))]
    return np.stack([cv2.resize(picture, (32, 32)) for picture in found])


def by_timm(folder, x):
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)


def by_huggingface(folder, x):
    from transformers import ViTForImageClassification, ViTImageProcessor

    model = ViTForImageClassification.from_pretrained(folder).eval()
    assert [model.config.id2label[i] for i in range(3)] == CLASSES
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    processed = ViTImageProcessor.from_pretrained(folder)(list(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, x, atol=1e-6, rtol=0)  # the same preprocessing
    return model(processed).logits


def by_onnx(folder, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def by_torch_export(folder, x):
    return torch.export.load(f"{folder}/model.pt2").module()(x)


def by_this_project(folder, x):
    return load_model(folder)(x)


@pytest.mark.parametrize(
    ("format", "opened"),
    [
        ("timm", by_timm),
        ("huggingface", by_huggingface),
        ("safetensors", by_this_project),
        pytest.param("onnx", by_onnx, marks=pytest.mark.slow),
        pytest.param("torch-export", by_torch_export, marks=pytest.mark.slow),
    ],
)
def test_the_library_gives_our_logits(tmp_path, image_folder, format, opened):
    model = checkpoint(tmp_path / "checkpoint")
    done = export("--checkpoint", tmp_path / "checkpoint", "--to", format, "--output", tmp_path / "out", "--images", image_folder, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["passed"]
    assert result["images"] == result["same_argmax"] == 8
    assert result["max_difference"] < 1e-4
    for count in (1, 5):  # any batch size
        x = torch.from_numpy(pictures(image_folder)[:count]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(opened(tmp_path / "out", x), model(x), atol=1e-4, rtol=1e-4)


WITHOUT_TORCH = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "timm", "transformers", "mlflow"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["export.py", *sys.argv[1:]]
runpy.run_path("jobs/export.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        (
            "huggingface",
            {"pool": "gap"},
            "cannot express pool='gap'; export to timm, onnx, torch-export or safetensors",
        ),
        ("huggingface", {"registers": 2}, "cannot express registers=2"),
        ("timm", {"ln_eps": 1e-12}, "LayerNorm epsilon 1e-6, this model 1e-12; export to huggingface"),
        ("timm", {"variant": "R50x2", "width": None, "depth": None, "heads": None}, "timm has no model like R50x2"),
    ],
)
def test_what_a_format_cannot_express_is_reported_before_torch_is_imported(tmp_path, form, options, words):
    config = {"model": {"variant": "Ti/8", "num_classes": 3, "image_size": 32, **options}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--checkpoint", tmp_path, "--to", form, "--output", tmp_path / "out"]
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    failed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert words in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    checkpoint(tmp_path / "checkpoint")
    commit_checkpoint(tmp_path / "checkpoint", 1)
    flip_bit(tmp_path / "checkpoint" / "model.safetensors")
    failed = export("--checkpoint", tmp_path / "checkpoint", "--to", "safetensors", "--output", tmp_path / "out")
    assert failed.returncode == 2
    assert "model.safetensors: damaged" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_is_written_above_the_tolerance(tmp_path):
    checkpoint(tmp_path / "checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    failed = export("--checkpoint", tmp_path / "checkpoint", "--to", "safetensors", "--output", tmp_path / "full")
    assert failed.returncode == 2
    assert "already has files" in failed.stderr
    failed = export("--checkpoint", tmp_path / "checkpoint", "--to", "safetensors", "--output", tmp_path / "none", "--tolerance", "-1")  # fmt: skip
    assert failed.returncode == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "form",
    [
        "timm",
        "huggingface",
        "safetensors",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("onnx", "torch-export")),
    ],
)
def test_a_full_temporary_folder_is_one_line_and_leaves_nothing(tmp_path, form):
    """Writing stops at 20 kB a file, as on a full disk."""
    checkpoint(tmp_path / "checkpoint")
    limit = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", sys.executable, "jobs/export.py"]
    command = [*limit, "--checkpoint", tmp_path / "checkpoint", "--to", form, "--output", tmp_path / "out"]
    failed = subprocess.run(list(map(str, command)), cwd=PROJECT, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "repeat the command" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_is_marked_and_repeated(tmp_path):
    """A copy that fails leaves nothing; one that is killed leaves a marker, and the same command replaces everything."""
    output = str(tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        storage.write_bytes(str(tmp_path / "made" / name), name.encode())
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"model\.safetensors"):
        export_output.publish(str(tmp_path / "made"), output)
    assert not (tmp_path / "out" / "config.json").exists()
    (tmp_path / "out" / "model.safetensors").rmdir()
    storage.write_json(f"{output}/incomplete.json", {"files": ["config.json", "model.safetensors", "model.onnx"]})
    (tmp_path / "out" / "model.onnx").write_text("half of another format")
    with export_output.claim(output):
        with pytest.raises(InUse, match=r"out is being written by export, process \d+"), export_output.claim(output):
            pass
        export_output.publish(str(tmp_path / "made"), output)
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match=r"already has files \(config\.json, model\.safetensors\)"):
        export_output.check_unused(output)


def test_a_torchvision_that_does_not_load_is_reported_with_its_remedy(tmp_path):
    """A CUDA build with a CPU build of torch: the export works, and reports why `import timm` fails."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + (
        "from pipeline.libraries import load_torchvision; assert load_torchvision() is load_torchvision()\n"
        "import torch; torch.ops.torchvision.nms"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("install the build of torchvision that matches this torch") == 1
