"""Inspection functions compared with manual calculations, and their figures."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import create_model, inspect
from models.errors import UserError
from pipeline.data.format import write_dataset
from pipeline.operations.visualization import inspect_model
from pipeline.weights import save_checkpoint_weights

PROJECT = Path(__file__).parents[2]


def model(**options):
    torch.manual_seed(0)
    net = create_model("Ti/8", 5, image_size=32, width=32, depth=3, heads=4, **options).eval()
    for block in net.blocks:  # larger, so that attention is not flat
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return net


def pictures(count=3):
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_filters_are_the_principal_components():
    net = model()
    with torch.no_grad():  # filters that vary along two directions only, one twice as much
        first, second = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
        first[0], second[2, :, 3] = 1.0, 1.0
        first, second = first / first.norm(), second / second.norm()
        a, b = torch.randn(32), torch.randn(32)
        net.patch_embed.proj.weight.copy_(2 * a[:, None, None, None] * first + b[:, None, None, None] * second + 5)
    components, share = inspect.embedding_filters(net)
    assert components.shape == (28, 8, 8, 3)
    from sklearn.decomposition import PCA

    flat = net.patch_embed.proj.weight.detach().permute(0, 2, 3, 1).flatten(1).double().numpy()
    expected = PCA(2).fit(flat)
    np.testing.assert_allclose(share[:2], expected.explained_variance_ratio_, atol=1e-6)
    for ours, theirs in zip(components[:2], expected.components_, strict=True):
        assert abs(abs((ours.ravel() * theirs).sum()) - 1) < 1e-6


def test_position_similarity_is_cosine():
    net = model()
    table = net.pos_embed[0, 1:].detach().numpy()  # without the class token
    similarity = inspect.position_similarity(net)
    assert similarity.shape == (4, 4, 4, 4)
    a, b = table[1 * 4 + 2], table[3 * 4 + 0]
    assert similarity[1, 2, 3, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert similarity[2, 2, 2, 2] == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"pool": "gap"}], ids=str)
def test_attention_distance_by_hand(options):
    net, images = model(**options), pictures()
    maps = inspect.attention_maps(net, images)
    assert len(maps) == 3
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(maps[0].shape[:3]))
    distance = inspect.attention_distance(net, images, batch=2)
    layer, head, values = 1, 2, []
    for weights in maps[layer][:, head].detach().numpy():
        weights = weights[net.prefix :, net.prefix :]
        for query in range(16):
            row = weights[query] / weights[query].sum()
            values.append(sum(row[k] * 8 * np.hypot(query // 4 - k // 4, query % 4 - k % 4) for k in range(16)))
    assert distance[layer, head] == pytest.approx(np.mean(values), rel=1e-5)


def test_uniform_attention_has_the_mean_distance():
    net = model()
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    expected = np.mean([8 * np.hypot(a // 4 - b // 4, a % 4 - b % 4) for a in range(16) for b in range(16)])
    np.testing.assert_allclose(inspect.attention_distance(net, pictures()), expected, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"pool": "gap"}], ids=str)
def test_rollout_by_hand(options):
    net, images = model(**options), pictures()
    rollout = inspect.attention_rollout(net, images)
    for i in range(len(images)):
        product = np.eye(16 + net.prefix)
        for weights in inspect.attention_maps(net, images[i : i + 1]):
            mean = weights[0].detach().double().numpy().mean(axis=0)
            mixed = (mean + np.eye(len(mean))) / 2
            product = mixed @ product
        row = product[0, 1:] if net.prefix else product.mean(axis=0)
        np.testing.assert_allclose(rollout[i].ravel(), row / row.max(), rtol=1e-5)


def test_inspecting_leaves_the_model_as_it_was():
    net, images = model(), pictures()
    before = net(images)
    inspect.attention_rollout(net, images)
    assert not any(block.attn._forward_pre_hooks for block in net.blocks)
    assert torch.equal(net(images), before)


def test_a_model_without_positions_says_so():
    found = inspect_model(model(posemb="none"), pictures())
    assert set(found.figures) == {"filters", "distance", "rollout"}
    assert "no position embeddings" in found.missing["positions"]
    with pytest.raises(UserError, match="embeds a feature map"):
        inspect.embedding_filters(create_model("R+Ti/16", 3, image_size=64, depth=1))


def run(job, *arguments):
    command = [sys.executable, f"jobs/{job}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_the_job_writes_pictures(tmp_path, image_folder):
    save_checkpoint_weights(model(), {}, str(tmp_path / "checkpoint"))
    done = run("visualize", "--checkpoint", tmp_path / "checkpoint", "--images", image_folder, "--output", tmp_path / "out", "--no-log", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["images"] == 30
    assert len(numbers["mean_attention_distance"]) == 3
    for name in ("filters", "positions", "distance", "rollout"):
        picture = cv2.imread(str(tmp_path / "out" / f"{name}.png"))
        assert picture.std() > 10, name  # something is drawn


def test_a_checkpoint_is_shown_the_validation_images_of_its_run(tmp_path):
    rows = [
        (f"{i}", cv2.imencode(".png", picture)[1].tobytes(), i % 3, 32, 32)
        for i, picture in enumerate(pictures(5).numpy())
    ]
    write_dataset(str(tmp_path / "validation"), rows, classes=["a", "b", "c"])
    for validation, expected in ((tmp_path / "validation", 5), (tmp_path / "gone", 8), (None, 8)):
        config = {"pretrain": {"runtime": {"validation": validation and str(validation)}}}
        save_checkpoint_weights(model(), config, str(tmp_path / "checkpoint"))
        done = run(
            "visualize", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "out", "--no-log", "--json"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["images"] == expected
        assert "5 images of " + str(validation) in done.stderr or "scikit-learn" in done.stderr


def test_visualize_refuses_a_checkpoint_that_is_not_there(tmp_path):
    failed = run("visualize", "--checkpoint", tmp_path / "nothing", "--output", tmp_path / "out2", "--no-log")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert not (tmp_path / "out2").exists()
