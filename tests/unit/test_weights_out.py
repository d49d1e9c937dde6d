"""Weights for other libraries: each library opens them and gives this project's logits."""

import json

import pytest
import safetensors.torch
import torch

from models.errors import UserError
from models.weights import to_huggingface, to_timm
from tests.weights import tiny

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
