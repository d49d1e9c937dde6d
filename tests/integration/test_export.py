"""jobs/export.py end to end: the artefact is opened here by the very library it was made for."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import create_model
from pipeline.weights import load_model, save_checkpoint_weights

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


def test_what_cannot_be_exported_is_one_error_and_nothing_is_written(tmp_path):
    checkpoint(tmp_path / "checkpoint", pool="gap")
    failed = export("--checkpoint", tmp_path / "checkpoint", "--to", "huggingface", "--output", tmp_path / "out")
    assert failed.returncode == 2
    assert "pool='gap'" in failed.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    failed = export("--checkpoint", tmp_path / "checkpoint", "--to", "safetensors", "--output", tmp_path / "full")
    assert failed.returncode == 2
    assert "already holds files" in failed.stderr
    failed = export("--checkpoint", tmp_path / "checkpoint", "--to", "safetensors", "--output", tmp_path / "none", "--tolerance", "-1")  # fmt: skip
    assert failed.returncode == 1
    assert not (tmp_path / "none").exists()
