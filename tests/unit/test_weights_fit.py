"""Fitting weights to a model: resized positions, heads of other tasks, and errors that list what does not fit."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from models import create_model
from models.errors import UserError
from models.weights import to_huggingface
from pipeline.weights import load_weights, save_checkpoint_weights
from tests.weights import google_arrays, save_npz, tiny


def test_positions_are_resized_and_reported(tmp_path):
    model = tiny(size=24)
    path = save_npz(tmp_path / "w.npz", google_arrays(model))
    larger = tiny(size=40, seed=9)
    report = load_weights(larger, path)
    assert "3x3 to 5x5" in " ".join(report.notes)
    model.set_image_size(40)
    torch.testing.assert_close(larger.pos_embed, model.pos_embed)


def test_a_head_for_other_classes_is_not_loaded(tmp_path):
    path = save_npz(tmp_path / "w.npz", google_arrays(tiny(classes=100, pre_logits=True)))
    model = tiny(classes=7)
    before = model.head.weight.clone()
    report = load_weights(model, path)
    assert set(report.dropped) == {"head.weight", "head.bias", "pre_logits.fc.weight", "pre_logits.fc.bias"}
    assert report.fresh == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, before)
    assert "not used: " in str(report)
    with pytest.raises(UserError, match=r"head\.weight is \(100, 32\), the model has \(7, 32\)"):
        load_weights(model, path, strict_head=True)


def test_a_head_above_the_tanh_layer_is_not_put_on_bare_features(tmp_path):
    path = save_npz(tmp_path / "w.npz", google_arrays(tiny(pre_logits=True)))
    assert "head.weight" in load_weights(tiny(), path).dropped
    assert "head.weight" in load_weights(tiny(pre_logits=True), path).loaded


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"width": 48}, {}, ["wrong shape", "blocks.0.norm1.weight is (32,), the model has (48,)"]),
        ({"depth": 3}, {}, ["missing", "blocks.2.norm1.weight"]),
        ({}, {"depth": 3}, ["unknown", "blocks.2.norm1.weight"]),
        ({"pool": "gap"}, {}, ["unknown", "cls_token", "pool"]),
        ({"pool": "map"}, {"pool": "gap"}, ["missing", "attn_pool.latent", "pool"]),
        ({"variant": "Ti/4"}, {}, ["patch_embed.proj.weight", "same variant"]),
        ({"qk_norm": True}, {}, ["missing", "blocks.0.attn.q_norm.weight"]),
        ({"posemb": "none"}, {}, ["pos_embed", "the model has none"]),
        ({"posemb": "sincos2d"}, {}, ["learned position embeddings", "sincos2d"]),
        ({}, {"posemb": "none"}, ["missing", "pos_embed"]),
        ({"pool": "gap", "fc_norm": True}, {"pool": "gap"}, ["fc_norm.weight", "after the mean"]),
    ],
    ids=str,
)
def test_mismatches_are_listed_and_the_model_is_unchanged(tmp_path, ours, theirs, words):
    torch.save(tiny(**theirs).state_dict(), tmp_path / "w.pt")
    model = tiny(seed=9, **ours)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, tmp_path / "w.pt")
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_tensors_of_google_files_are_listed(tmp_path):
    arrays = google_arrays(tiny()) | {"Transformer/encoderblock_0/Adapter_0/kernel": np.zeros((2, 2), np.float32)}
    with pytest.raises(UserError, match="Adapter_0"):
        load_weights(tiny(), save_npz(tmp_path / "w.npz", arrays))
    with pytest.raises(UserError, match="not weights of a Vision Transformer"):
        load_weights(tiny(), save_npz(tmp_path / "other.npz", {"text/kernel": np.zeros(3)}))


def test_many_missing_tensors_of_a_hybrid_are_counted(tmp_path):
    options = {"variant": "R+Ti/16", "size": 64}
    arrays = google_arrays(tiny(**options))
    for name in [name for name in arrays if "encoderblock_1" in name]:
        del arrays[name]
    with pytest.raises(
        UserError, match=r"does not fit R\+Ti/16: missing: blocks\.1\.norm1\.weight, .*blocks\.1\.mlp\.fc2\.bias"
    ):
        load_weights(tiny(**options), save_npz(tmp_path / "w.npz", arrays))


@pytest.mark.parametrize("model", [{}, {"variant": "R50x1"}], ids=str)
def test_any_tensor_of_any_wrong_shape_is_one_error_that_names_it(tmp_path, model):
    arrays = google_arrays(tiny(pool="map"))
    if model:
        kernel, vector = np.zeros((1, 1, 3, 3), np.float32), np.zeros(3, np.float32)
        arrays = {"resnet/root_block/standardized_conv2d/kernel": kernel, "resnet/head/conv2d/kernel": kernel}
        arrays |= {"resnet/block1/unit01/a/group_norm/gamma": vector}
    target = create_model("R50x1", 7, 64) if model else tiny(pool="map")
    for name in arrays:
        if "encoderblock_1" in name:
            continue
        for shape in ((), (5,), (2, 3), (2, 3, 4, 5, 6)):
            damaged = save_npz(tmp_path / "w.npz", {**arrays, name: np.ones(shape, np.float32)})
            with pytest.raises(UserError) as error:
                load_weights(target, damaged, strict_head=True)
            assert "w.npz" in str(error.value)
    state = tiny(registers=2).state_dict()
    for name in state:
        for shape in {(), (5,), (2, 3), (1, 1, 32), (1, 3, 32), (2, 3, 4, 5, 6)} - {tuple(state[name].shape)}:
            torch.save({**state, name: torch.ones(shape)}, tmp_path / "w.pt")
            with pytest.raises(UserError, match=r"w\.pt does not fit"):
                load_weights(tiny(registers=2), tmp_path / "w.pt", strict_head=True)
    torch.save(
        {**state, "blocks.0.ls1.gamma": torch.ones(32), "blocks.0.attn.proj.weight": torch.ones(3, 4)},
        tmp_path / "w.pt",
    )
    with pytest.raises(UserError, match=r"unknown: blocks\.0\.ls1\.gamma; wrong shape: blocks\.0\.attn\.proj"):
        load_weights(tiny(registers=2), tmp_path / "w.pt")
    for odd in (torch.ones(32).to_sparse(), torch.ones(32, device="meta"), torch.ones(32, dtype=torch.int8)):
        torch.save({**state, "norm.bias": odd}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"norm\.bias"):
            load_weights(tiny(registers=2), tmp_path / "w.pt")


def test_another_number_of_heads_or_activation_is_refused(tmp_path):
    with pytest.raises(UserError, match="has 4 attention heads, the model 8"):
        load_weights(tiny(heads=8), save_npz(tmp_path / "w.npz", google_arrays(tiny())))
    save_checkpoint_weights(tiny(), {}, str(tmp_path / "ours"))
    with pytest.raises(UserError, match="has 4 attention heads, the model 8"):
        load_weights(tiny(heads=8), tmp_path / "ours")
    state, config, _ = to_huggingface(tiny())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UserError, match="uses relu"):
        load_weights(tiny(), tmp_path)


# ---------------------------------------------------------------- grids that are not square


def rectangular(model, rows, columns):
    """The model's state dict as if it had been trained on images of rows x columns patches, and its positions as a map."""
    state = dict(model.state_dict())
    table = torch.randn(1, 1 + rows * columns, 32, generator=torch.Generator().manual_seed(5))
    state["pos_embed"] = table
    return state, table[0, 1:].T.reshape(1, 32, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (1, 9), (4, 16)], ids=str)
def test_a_rectangular_grid_is_read_by_the_shape_that_its_config_gives(tmp_path, rows, columns):
    """Grids of 1x9 and 3x3, or 4x16 and 8x8, have the same number of patches; only the config distinguishes them."""
    state, plane = rectangular(tiny(), rows, columns)
    torch.save(state, tmp_path / "pytorch_model.bin")
    size = [8 * rows, 8 * columns]
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"img_size": size}, "architecture": "vit"}))
    model = tiny(seed=9)
    report = load_weights(model, tmp_path)
    assert f"position embeddings resized from {rows}x{columns} to 3x3" in report.notes
    expected = torch.nn.functional.interpolate(plane, size=(3, 3), mode="bilinear", align_corners=True)
    torch.testing.assert_close(model.pos_embed[0, 1:], expected[0].flatten(1).T)
    torch.testing.assert_close(model.pos_embed[0, 0], state["pos_embed"][0, 0])


def test_a_rectangular_grid_that_nothing_describes_is_refused(tmp_path):
    state, _ = rectangular(tiny(), 2, 5)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"10 position embeddings of patches do not form a square grid.*image_size"):
        load_weights(tiny(), tmp_path / "w.pt")
    (tmp_path / "config.json").write_text('{"image_size": [16, 40]}')  # as the error message suggests
    assert load_weights(tiny(), tmp_path / "w.pt").notes


def test_a_rectangular_grid_with_a_class_token_is_not_silently_a_square_without(tmp_path):
    """2x4 patches and a class token are nine rows, like 3x3 patches whose class token has no position."""
    state, _ = rectangular(tiny(), 2, 4)
    torch.save(state, tmp_path / "w.pt")
    assert any(
        "are interpreted as 3x3 patches without a class token" in n
        for n in load_weights(tiny(), tmp_path / "w.pt").notes
    )
    torch.save({**state, "decoder_embed.weight": torch.ones(3)}, tmp_path / "mae.pt")  # its class token always has one
    with pytest.raises(UserError, match="8 position embeddings of patches do not form a square grid"):
        load_weights(tiny(), tmp_path / "mae.pt")
