"""Weights in every published naming, built from a random model, must give that model's logits."""

import argparse
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from models import create_model
from models.errors import UserError
from models.weights import to_huggingface, to_timm
from pipeline.weights import load_model, load_weights, read_weights, save_checkpoint_weights
from tests.runs import commit_checkpoint

TINY = {"width": 32, "depth": 2, "heads": 4, "mlp": 48}


def tiny(classes=7, size=24, seed=0, **options):
    """A small model, every parameter random."""
    options = {"variant": "Ti/8", **TINY, **options}
    with torch.device("meta"):  # no time spent on initial values
        model = create_model(num_classes=classes, image_size=size, **options)
    model.to_empty(device="cpu")
    if options.get("posemb") == "sincos2d":
        model._fix_positions()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model, seed=1):
    size = model.config["image_size"]
    x = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(x)


def google_arrays(model, naming="published"):
    """The inverse of the loader, written from the published list of keys.

    naming: "published" (pre-Linen, numbered across classes), "linen" (per class), "big_vision" (positions at the top,
    stacked blocks, under params/).
    """
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    heads = model.shape.heads
    arrays = {"cls": state["cls_token"]} if "cls_token" in state else {}
    position = "pos_embedding" if naming == "big_vision" else "Transformer/posembed_input/pos_embedding"
    if "pos_embed" in state:
        arrays[position] = state["pos_embed"]
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]

    def attention(prefix, qkv_weight, qkv_bias, out_weight, out_bias):
        width = qkv_weight.shape[1]
        for part, kernel, bias in zip(
            ("query", "key", "value"), np.split(qkv_weight, 3), np.split(qkv_bias, 3), strict=True
        ):
            arrays[f"{prefix}/{part}/kernel"] = kernel.T.reshape(width, heads, -1)
            arrays[f"{prefix}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{prefix}/out/kernel"] = out_weight.T.reshape(heads, -1, width)
        arrays[f"{prefix}/out/bias"] = out_bias

    def mlp(prefix, ours):
        for i in (0, 1):
            arrays[f"{prefix}/Dense_{i}/kernel"] = state[f"{ours}.fc{i + 1}.weight"].T
            arrays[f"{prefix}/Dense_{i}/bias"] = state[f"{ours}.fc{i + 1}.bias"]

    def norm(prefix, ours):
        arrays[f"{prefix}/scale"], arrays[f"{prefix}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    mha, second, dense = (1, 2, 3) if naming == "published" else (0, 1, 0)
    for i in range(model.shape.depth):
        block, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norm(f"{block}/LayerNorm_0", f"{ours}.norm1")
        attention(
            f"{block}/MultiHeadDotProductAttention_{mha}",
            *(state[f"{ours}.attn.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")),
        )
        norm(f"{block}/LayerNorm_{second}", f"{ours}.norm2")
        mlp(f"{block}/MlpBlock_{dense}", f"{ours}.mlp")
    norm("Transformer/encoder_norm", "norm")
    if "attn_pool.latent" in state:
        pool = "attn_pool"
        arrays["MAPHead_0/probe"] = state[f"{pool}.latent"]
        attention(
            "MAPHead_0/MultiHeadDotProductAttention_0",
            np.concatenate([state[f"{pool}.q.weight"], state[f"{pool}.kv.weight"]]),
            np.concatenate([state[f"{pool}.q.bias"], state[f"{pool}.kv.bias"]]),
            state[f"{pool}.proj.weight"],
            state[f"{pool}.proj.bias"],
        )
        norm("MAPHead_0/LayerNorm_0", f"{pool}.norm")
        mlp("MAPHead_0/MlpBlock_0", f"{pool}.mlp")
    for ours, theirs in (("pre_logits.fc", "pre_logits"), ("head", "head")):
        if f"{ours}.weight" in state:
            arrays[f"{theirs}/kernel"], arrays[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]
    for name, array in state.items():
        if not name.startswith("patch_embed.backbone."):
            continue
        name = name.removeprefix("patch_embed.backbone.")
        leaf = "kernel" if "conv" in name else {"weight": "scale", "bias": "bias"}[name.rsplit(".", 1)[1]]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.reshape(1, 1, 1, -1)
        if name.startswith("stem."):
            arrays[f"{'conv_root' if 'conv' in name else 'gn_root'}/{leaf}"] = array
            continue
        _, stage, _, unit, part, *rest = name.split(".")
        part = {"conv": "conv_proj", "norm": "gn_proj"}[rest[0]] if part == "downsample" else part.replace("norm", "gn")
        arrays[f"block{int(stage) + 1}/unit{int(unit) + 1}/{part}/{leaf}"] = array
    if naming != "big_vision":
        return arrays
    stacked = {}
    for name, array in arrays.items():
        if "/encoderblock_0/" in name:
            blocks = [arrays[name.replace("_0/", f"_{i}/", 1)] for i in range(model.shape.depth)]
            stacked["params/" + name.replace("/encoderblock_0/", "/encoderblock/")] = np.stack(blocks)
        elif "/encoderblock_" not in name:
            stacked["params/" + name] = array
    return stacked


def save_npz(path, arrays):
    np.savez(path, **arrays)
    return str(path)


# ---------------------------------------------------------------- Google


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
    """opt/target/ holds the parameters, opt/state/ something of the same names; bfloat16 arrives as two-byte void."""
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


# ---------------------------------------------------------------- timm, Hugging Face, our own


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_state_dicts_of_training_scripts(tmp_path, wrapper, prefix):
    model = tiny()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    other = tiny(seed=9)
    report = load_weights(other, tmp_path / "w.pth", strict_head=True)
    assert torch.equal(logits(other), logits(model))
    assert any("exact" in note for note in report.notes)  # timm computes another GELU


def test_files_of_training_scripts_hold_more_than_weights(tmp_path):
    """A command line and a metric beside the weights; a wrapper's name before some tensors and not before others."""
    state = {f"backbone.{name}": tensor for name, tensor in tiny().state_dict().items()}
    beside = {"args": argparse.Namespace(lr=1e-3), "metric": np.float64(0.5), "epoch": 3}
    torch.save({"state_dict": state, **beside}, tmp_path / "W.PTH")
    model = tiny(seed=9)
    load_weights(model, tmp_path / "W.PTH")
    assert torch.equal(logits(model), logits(tiny()))
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(3)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"fit Ti/8: unknown: criterion\.weight"):
        load_weights(model, tmp_path / "more.pth")
    torch.save({"state_dict": state, "args": argparse.Namespace(evil=Evil())}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"cannot be read: .*save its state_dict alone"):
        load_weights(model, tmp_path / "evil.pth")


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
    with pytest.raises(UserError, match="computes with relu"):
        load_weights(tiny(), tmp_path)


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


def test_huggingface_in_several_files(tmp_path):
    from transformers import ViTConfig, ViTModel

    reference = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8))  # fmt: skip
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = tiny(pre_logits=True)
    report = load_weights(model, tmp_path)
    assert "pre_logits.fc.weight" in report.loaded  # its pooler
    assert report.fresh == ("head.weight", "head.bias")


def test_a_state_dict_in_several_files_with_one_missing_or_incomplete(tmp_path):
    model = tiny()
    state = list(model.state_dict().items())
    files = {"pytorch_model-00001-of-00002.bin": dict(state[:9]), "pytorch_model-00002-of-00002.bin": dict(state[9:])}
    places = {name: file for file, part in files.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for file, part in files.items():
        torch.save(part, tmp_path / file)
    other = tiny(seed=9)
    load_weights(other, tmp_path, strict_head=True)
    assert torch.equal(logits(other), logits(model))
    torch.save(dict(state[10:]), tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(UserError, match=f"in none of its 2 parts: {state[9][0]}"):
        load_weights(other, tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"1 of 2 parts are missing: pytorch_model-00002"):
        load_weights(other, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_files_of_any_name(tmp_path, dtype):
    model = tiny().to(dtype)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights_for_you.safetensors")
    other = tiny(seed=9)
    load_weights(other, tmp_path, strict_head=True)
    assert torch.equal(logits(other), logits(model.float()))
    (tmp_path / "older.pth").touch()
    with pytest.raises(UserError, match=r"several files of weights \(older\.pth, weights_for_you\.safetensors\)"):
        load_weights(other, tmp_path)


def test_many_missing_tensors_of_a_hybrid_are_counted(tmp_path):
    options = {"variant": "R+Ti/16", "size": 64}
    arrays = google_arrays(tiny(**options))
    for name in [name for name in arrays if "encoderblock_1" in name]:
        del arrays[name]
    with pytest.raises(
        UserError, match=r"does not fit R\+Ti/16: missing: blocks\.1\.norm1\.weight, .*blocks\.1\.mlp\.fc2\.bias"
    ):
        load_weights(tiny(**options), save_npz(tmp_path / "w.npz", arrays))


@pytest.mark.parametrize(
    "options", [{}, {"pre_logits": True, "registers": 2}, {"pool": "map", "posemb": "sincos2d"}], ids=str
)
def test_own_checkpoint_round_trip(tmp_path, options):
    model = tiny(**options)
    save_checkpoint_weights(model, {"classes": ["a"]}, str(tmp_path / "c"))
    again = load_model(tmp_path / "c")
    assert not again.training
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "c" / "config.json").read_text())["classes"] == ["a"]
    larger = load_model(tmp_path / "c", image_size=40)
    assert logits(larger).shape == (2, 7)


def test_own_checkpoint_on_s3(s3):
    model = tiny()
    save_checkpoint_weights(model.state_dict(), {"model": model.config}, f"{s3}/run/checkpoint")
    assert torch.equal(logits(load_model(f"{s3}/run/checkpoint")), logits(model))
    other = tiny(seed=9)
    load_weights(other, f"{s3}/run/checkpoint/model.safetensors")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(UserError, match="no such file or folder"):
        load_weights(other, f"{s3}/run/nothing")


@pytest.mark.parametrize("workers", [1, 3])
def test_training_state_alone(tmp_path, workers):
    """Slices of every worker, as ZeRO cuts them, give the weights back; a missing worker is noticed."""
    model = tiny()
    save_checkpoint_weights(model, {}, str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    parts = [{} for _ in range(workers)]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        share = -(-flat.numel() // workers)
        for rank, piece in enumerate(flat.split(share)):
            parts[rank][f"param:{name}:{rank * share}"] = piece.clone()
            parts[rank][f"exp_avg:{name}:{rank * share}"] = torch.zeros_like(piece)
    (tmp_path / "state").mkdir()
    for rank, part in enumerate(parts):
        safetensors.torch.save_file(part, tmp_path / "state" / f"rank-{rank:05d}-of-{workers:05d}.safetensors")
    commit_checkpoint(tmp_path, 1)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    (tmp_path / "state" / f"rank-00000-of-{workers:05d}.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        load_model(tmp_path)
    (tmp_path / "COMMIT.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        load_model(tmp_path)


# ---------------------------------------------------------------- fitting


def test_positions_are_resized_and_reported(tmp_path):
    model = tiny(size=24)
    path = save_npz(tmp_path / "w.npz", google_arrays(model))
    larger = tiny(size=40, seed=9)
    report = load_weights(larger, path)
    assert "3x3 to 5x5" in " ".join(report.notes)
    model.set_image_size(40)
    torch.testing.assert_close(larger.pos_embed, model.pos_embed)


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


def test_a_head_for_other_classes_stays_behind(tmp_path):
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
def test_what_does_not_fit_is_listed_and_the_model_untouched(tmp_path, ours, theirs, words):
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


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = tiny().state_dict()
    state["blocks.1.mlp.fc1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"not finite: blocks\.1\.mlp\.fc1\.bias"):
        load_weights(tiny(), tmp_path / "w.pt")


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    "name", ["cut.safetensors", "cut.npz", "cut.pth", "evil.pth", "evil.npz", "weights.h5", "text.pth"]
)
def test_a_damaged_or_hostile_file_is_one_clear_error(tmp_path, name, capsys):
    path = tmp_path / name
    if name == "cut.safetensors":
        safetensors.torch.save_file(tiny().state_dict(), path)
    elif name == "cut.npz":
        np.savez(path, **google_arrays(tiny()))
    elif name == "cut.pth":
        torch.save(tiny().state_dict(), path)
    elif name == "evil.pth":
        torch.save({"state_dict": Evil()}, path)
    elif name == "evil.npz":
        np.savez(path, a=np.array([Evil()], dtype=object))
    else:
        path.write_bytes(b"hello")
    if name.startswith("cut"):
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_sources_that_say_nothing_about_the_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(UserError, match="no model"):
        load_weights(tiny(), tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    for load in (load_model, read_weights):
        with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
            load(tmp_path / "empty")
    with pytest.raises(UserError, match="MLflow"):
        load_weights(tiny(), "models:/vit/3")


# ---------------------------------------------------------------- out

OUT = {
    "class token": {},
    "mean": {"pool": "gap"},
    "mean, norm after": {"pool": "gap", "fc_norm": True},
    "attention pooling": {"pool": "map"},
    "registers": {"registers": 2},
    "sines": {"posemb": "sincos2d"},
    "no positions": {"posemb": "none"},
    "normalised queries, exact": {"qk_norm": True, "gelu": "exact"},
}


@pytest.mark.parametrize("options", OUT.values(), ids=OUT.keys())
def test_timm_runs_what_it_is_given(tmp_path, options):
    import timm

    model = tiny(**options)
    weights, config = to_timm(model)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"gelu": "exact", "ln_eps": 1e-12}, {"posemb": "sincos2d"}, {"posemb": "none"}], ids=str
)
def test_transformers_runs_what_it_is_given(tmp_path, options):
    from transformers import ViTForImageClassification

    model = tiny(**options)
    weights, config, _ = to_huggingface(model, classes=list("abcdefg"))
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label[1] == "b"
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x).logits, model(x), atol=1e-5, rtol=1e-4)


def test_the_tanh_layer_is_huggingfaces_pooler(tmp_path):
    from transformers import ViTModel

    model = tiny(pre_logits=True)
    weights, config, _ = to_huggingface(model)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        pooled = ViTModel.from_pretrained(tmp_path).eval()(x).pooler_output
        torch.testing.assert_close(pooled, model.features(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "word"), [({"pool": "gap"}, "pool='gap'"), ({"registers": 2}, "registers=2"), ({"variant": "R+Ti/16", "size": 64}, "R+Ti/16")])  # fmt: skip
def test_what_huggingface_cannot_express_is_said(options, word):
    with pytest.raises(UserError, match="Hugging Face") as error:
        to_huggingface(tiny(**options))
    assert word in str(error.value)
