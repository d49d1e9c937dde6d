"""Files and folders of weights: state dicts of training scripts, parts, checkpoints, and damaged or hostile files."""

import argparse
import contextlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from models.compatibility import check_huggingface, check_timm
from models.errors import UserError
from pipeline import storage
from pipeline.weights import load_model, load_weights, read_config, read_weights, save_checkpoint_weights
from tests.runs import commit_checkpoint, flip_bit
from tests.weights import google_arrays, logits, tiny


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
    """A command line and a metric in addition to the weights; a wrapper's prefix on some tensors only."""
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
    with pytest.raises(UserError, match=f"missing from its 2 parts: {state[9][0]}"):
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
    with pytest.raises(UserError, match=r"several weights files \(older\.pth, weights_for_you\.safetensors\)"):
        load_weights(other, tmp_path)


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
    with pytest.raises(UserError, match=r'no such file or folder \(did you mean "checkpoint"\?\)'):
        load_weights(other, f"{s3}/run/chekpoint")
    with pytest.raises(UserError, match=r"no such file or folder$"):
        load_weights(other, f"{s3}/run/nothing")


@pytest.mark.parametrize("workers", [1, 3])
def test_training_state_alone(tmp_path, workers):
    """Weights are assembled from the ZeRO slices of all workers; a missing worker is detected."""
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
    with pytest.raises(UserError, match="incomplete"):
        load_model(tmp_path)
    (tmp_path / "COMMIT.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        load_model(tmp_path)


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


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("place", ["folder", "run", "file"])
def test_a_flipped_bit_in_a_committed_checkpoint_is_never_loaded(tmp_path, file, place):
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    save_checkpoint_weights(tiny(), {"classes": ["a"]}, str(folder))
    commit_checkpoint(folder, 7)
    address = {"folder": folder, "run": tmp_path / "run", "file": folder / "model.safetensors"}[place]
    load_weights(tiny(seed=9), address)
    flip_bit(folder / file)
    for load in (load_model, read_weights, lambda uri: load_weights(tiny(seed=9), uri)):
        with pytest.raises(UserError, match=rf"step-00000007/{file}: damaged"):
            load(address)


def test_a_flipped_bit_in_a_training_state_or_on_s3_is_never_loaded(tmp_path, s3):
    folder = tmp_path / "checkpoint"
    save_checkpoint_weights(tiny(), {}, str(folder))
    (folder / "state").mkdir()
    flat = {f"param:{name}:0": p.detach().flatten() for name, p in tiny().named_parameters()}
    safetensors.torch.save_file(flat, folder / "state" / "param-00000-of-00001.safetensors")
    commit_checkpoint(folder, 7)
    for file in folder.rglob("*.*"):
        storage.copy_file(str(file), f"{s3}/checkpoint/{file.relative_to(folder)}")
    load_model(f"{s3}/checkpoint")
    flip_bit(folder / "model.safetensors")
    storage.copy_file(str(folder / "model.safetensors"), f"{s3}/checkpoint/model.safetensors")
    with pytest.raises(UserError, match=r"s3://.*model\.safetensors: damaged"):
        load_model(f"{s3}/checkpoint")
    (folder / "model.safetensors").unlink()
    load_model(folder)
    flip_bit(folder / "state" / "param-00000-of-00001.safetensors")
    with pytest.raises(UserError, match=r"param-00000-of-00001\.safetensors: damaged"):
        load_model(folder)


def test_averaged_weights_are_preferred_and_the_report_says_so(tmp_path):
    torch.save({"state_dict": tiny(seed=3).state_dict(), "state_dict_ema": tiny().state_dict()}, tmp_path / "w.pth")
    model = tiny(seed=9)
    assert (
        "the file has state_dict_ema and state_dict: state_dict_ema is used"
        in load_weights(model, tmp_path / "w.pth").notes
    )
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": "four", "layer_norm_eps": "small", "image_size": "large"},
        {"hidden_act": ["gelu"]},
        {"model_args": [], "pretrained_cfg": 3, "image_size": [1e400, -1]},
        {"model": {}},
        {"model": {"variant": 3}},
        {"model": {"variant": "Ti/8", "depth": "many", "num_classes": 7}},
        {"model": {"variant": "Ti/8", "gelu": {}, "heads": [], "num_classes": 7}},
    ],
    ids=str,
)
def test_any_config_beside_weights_is_read_or_is_one_error(tmp_path, config):
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, lambda uri: load_weights(tiny(), uri)):
        with contextlib.suppress(UserError):
            load(tmp_path)
    for check in (check_timm, check_huggingface):
        with contextlib.suppress(UserError):
            check(read_config(tmp_path)["model"])
