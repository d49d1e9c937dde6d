"""Models of timm and transformers with the interface of transfer, compared with the outputs of the libraries."""

import json

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.transfer import open_backbone
from pipeline.transfer.backbones import build_model

IMAGES = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    """Weights of a timm model, and that model."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = import_library("timm").create_model(NAME, pretrained=False, num_classes=7).eval()
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), str(path))
    return path, model


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    """A classifier of transformers in its own format, with ImageNet's mean and deviation, and that model."""
    transformers = import_library("transformers")
    torch.manual_seed(0)
    options = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=5
    )
    model = transformers.ViTForImageClassification(options).eval()
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    about = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder, model


def normalised(backbone):
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    return (IMAGES.permute(0, 3, 1, 2) / 255 - mean) / std


def check_interface(backbone, width):
    """Checks another resolution, another head, and rebuilding the model from its arrays."""
    arrays = {name: tensor.numpy().copy() for name, tensor in backbone.state_dict().items()}
    config = dict(backbone.config)
    with torch.no_grad():
        features = backbone.features(IMAGES)
        assert features.shape == (2, width)
        again = build_model(config, arrays).eval()
        assert torch.equal(again.features(IMAGES), features)
        again.set_image_size(96)
        again.replace_head(3)
        assert np.array_equal(again(IMAGES[:, :96, :96]).numpy(), np.zeros((2, 3)))


def test_timm_model_from_a_file(timm_file):
    path, model = timm_file
    backbone = open_backbone(f"timm:{NAME}@{path}")
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(normalised(backbone)), pre_logits=True)
        assert torch.allclose(backbone.features(IMAGES), expected, atol=1e-5)
    check_interface(backbone, 192)


def test_hugging_face_model_from_a_folder(hugging_face_folder):
    folder, model = hugging_face_folder
    backbone = open_backbone(f"hf:{folder}")
    assert backbone.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        expected = model.vit(normalised(backbone)).last_hidden_state[:, 0]
        assert torch.allclose(backbone.features(IMAGES), expected, atol=1e-5)
    check_interface(backbone, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch16_225", "timm has no model"),
        (f"timm:{NAME}@nowhere.safetensors", "no such file"),
        ("hf:nowhere", "not a local folder with a config.json"),
    ],
)
def test_a_missing_model_is_named_in_the_error(name, message):
    with pytest.raises(UserError, match=message):
        open_backbone(name)


def test_weights_of_another_model_are_refused(timm_file, hugging_face_folder, tmp_path):
    with pytest.raises(UserError, match="is it a file of this model"):
        open_backbone(f"timm:vit_small_patch16_224@{timm_file[0]}")
    (tmp_path / "config.json").write_text((hugging_face_folder[0] / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded"):
        open_backbone(f"hf:{tmp_path}")
