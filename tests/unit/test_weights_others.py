"""Models of other libraries and training methods: they give the same outputs, or the error names the kind of model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.errors import UserError
from pipeline.weights import load_weights
from tests.weights import logits, tiny

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
OURS = {"gelu": "exact", "mlp": 128}


def randomise(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def same(model, reference, atol=1e-5):
    """Whether a model's features are the reference's output."""
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=atol, rtol=1e-4)


# ---------------------------------------------------------------- other libraries


@pytest.mark.parametrize("head", [{}, {"representation_size": 32}], ids=["plain head", "tanh layer"])
def test_torchvision(tmp_path, head):
    from torchvision.models import VisionTransformer

    reference = randomise(
        VisionTransformer(
            image_size=24, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=7, **head
        )
    )
    torch.save(reference.state_dict(), tmp_path / "vit_b_16.pth")
    model = tiny(gelu="exact", pre_logits=bool(head))
    report = load_weights(model, tmp_path / "vit_b_16.pth", strict_head=True)
    assert report.naming == "torchvision"
    assert not report.notes
    same(model, reference)


@pytest.mark.parametrize("registers", [0, 2])
def test_huggingface_dinov2(tmp_path, registers):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    if registers:
        config = Dinov2WithRegistersConfig(**SMALL, num_register_tokens=registers)
        reference = randomise(Dinov2WithRegistersModel(config))
    else:
        reference = randomise(Dinov2Model(Dinov2Config(**SMALL)))
    reference.save_pretrained(tmp_path)
    model = tiny(classes=0, registers=registers, **OURS)
    report = load_weights(model, tmp_path)
    assert report.naming == "huggingface"
    assert report.dropped == ("mask_token",)
    same(model, lambda x: reference(x).pooler_output)


def dinov2_names(model, chunked):
    """The state dict of a model of this project in the naming scheme of DINOv2's code."""
    scale = {f"blocks.{i}.ls{j}.gamma": torch.full((32,), 0.5) for i in range(2) for j in (1, 2)}
    state = {**model.state_dict(), **scale, "mask_token": torch.zeros(1, 32)}
    state["register_tokens"] = state.pop("reg_token")
    if chunked:
        state = {
            name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for name, t in state.items()
        }
    return state


@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_and_its_teacher(tmp_path, chunked):
    """The published backbone, and the training file whose teacher has heads of its own."""
    state = dinov2_names(tiny(classes=0, registers=2, **OURS), chunked)
    torch.save(state, tmp_path / "backbone.pth")
    heads = {f"{head}.last_layer.weight_v": torch.zeros(3, 3) for head in ("dino_head", "ibot_head")}
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()} | heads
    student = {name: torch.zeros_like(tensor) for name, tensor in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "iteration": 3}, tmp_path / "training.pth")
    read = [tiny(classes=0, registers=2, seed=9, **OURS) for _ in range(2)]
    for model, file in zip(read, ("backbone.pth", "training.pth"), strict=True):
        report = load_weights(model, tmp_path / file)
        assert report.naming == "dinov2"
        assert any("LayerScale" in note for note in report.notes)
    assert torch.equal(logits(read[0]), logits(read[1]))
    assert "dino_head.last_layer.weight_v" in report.dropped
    assert "the file has teacher and student: teacher is used" in report.notes


def test_the_decoder_of_a_masked_autoencoder_is_ignored(tmp_path):
    """Facebook's file and Hugging Face's."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    original = tiny(classes=0, **OURS)
    decoder = {"decoder_embed.weight": torch.zeros(8, 32), "decoder_pos_embed": torch.zeros(1, 10, 8)}
    torch.save({"model": original.state_dict() | decoder | {"mask_token": torch.zeros(1, 1, 8)}}, tmp_path / "mae.pth")
    model = tiny(classes=0, seed=9, **OURS)
    report = load_weights(model, tmp_path / "mae.pth", strict_head=True)
    assert report.naming == "mae"
    assert set(report.dropped) == {*decoder, "mask_token"}
    assert torch.equal(logits(model), logits(original))
    config = ViTMAEConfig(**SMALL, intermediate_size=128, mask_ratio=0.0, decoder_num_hidden_layers=1)
    reference = randomise(ViTMAEForPreTraining(config))
    reference.save_pretrained(tmp_path / "hf")
    model = tiny(classes=0, ln_eps=1e-12, **OURS)
    assert "decoder.mask_token" in load_weights(model, tmp_path / "hf", strict_head=True).dropped
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():  # it shuffles the patches: compare the class token
        expected = reference.vit(x).last_hidden_state[:, 0]
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_siglip_with_and_without_its_text_tower(tmp_path):
    from transformers import SiglipConfig, SiglipForImageClassification, SiglipModel

    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 20,
    }
    config = SiglipConfig(vision_config={**SMALL, "intermediate_size": 48}, text_config=text)
    pair = randomise(SiglipModel(config))
    pair.save_pretrained(tmp_path / "pair")
    model = tiny(classes=0, pool="map")
    report = load_weights(model, tmp_path / "pair", strict_head=True)
    assert report.naming == "siglip"
    assert "logit_scale" in report.dropped
    assert not report.notes
    same(model, lambda x: pair.get_image_features(x).pooler_output)
    randomise(SiglipForImageClassification(config)).save_pretrained(tmp_path / "classifier")
    loaded = load_weights(tiny(classes=2, pool="map"), tmp_path / "classifier").loaded
    assert "attn_pool.kv.weight" in loaded


def test_open_clip_around_a_timm_model(tmp_path):
    """open_clip has the image tower under visual.trunk. and also a text tower."""
    model = tiny(classes=0, pool="map")
    state = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    text = {"text.transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}
    torch.save(state | text, tmp_path / "open_clip_pytorch_model.bin")
    other = tiny(classes=0, pool="map", seed=9)
    report = load_weights(other, tmp_path / "open_clip_pytorch_model.bin", strict_head=True)
    assert set(report.dropped) == set(text)
    assert torch.equal(logits(other), logits(model))


# ---------------------------------------------------------------- wrappers of training scripts


def test_an_averaged_model_of_pytorch(tmp_path):
    """torch.optim.swa_utils.AveragedModel saves the number of updates with the weights."""
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.ModuleDict({"module": tiny()}))
    torch.save({"ema": averaged.state_dict(), "epoch": 3}, tmp_path / "ema.pt")
    assert "n_averaged" in averaged.state_dict()
    model = tiny(seed=9)
    load_weights(model, tmp_path / "ema.pt", strict_head=True)
    assert torch.equal(logits(model), logits(tiny()))


def test_lightning(tmp_path):
    """A checkpoint of Lightning: hyperparameters, loops and callbacks in addition
    to the state dict of a LightningModule."""
    state = {f"model.{name}": tensor for name, tensor in tiny().state_dict().items()}
    beside = {
        "epoch": 1,
        "loops": {},
        "callbacks": {},
        "hyper_parameters": {"data": Path("a/b")},
        "optimizer_states": [],
    }
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.0", **beside}, tmp_path / "last.ckpt")
    model = tiny(seed=9)
    load_weights(model, tmp_path / "last.ckpt", strict_head=True)
    assert torch.equal(logits(model), logits(tiny()))


def test_a_head_beside_the_encoder_in_a_module_of_both(tmp_path):
    state = {
        f"model.{'' if name.startswith('head.') else 'backbone.'}{name}": t for name, t in tiny().state_dict().items()
    }
    torch.save(state, tmp_path / "w.pt")
    model = tiny(seed=9)
    load_weights(model, tmp_path / "w.pt", strict_head=True)
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_in_the_middle_of_names(tmp_path, wrapper):
    state = {name.replace("blocks.", f"{wrapper}blocks."): tensor for name, tensor in tiny().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    model = tiny(seed=9)
    load_weights(model, tmp_path / "w.pt", strict_head=True)
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize(
    ("prefixes", "chosen"),
    [(("student.", "teacher."), "teacher."), (("base_encoder.", "momentum_encoder."), "base_encoder."),
     (("encoder.", "target_encoder."), "target_encoder.")],
)  # fmt: skip
def test_of_several_encoders_one_is_read_and_the_report_says_which(tmp_path, prefixes, chosen):
    models = {prefix: tiny(seed=i) for i, prefix in enumerate(prefixes)}
    state = {f"{prefix}{name}": t for prefix, model in models.items() for name, t in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    model = tiny(seed=9)
    report = load_weights(model, tmp_path / "w.pt", strict_head=True)
    assert any(f"{chosen} is used" in note for note in report.notes)
    assert torch.equal(logits(model), logits(models[chosen]))


# ---------------------------------------------------------------- what is refused by name

KERNEL = torch.zeros(32, 3, 8, 8)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"visual.conv1.weight": KERNEL, "visual.class_embedding": KERNEL, "visual.ln_pre.weight": KERNEL}, "CLIP"),
        ({"vision_model.embeddings.patch_embedding.weight": KERNEL, "vision_model.embeddings.class_embedding": KERNEL, "vision_model.pre_layrnorm.weight": KERNEL}, "CLIP"),
        ({"patch_embed.proj.weight": KERNEL, "norm_pre.weight": KERNEL}, "CLIP"),
        ({"patch_embed.proj.weight": KERNEL, "layers.0.blocks.0.attn.relative_position_bias_table": KERNEL}, "relative positions"),
        ({"patch_embed.proj.weight": KERNEL, "blocks.0.gamma_1": KERNEL}, "BEiT"),
        ({"patch_embed.proj.weight": KERNEL, "register_tokens": KERNEL, "blocks.0.mlp.w12.weight": KERNEL}, "SwiGLU"),
        ({"deit.embeddings.patch_embeddings.projection.weight": KERNEL, "deit.embeddings.distillation_token": KERNEL}, "distilled DeiT"),
        ({"layer1.0.conv1.weight": KERNEL, "fc.weight": KERNEL}, "ResNet with batch normalisation"),
        ({"model.embed_tokens.weight": KERNEL, "lm_head.weight": KERNEL}, "language model"),
        ({"a.weight": KERNEL}, "not weights of a Vision Transformer"),
        ({"a.patch_embed.proj.weight": KERNEL, "b.patch_embed.proj.weight": KERNEL}, "contains several models (a., b.)"),
        ({"_fsdp_wrapped_module._flat_param": KERNEL}, "flat parameters of FSDP"),
        ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": KERNEL}, "a LoRA adapter; merge it"),
        ({"blocks.0.attn.qkv.weight": KERNEL, "blocks.0.attn.qkv.SCB": KERNEL}, "a quantised model"),
        ({"image_encoder.patch_embed.proj.weight": KERNEL, "image_encoder.blocks.0.attn.rel_pos_h": KERNEL}, "SAM"),
        ({"embeddings.patch_embeddings.weight": KERNEL, "rope_embeddings.inv_freq": KERNEL}, "rotary positions"),
        ({"patch_embedding.weight": KERNEL, "positional_embedding.pos_embedding": KERNEL}, "pytorch_pretrained_vit"),
        ({"transformer.embeddings.patch_embeddings.weight": KERNEL}, "ViT-pytorch"),
        ({"backbone.patch_embed.projection.weight": KERNEL, "backbone.layers.0.ln1.weight": KERNEL}, "mmpretrain"),
        ({"conv_stem.weight": KERNEL, "blocks.0.0.conv_pw.weight": KERNEL}, "EfficientNet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_error_names_another_architecture(tmp_path, state, words):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError) as error:
        load_weights(tiny(), tmp_path / "w.pt")
    assert words in str(error.value)
    assert "w.pt" in str(error.value)


@pytest.mark.parametrize(
    ("file", "words"),
    [("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"), ("__0_0.distcp", "dcp_to_torch")],
)
def test_folders_of_other_frameworks_name_their_own_converter(tmp_path, file, words):
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=words):
        load_weights(tiny(), tmp_path)


def test_a_torchscript_archive_and_a_git_lfs_pointer_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UserError, match=r"ViT-B-32\.pt: a TorchScript archive"):
        load_weights(tiny(), tmp_path / "ViT-B-32.pt")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors: a Git LFS pointer"):
        load_weights(tiny(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("key", ["model_state", "network", "ema_model", "params_ema", "my_own_name"])
def test_a_state_dict_under_any_one_key(tmp_path, key):
    torch.save(
        {key: tiny().state_dict(), "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "w.pt"
    )
    model = tiny(seed=9)
    load_weights(model, tmp_path / "w.pt", strict_head=True)
    assert torch.equal(logits(model), logits(tiny()))


def test_state_dicts_under_two_unknown_keys_are_not_chosen_from(tmp_path):
    torch.save({"generator": tiny().state_dict(), "discriminator": tiny().state_dict()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"contains several state dicts \(generator, discriminator\): save one of them"):
        load_weights(tiny(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("w.onnx", b"\x08\x07", "an ONNX graph"),
        ("w.gguf", b"GGUF", "llama.cpp"),
        ("model.weights.h5", b"\x89HDF", "Keras"),
        ("flax_model.msgpack", b"\x81", "from_flax=True"),
        ("model.ckpt.index", b"x", "TensorFlow"),
        ("w.pkl", b"\x80\x04", "which may contain code"),
        ("w.pth", b"<!DOCTYPE html><html>", "a web page"),
        ("w.pth.tar", b"\x1f\x8b\x08\0", "a compressed file; unpack it"),
        ("w.pt", b"", "an empty file"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, file, content, words):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_weights(tiny(), tmp_path / file)


def test_a_safetensors_file_may_begin_with_any_bytes(tmp_path):
    """It begins with the length of its header, whose bytes may be those of another format, here gzip's."""
    tensors = {name: tensor.contiguous() for name, tensor in tiny().state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    length, wanted = int.from_bytes(data[:8], "little"), 0x088B1F
    padded = wanted.to_bytes(8, "little") + data[8 : 8 + length] + b" " * (wanted - length) + data[8 + length :]
    (tmp_path / "w.safetensors").write_bytes(padded)
    model = tiny(seed=9)
    load_weights(model, tmp_path / "w.safetensors", strict_head=True)
    assert torch.equal(logits(model), logits(tiny()))


def test_weights_of_8_bits_are_read(tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn).contiguous() for name, tensor in tiny().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = tiny(seed=9)
    load_weights(model, tmp_path / "w.safetensors", strict_head=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name].float())
