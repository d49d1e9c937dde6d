"""The models against an independent float64 forward pass, timm and transformers, and against the paper's tables."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import reference_vit
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model, weight_decay_groups
from models.cost import flops, parameters
from models.errors import UserError
from models.pixels import patchify
from models.resnet import Bottleneck, Flavour, Stages
from models.variants import VARIANTS
from models.vit import PRODUCTS

TINY = {"width": 32, "depth": 2, "heads": 4, "mlp": 48}


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Makes every parameter random, so that a missing one is noticed; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return model.eval()


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("variant", "encoder", "with_head"),
    [
        ("Ti/16", 5_524_416, 5_717_416),
        ("S/32", 22_493_952, 22_878_952),
        ("S/16", 21_665_664, 22_050_664),
        ("B/32", 87_455_232, 88_224_232),
        ("B/16", 85_798_656, 86_567_656),
        ("L/32", 305_510_400, 306_535_400),
        ("L/16", 303_301_632, 304_326_632),
        ("H/14", 630_764_800, 632_045_800),
        ("g/14", 1_011_202_432, None),
        ("G/14", 1_842_775_680, None),
        ("R+Ti/16", None, 6_337_704),
        ("R26+S/32", None, 36_431_912),
        ("R50+B/16", None, 98_659_112),
        ("R50+L/32", None, 328_994_856),
        ("R50x1", None, 25_549_352),
        ("R101x1", None, 44_541_480),
        ("R152x2", None, 236_335_208),
    ],
)
def test_parameters_are_the_published_numbers(variant, encoder, with_head):
    if encoder is not None:
        assert parameters({"variant": variant, "num_classes": 0}) == encoder
    if with_head is not None:
        assert parameters({"variant": variant, "num_classes": 1000}) == with_head


def test_tanh_layer_adds_its_matrix():
    plain = parameters({"variant": "B/16", "num_classes": 10})
    assert parameters({"variant": "B/16", "num_classes": 10, "pre_logits": True}) - plain == 768**2 + 768


def test_flops_are_those_of_the_formula():
    width, depth, mlp, tokens, patch = 768, 12, 3072, 197, 16
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    whole = 2 * (196 * patch**2 * 3 * width + depth * block + 1000 * width)
    config = {"variant": "B/16", "num_classes": 1000}
    assert flops(config) == whole
    skipped = (tokens - 1) * (
        width**2 + 2 * tokens * width + 2 * width * mlp
    )  # last block, patch tokens: all but q, k, v
    assert flops(config, computed=True) == whole - 2 * skipped
    tokens = 98 + 1  # half of the patches dropped
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    assert flops(config, patch_keep_rate=0.5) == 2 * (98 * patch**2 * 3 * width + depth * block + 1000 * width)


@pytest.mark.slow
def test_the_table_in_the_docstring_is_measured():
    import models.variants

    lines = [line.split("|") for line in models.variants.__doc__.splitlines() if "|" in line][1:]
    cells = [cell.split() for line in lines for cell in line]
    assert len(cells) == 20
    for name, millions, giga in cells:
        config = {"variant": name, "num_classes": 0}
        assert f"{parameters(config) / 1e6:.2f}" == millions, name
        assert f"{flops(config) / 1e9:.1f}" == giga, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_builds_and_its_config_rebuilds_it(variant):
    with torch.device("meta"):
        model = create_model(variant, 10, image_size=224)
        again = create_model(**json.loads(json.dumps(model.config)))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create_model("B/61x", 10), ["B/61x", "B/16"]),
        (lambda: create_model("X/16", 10), ["X/16", "Ti"]),
        (lambda: create_model("R51+B/16", 10), ["R50+B/16"]),
        (lambda: create_model("R50+B/8", 10), ["R50+B/8"]),
        (lambda: create_model("Ti/16", 10, dropuot=0.1), ["dropuot", '"dropout"']),
        (lambda: create_model("Ti/16", 10, pool="mean"), ["mean", "gap"]),
        (lambda: create_model("R50x1", 10, pool="gap"), ["pool"]),
        (lambda: create_model("Ti/16", 10, image_size=8), ["8 pixels", "patch"]),
        (lambda: create_model("Ti/16", 10, fc_norm=True), ["fc_norm", "gap"]),
        (lambda: create_model("Ti/16", 10, heads=5), ["192", "5 heads"]),
    ],
)
def test_a_wrong_name_or_option_is_one_clear_error(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


# ---------------------------------------------------------------- the maths, against float64 NumPy

OPTIONS = {
    "paper": {"pre_logits": True},
    "fine-tuning": {},
    "exact gelu": {"gelu": "exact"},
    "epsilon": {"ln_eps": 0.1},
    "mean": {"pool": "gap"},
    "mean, norm after": {"pool": "gap", "fc_norm": True},
    "attention pooling": {"pool": "map"},
    "sines": {"posemb": "sincos2d"},
    "sines, mean": {"posemb": "sincos2d", "pool": "gap"},
    "no positions": {"posemb": "none"},
    "registers": {"registers": 3},
    "registers, mean": {"registers": 2, "pool": "gap"},
    "normalised queries": {"qk_norm": True},
    "everything": {
        "pool": "map",
        "registers": 2,
        "qk_norm": True,
        "posemb": "sincos2d",
        "pre_logits": True,
        "ln_eps": 1e-3,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_equal_the_reference(options):
    model = randomise(create_model("Ti/8", 7, image_size=24, **TINY, **options))
    batch = images(2, 24)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = [reference_vit.forward(state, i.numpy(), patch=8, depth=2, heads=4, **options) for i in batch]
    with torch.no_grad():
        torch.testing.assert_close(model.double()(batch), torch.tensor(np.stack(expected)), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            model.float()(batch).double(), torch.tensor(np.stack(expected)), atol=2e-4, rtol=2e-4
        )


def test_images_patches_layouts_and_floats_give_the_same_logits():
    model = randomise(create_model("Ti/8", 7, image_size=24, **TINY))
    batch = images(2, 24)
    normalised = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
    patches = patchify(batch, 8, 3)
    assert patches.shape == (2, 9, 192)
    torch.testing.assert_close(patches[1, 5].reshape(8, 8, 3), batch[1, 8:16, 16:24])  # row 1, column 2
    with torch.no_grad():
        expected = model(batch)
        convolution = torch.nn.functional.conv2d(
            normalised, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8
        )
        torch.testing.assert_close(
            model.patch_embed(batch, None), convolution.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4
        )
        for x in (batch.permute(0, 3, 1, 2), normalised, patches, patches.float() / 127.5 - 1):
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        order = torch.rand(2, 9).argsort(dim=1)  # with positions, the order of patches says nothing
        shuffled = patches.gather(1, order[:, :, None].expand(-1, -1, 192))
        torch.testing.assert_close(model(shuffled, order), expected, atol=1e-4, rtol=1e-4)


def test_dropped_patches_keep_their_positions():
    model = randomise(create_model("Ti/8", 7, image_size=24, pool="gap", **TINY))
    batch, kept = images(2, 24), torch.tensor([[8, 0, 3], [1, 2, 7]])
    with torch.no_grad():
        tokens = model.patch_embed(batch, None) + model.pos_embed
        chosen = torch.stack([tokens[i, kept[i]] for i in range(2)])
        expected = model.head(model.run_blocks(chosen).mean(dim=1))
        few = torch.stack([patchify(batch, 8, 3)[i, kept[i]] for i in range(2)])
        torch.testing.assert_close(model(few, kept), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(batch, kept), expected, atol=1e-5, rtol=1e-5)


def test_pixels_that_fill_no_patch_are_dropped():
    model = randomise(create_model("Ti/8", 7, image_size=28, **TINY))
    batch = images(1, 28)
    other = batch.clone()
    other[:, 24:], other[:, :, 24:] = 0, 0
    with torch.no_grad():
        assert torch.equal(model(batch), model(other))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "32x32 pixels in a model for 24x24"),
        (torch.zeros(2, 1, 24, 24), "(2, 1, 24, 24)"),
        (torch.zeros(2, 24, 24, 3), "(2, 24, 24, 3)"),
        (torch.zeros(2, 9, 100), "patches of 100 values"),
        (torch.zeros(2, 5, 192), "5 patches in a model for 9"),
        (torch.zeros(2, 24), "(2, 24)"),
    ],
)
def test_wrong_input_is_named(x, words):
    with pytest.raises(ValueError, match=r"expected|model for") as error:
        create_model("Ti/8", 7, image_size=24, **TINY)(x)
    assert words in str(error.value)


def test_keeping_every_token_changes_nothing():
    model = randomise(create_model("Ti/8", 7, image_size=24, **TINY))
    batch = images(2, 24)
    model(batch).square().sum().backward()
    short = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.head(model.features(batch, every_token=True)).square().sum().backward()
    for a, b in zip(short, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- parity with timm and transformers

TIMM = {
    "Ti/16": ("vit_tiny_patch16_224", {}, {}),
    "Ti/16 gap": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "class_token": False, "fc_norm": False},
        {"pool": "gap"},
    ),
    "Ti/16 gap fc_norm": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "class_token": False},
        {"pool": "gap", "fc_norm": True},
    ),
    "Ti/16 map": ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}, {"pool": "map"}),
    "Ti/16 qk_norm": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "act_layer": "gelu_tanh"},
        {"qk_norm": True, "gelu": "tanh"},
    ),
}


@pytest.mark.parametrize("case", TIMM)
def test_logits_equal_timms_with_timms_weights(case):
    import timm

    name, theirs, ours = TIMM[case]
    reference = randomise(timm.create_model(name, img_size=64, num_classes=10, **theirs), std=0.05)
    model = create_model("Ti/16", 10, image_size=64, **{"gelu": "exact", **ours}).eval()
    model.load_state_dict(reference.state_dict())  # the same names, strictly
    x = images(2, 64).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("epsilons", ["timm", "google"])
def test_hybrid_logits_equal_timms(epsilons):
    import timm

    reference = randomise(timm.create_model("vit_small_r26_s32_224", img_size=64, num_classes=10, depth=1), std=0.05)
    model = create_model("R26+S/32", 10, image_size=64, depth=1, gelu="exact", epsilons=epsilons).eval()
    model.load_state_dict(reference.state_dict())
    x = images(2, 64).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        difference = (model(x) - reference(x)).abs().max().item()
    # Google's epsilons change these logits (of about 2) by 3e-4, which is small but measurable
    assert difference < 2e-5 if epsilons == "timm" else 2e-5 < difference < 1e-2, difference


def test_resnet_logits_equal_timms():
    import timm

    reference = randomise(timm.create_model("resnetv2_50x1_bit", num_classes=10), std=0.05)
    with torch.device("meta"):
        model = create_model("R50x1", 10, epsilons="timm").eval()
    model.to_empty(device="cpu")
    state = {name.replace("head.fc.", "head."): t for name, t in reference.state_dict().items()}
    state["head.weight"] = state["head.weight"].flatten(1)
    model.load_state_dict(state)
    x = images(2, 65).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-4, rtol=1e-4)


def test_stem_follows_the_formulas():
    """Google's stem on an odd image, from NumPy: weight standardisation, SAME padding, GroupNorm, pooling."""
    model = create_model("R+Ti/16", 3, image_size=45)
    stem = randomise(model.patch_embed.backbone, std=0.3).double()
    x = torch.randn(1, 3, 45, 45, dtype=torch.float64)
    kernel = stem.stem.conv.weight.detach().numpy()
    kernel = kernel - kernel.mean(axis=(1, 2, 3), keepdims=True)
    kernel = kernel / (np.sqrt((kernel**2).mean(axis=(1, 2, 3), keepdims=True)) + 1e-5)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)))  # 45 -> 23 outputs need 51: 3 and 3
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(2, 3))[:, :, ::2, ::2]
    y = np.einsum("bchwij,dcij->bdhw", windows, kernel)
    grouped = y.reshape(1, 32, -1)
    grouped = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-6)
    scale, shift = (p.detach().numpy()[None, :, None, None] for p in (stem.stem.norm.weight, stem.stem.norm.bias))
    y = np.maximum(grouped.reshape(y.shape) * scale + shift, 0)
    padded = np.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)  # 23 -> 12 outputs need 25: 1 and 1
    y = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max(axis=(4, 5))
    with torch.no_grad():
        torch.testing.assert_close(stem(x), torch.tensor(y), atol=1e-6, rtol=1e-6)


def test_bottleneck_starts_as_its_shortcut():
    stem = create_model("R50+B/16", 3, image_size=32, width=32, depth=1, heads=2).patch_embed.backbone
    unit = stem.stages[0].blocks[1]
    x = torch.randn(1, 256, 8, 8).relu()
    torch.testing.assert_close(unit(x), x)


@pytest.mark.parametrize(("variant", "size", "grid"), [("R50+B/16", 100, 7), ("R50+B/32", 100, 4), ("R+Ti/16", 96, 3)])
def test_hybrid_grid_is_that_of_its_feature_map(variant, size, grid):
    with torch.device("meta"):
        model = create_model(variant, 3, image_size=size)
        assert model.grid == grid
        assert model.patch_embed(torch.empty(1, 3, size, size), None).shape[1] == grid**2


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_logits_equal_transformers(gelu):
    from transformers import ViTConfig, ViTForImageClassification

    from models.weights import load_tensors, translate

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8,
        num_labels=7, hidden_act="gelu" if gelu == "exact" else "gelu_pytorch_tanh",
    )  # fmt: skip
    reference = randomise(ViTForImageClassification(config))
    model = create_model("Ti/8", 7, image_size=24, gelu=gelu, ln_eps=1e-12, **TINY).eval()
    load_tensors(model, translate(reference.state_dict(), config.to_dict()), "here", strict_head=True)
    x = images(2, 24).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x).logits, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- initial values


def test_initial_values_are_the_papers():
    torch.manual_seed(0)
    model = create_model("Ti/16", 10, pre_logits=True, head_bias=-10.0, width=256, heads=4, depth=2)
    block = model.blocks[0]
    bound = (6 / (2 * 256)) ** 0.5  # Xavier for 256 x 256, not for the fused 768 x 256
    for part in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight):
        assert 0.99 * bound < part.abs().max() <= bound
        assert abs(part.std() / (bound / 3**0.5) - 1) < 0.02
    bound = (6 / (256 + 1024)) ** 0.5
    assert 0.99 * bound < block.mlp.fc1.weight.abs().max() <= bound
    assert 0 < block.mlp.fc1.bias.std() < 2e-6
    for zero in (
        block.attn.qkv.bias,
        block.attn.proj.bias,
        model.cls_token,
        model.head.weight,
        model.patch_embed.proj.bias,
    ):
        assert not zero.any()
    assert torch.all(model.head.bias == -10)
    for kernel in (model.patch_embed.proj.weight, model.pre_logits.fc.weight):
        fan_in = kernel[0].numel()
        assert abs(kernel.std() * fan_in**0.5 - 1) < 0.02
        assert kernel.abs().max() <= 2 / fan_in**0.5 / 0.8796 + 1e-6
    assert abs(model.pos_embed.std() / 0.02 - 1) < 0.02


def test_the_seed_decides_the_initial_values():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create_model("mu/16", 10, registers=1, pool="map").state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["pos_embed"], states[2]["pos_embed"])


# ---------------------------------------------------------------- training behaviour


def test_dropout_and_stochastic_depth_only_in_training():
    model = randomise(create_model("Ti/8", 7, image_size=24, dropout=0.2, attention_dropout=0.2, drop_path=0.5, **TINY))
    batch = images(4, 24)
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert not torch.equal(model(batch), model(batch))
    assert [block.drop_path for block in model.blocks] == [0.0, 0.5]


def test_stochastic_depth_keeps_the_mean():
    model = create_model("Ti/8", 7, image_size=24, drop_path=0.25, **TINY).train()
    branch = torch.ones(20_000, 1, 1)
    dropped = model.blocks[1].stochastic_depth(branch)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(dropped.mean() - 1) < 0.02


@pytest.mark.parametrize("kind", ["transformer", "convolutions"])
def test_checkpointing_changes_no_gradient(kind):
    if kind == "transformer":
        model, batch = create_model("mu/8", 7, image_size=24), images(2, 24)
    else:
        model, batch = Stages((2, 1), 1, 3, Flavour(preact=True, epsilons="google")), torch.randn(1, 3, 32, 32)
    model = randomise(model, std=0.05).train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(batch).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class Products(TorchDispatchMode):
    """Counts matrix products and attention operations."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in PRODUCTS
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_selective_recomputation_repeats_no_product_and_changes_no_gradient(compiled):
    """Counts the operations of a step with all blocks recomputed, the first two of four, and all but their products."""
    batch, counts, gradients = images(2, 24), {}, {}
    for name, arguments in {
        "plain": (False,),
        "whole": (True,),
        "half": (True, 2),
        "products": (True, None, True),
    }.items():
        torch.compiler.reset()
        torch.manual_seed(0)
        model = create_model("mu/8", 7, image_size=24, depth=4, dropout=0.1)
        model = randomise(model, std=0.05).train()
        model.set_grad_checkpointing(*arguments)
        if compiled:
            for part in model.compiled_parts():
                part.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        loss = model(batch).square().sum()
        products = Products()
        with contextlib.nullcontext() if compiled else products:  # under the mode, compiled blocks would run eagerly
            loss.backward()
        counts[name] = products.count
        gradients[name] = [p.grad.clone() for p in model.parameters()]
    for name in ("whole", "half", "products"):
        for a, b in zip(gradients[name], gradients["plain"], strict=True):
            torch.testing.assert_close(a, b)
    if not compiled:
        assert counts["products"] == counts["plain"] < counts["half"] < counts["whole"]
    torch.compiler.reset()


@pytest.mark.parametrize("variant", ["R50+B/32", "R50x1"])
def test_units_of_convolutional_stages_are_compiled_parts_too(variant):
    """A stage has two kinds of units, so four stages need eight compilations."""
    torch.compiler.reset()
    model = create_model(variant, 3, image_size=64, **({"depth": 1} if "+" in variant else {}))
    units = [part for part in model.compiled_parts() if isinstance(part, Bottleneck)]
    x = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    expected = model(x)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for unit in units:
        unit.compile(backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(x), expected)
    assert (len(units), counter.frame_count) == (16, 8)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options", [{"pre_logits": True, "dropout": 0.1, "drop_path": 0.1}, {"pool": "map", "registers": 2, "qk_norm": True, "posemb": "sincos2d"}, {"mpp": "mean"}]
)  # fmt: skip
def test_compiles_without_graph_breaks(options):
    model = create_model("mu/8", 7, image_size=24, **options).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # fullgraph raises at a break
    outputs = compiled(images(2, 24))
    if "mpp" not in options:
        compiled(patchify(images(2, 24), 8, 3)[:, :5], torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]))
    (outputs[0] if "mpp" in options else outputs).float().sum().backward()


def test_blocks_share_what_is_compiled_whatever_their_stochastic_depth():
    """Compiles each block separately, like the engine. One version per block would
    silently exceed torch's limit of eight."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = create_model("mu/8", 7, image_size=24, depth=12, drop_path=0.1).train()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    model(images(2, 24)).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 3  # without depth, with it, and the last, which answers one token
    torch.compiler.reset()


def test_compiled_forward_gives_the_same_logits():
    model = randomise(create_model("mu/8", 7, image_size=24))
    with torch.no_grad():
        expected = model(images(2, 24))
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images(2, 24)), expected)


def test_bfloat16_reads_pixels_in_float32():
    model = randomise(create_model("mu/8", 7, image_size=24), std=0.05)
    batch = images(2, 24)
    with torch.no_grad():
        expected = model(batch)
        low = model.bfloat16()(batch)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.05, rtol=0.05)


def test_weight_decay_groups():
    model = create_model("mu/8", 7, image_size=24, pool="map", pre_logits=True)
    everything = weight_decay_groups(model, "all")
    assert len(everything) == 1
    assert len(everything[0]["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    kernels, rest = weight_decay_groups(model, "kernels")
    assert rest["weight_decay"] == 0.0
    decayed = {names[id(p)] for p in kernels["params"]}
    assert {"head.weight", "pre_logits.fc.weight", "attn_pool.kv.weight", "patch_embed.proj.weight"} <= decayed
    assert not {"pos_embed", "attn_pool.latent", "head.bias", "norm.weight", "blocks.0.norm1.weight"} & decayed
    assert len(decayed) + len(rest["params"]) == len(names)


# ---------------------------------------------------------------- fine-tuning


def test_a_new_head_is_zero_and_drops_the_tanh_layer():
    model = randomise(create_model("mu/8", 100, image_size=24, pre_logits=True)).double()
    model.replace_head(5)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert model.head.weight.dtype == torch.float64
    assert model(images(2, 24)).shape == (2, 5)
    again = create_model(**model.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 32), (14, 37), (14, 7), (16, 12)])
def test_position_resize_is_scipys_zoom(old, new):
    from scipy.ndimage import zoom

    from models import posemb

    table = torch.randn(1, 1 + old * old, 12, generator=torch.Generator().manual_seed(0))
    expected = zoom(table[0, 1:].reshape(old, old, 12).numpy(), (new / old, new / old, 1), order=1).reshape(-1, 12)
    resized = posemb.resize(table, new, prefix=1)
    assert torch.equal(resized[:, :1], table[:, :1])
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("posemb", ["learn", "sincos2d", "none"])
@pytest.mark.parametrize("pool", ["token", "gap"])
def test_another_resolution(posemb, pool):
    model = randomise(create_model("mu/8", 7, image_size=24, posemb=posemb, pool=pool, registers=1))
    before = dict(model.named_parameters())
    model.set_image_size(40)
    assert model(images(2, 40)).shape == (2, 7)
    assert model.config["image_size"] == 40
    fresh = create_model(**model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    if posemb == "sincos2d":
        assert torch.equal(fresh.pos_embed, model.pos_embed)
    assert all(before[n] is p for n, p in model.named_parameters() if n != "pos_embed")


def test_importing_models_does_not_import_torch():
    code = "import sys, models, models.variants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.getcwd()).returncode == 0


@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_flops_of_every_pooling(pool):
    """The last block computes only the class token's query; other poolings need all tokens."""
    config = create_model("mu/16", 10, 64, pool=pool).config
    published, computed = flops(config), flops(config, computed=True)
    assert computed < published if pool == "token" else computed == published > 0


@pytest.mark.parametrize("options", [{"posemb": "sincos2d", "pool": "gap"}, {"posemb": "sincos2d"}, {"pool": "map"}])
def test_only_parameters_in_bf16(options):
    """DeepSpeed's bf16 mode converts parameters but not buffers."""
    model = create_model("Ti/4", 10, image_size=16, depth=2, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
