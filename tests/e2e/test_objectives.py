"""Masked patch prediction, ResNets and hybrids through the real jobs, on handwritten digits."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.jobprocess import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    done = job("prepare", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def trained(root: Path, *arguments: str) -> tuple[str, dict[str, str]]:
    """Output and closing block of a pre-training job."""
    done = job("pretrain", *arguments, cwd=root, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, dict(re.findall(r"^pretrain: (\w+)=(.*)$", done.stdout, re.M))


@pytest.mark.parametrize(("target", "outputs"), [("mean", 512), ("downsized", 16 * 512), ("full", 8 * 8 * 3)])
def test_masked_patch_prediction_trains_and_its_encoder_transfers(digits, target, outputs):
    run = f"runs/masked-{target}"
    arguments = ["--recipe", "masked_demo", "--target", target, "--steps", "60steps", "--workers", "1", "--output", run]
    printed, numbers = trained(digits, *arguments)
    assert float(numbers["loss_last"]) < 0.5 * float(numbers["loss_first"])
    assert numbers["top1"] == "none"
    assert re.search(r"validation  loss [\d.]+$", printed, re.M)
    weights = load_file(Path(numbers["checkpoint"], "model.safetensors"))
    assert weights["mpp_head.weight"].shape == (outputs, 192)
    scores = job(
        "transfer", "--suite", "demo", "--data", "runs/demo/data", "--checkpoint", run, "--tasks", "linear", "fewshot",
        "--output", f"{run}-transfer", cwd=digits, timeout=600,
    )  # fmt: skip
    assert scores.returncode == 0, scores.stdout[-3000:] + scores.stderr[-3000:]
    assert float(re.search(r"^linear +([\d.]+)$", scores.stdout, re.M)[1]) > 50  # chance is 10


@pytest.mark.parametrize("variant", ["R50x1", "R26+S/32"])
def test_convolutional_models_pretrain_through_the_same_job(digits, variant):
    arguments = ["--model.variant", variant, "--steps", "6steps", "--batch-size", "16", "--workers", "1"]
    if "+" in variant:
        arguments += ["--model.depth", "1"]
    _, numbers = trained(digits, *arguments, "--output", f"runs/{variant[:3]}")
    assert numbers["steps"] == "6"
    assert float(numbers["top1"]) >= 0
    weights = load_file(Path(numbers["checkpoint"], "model.safetensors"))
    assert any(name.endswith("conv1.weight") for name in weights)
