"""Weights of a random model in every published naming scheme give the logits of the model."""

import types

import numpy as np
import pytest
import torch

from models import create_model, weights
from models.weights import load_tensors, translate
from pipeline.weights import load_weights
from tests.weights import google_arrays, logits, save_npz, tiny


@pytest.mark.parametrize("naming", ["published", "linen", "big_vision"])
@pytest.mark.parametrize("options", [{"pre_logits": True}, {}, {"pool": "gap"}, {"pool": "map"}], ids=str)
def test_google_weights_give_the_same_logits(tmp_path, naming, options):
    model = tiny(**options)
    path = save_npz(tmp_path / "w.npz", google_arrays(model, naming))
    other = tiny(seed=9, **options)
    report = load_weights(other, path, strict_head=True)
    assert report.naming == "google"
    assert set(report.loaded) == set(model.state_dict())
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=1e-6)


def test_google_hybrid_gives_the_same_logits(tmp_path):
    options = {"variant": "R26+S/32", "size": 64}
    model = tiny(**options)
    other = tiny(seed=9, **options)
    load_weights(other, save_npz(tmp_path / "w.npz", google_arrays(model)), strict_head=True)
    torch.testing.assert_close(logits(other), logits(model))


def test_the_numbering_of_linen_is_not_mistaken(tmp_path):
    """In both namings LayerNorm_0 comes before attention; the other one differs: LayerNorm_2 or LayerNorm_1."""
    model = tiny()
    old, new = google_arrays(model), google_arrays(model, "linen")
    assert "Transformer/encoderblock_0/LayerNorm_2/scale" in old
    assert "Transformer/encoderblock_0/LayerNorm_1/scale" in new
    assert "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" in old


def test_optimiser_state_and_bfloat16_in_a_training_checkpoint(tmp_path):
    """opt/target/ has the parameters, opt/state/ other values with the same names;
    bfloat16 is stored as two-byte void."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    arrays = {}
    for name, array in google_arrays(model).items():
        arrays[f"opt/target/{name}"] = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16).view("V2")
        arrays[f"opt/state/param_states/{name}/grad_ema"] = array
    other = tiny(seed=9)
    load_weights(other, save_npz(tmp_path / "w.npz", arrays), strict_head=True)
    assert torch.equal(logits(other), logits(model))


def test_big_vision_gives_the_class_token_no_position(tmp_path):
    model = tiny()
    arrays = google_arrays(model)
    with torch.no_grad():
        model.pos_embed[:, 0] = 0
    name = "Transformer/posembed_input/pos_embedding"
    arrays["pos_embedding"] = arrays.pop(name)[:, 1:]
    other = tiny(seed=9)
    load_weights(other, save_npz(tmp_path / "w.npz", arrays), strict_head=True)
    torch.testing.assert_close(logits(other), logits(model))


def test_bit_weights_give_the_same_logits(tmp_path):
    with torch.device("meta"):
        model, other = create_model("R50x1", 3).eval(), create_model("R50x1", 3)
    for net in (model, other):
        net.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter)
    arrays = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.startswith("head."):
            new = "resnet/head/conv2d/" + ("kernel" if array.ndim == 2 else "bias")
            arrays[new] = array.T[None, None] if array.ndim == 2 else array
            continue
        module, leaf = (
            ("standardized_conv2d", "kernel")
            if "conv" in name
            else ("group_norm", "gamma" if "weight" in name else "beta")
        )
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        if name.startswith("stages."):
            _, stage, _, unit, part, *_ = name.split(".")
            where = "a/proj" if part == "downsample" else "abc"[int(part[-1]) - 1]
            arrays[f"resnet/block{int(stage) + 1}/unit{int(unit) + 1:02d}/{where}/{module}/{leaf}"] = array
        else:
            arrays[f"resnet/{'root_block/' if name.startswith('stem') else ''}{module}/{leaf}"] = array
    report = load_weights(other, save_npz(tmp_path / "w.npz", arrays), strict_head=True)
    assert report.naming == "bit"
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_layer_scale_becomes_part_of_the_matrices(tmp_path):
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
    theirs = timm.create_model("vit_tiny_patch16_224", **options, mlp_ratio=1.5, init_values=0.5, reg_tokens=2).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    model = tiny(size=32, gelu="exact", registers=2)
    assert any("LayerScale" in note for note in load_weights(model, tmp_path / "w.pt").notes)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_timm_registers_with_positions_of_their_own(tmp_path):
    import timm

    reference = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5, reg_tokens=2
    ).eval()
    torch.nn.init.normal_(reference.pos_embed)
    torch.nn.init.normal_(reference.head.weight)
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    model = create_model("Ti/16", 5, 64, width=48, depth=2, heads=3, registers=2, gelu="exact").eval()
    load_weights(model, tmp_path / "w.pth", strict_head=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


def test_huggingface_folder_old_and_new_names(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8, num_labels=7
    )  # fmt: skip
    reference = ViTForImageClassification(config).eval()
    x = torch.randn(2, 3, 24, 24)
    reference.save_pretrained(tmp_path / "folder")  # the names of files since 2021
    torch.save(reference.state_dict(), tmp_path / "modules.bin")  # the names of transformers 5's modules
    for source in ("folder", "modules.bin"):
        model = tiny(gelu="exact", ln_eps=1e-12)
        report = load_weights(model, tmp_path / source, strict_head=True)
        assert report.naming == "huggingface"
        assert not report.notes
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x).logits, atol=1e-5, rtol=1e-4)
    notes = " ".join(load_weights(tiny(), tmp_path / "folder").notes)
    assert 'gelu="exact"' in notes
    assert "1e-12" in notes


def test_a_new_naming_is_one_module_and_one_line(monkeypatch):
    """The line is an entry of NAMINGS; the module has the recognition and the translation."""
    shouting = types.SimpleNamespace(
        NAME="shouting",
        ANCHORS=("PATCH_EMBED.PROJ.WEIGHT",),
        matches=lambda tensors, config: "PATCH_EMBED.PROJ.WEIGHT" in tensors,
        translate=lambda tensors: {name.lower(): tensor for name, tensor in tensors.items()},
        conventions=lambda tensors, config: weights.Conventions(activation="tanh"),
    )
    monkeypatch.setattr(weights, "NAMINGS", (shouting, *weights.NAMINGS))
    state = {f"module.{name.upper()}": tensor for name, tensor in tiny().state_dict().items()}
    model = tiny(seed=9)
    report = load_tensors(model, translate(state), "here", strict_head=True)
    assert report.naming == "shouting"
    assert torch.equal(logits(model), logits(tiny()))
