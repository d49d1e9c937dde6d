"""Losses compared with NumPy implementations of their definitions; masked patch prediction compared per patch."""

import numpy as np
import pytest
import torch

from models import create_model
from models.errors import UserError
from models.losses import correct, masked_patch_loss, multi_hot, sigmoid_loss, softmax_loss, training_loss
from models.pixels import patchify
from pipeline.weights import load_model, load_weights, save_checkpoint_weights

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.3, 0.2, -3.0, 1.0], [1.0, 1.0, -1.0, 4.0]])


def cross_entropy(row, target):
    return -(np.asarray(target) * (row - np.log(np.exp(row).sum()))).sum()


def test_softmax_is_the_definition():
    rows = LOGITS.double().numpy()
    onehot = np.eye(4)[[2, 0, 3]]
    expected = np.mean([cross_entropy(r, t) for r, t in zip(rows, onehot, strict=True)])
    assert softmax_loss(LOGITS, torch.tensor([2, 0, 3])).item() == pytest.approx(expected, rel=1e-6)
    smooth = 0.9 * onehot + 0.1 / 4
    expected = np.mean([cross_entropy(r, t) for r, t in zip(rows, smooth, strict=True)])
    assert softmax_loss(LOGITS, torch.tensor([2, 0, 3]), 0.1).item() == pytest.approx(expected, rel=1e-6)
    torch_says = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([2, 0, 3]), label_smoothing=0.1)
    assert softmax_loss(LOGITS, torch.tensor([2, 0, 3]), 0.1).item() == pytest.approx(torch_says.item(), rel=1e-6)


def test_several_classes_share_the_softmax():
    labels = torch.tensor([[2, 0], [1, -1], [3, -1]])
    targets = [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    expected = np.mean([cross_entropy(r, t) for r, t in zip(LOGITS.double().numpy(), targets, strict=True)])
    assert softmax_loss(LOGITS, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 1e-4, 0.1])
def test_sigmoid_is_summed_over_classes_and_averaged_over_images(smoothing):
    labels = torch.tensor([[2, 0], [1, -1], [3, -1]])
    hot = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    target = np.where(hot == 1, 1 - smoothing, smoothing)
    p = 1 / (1 + np.exp(-LOGITS.double().numpy()))
    expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1).mean()
    assert sigmoid_loss(LOGITS, labels, smoothing).item() == pytest.approx(expected, rel=1e-6)


def test_sigmoid_starts_near_zero_with_its_bias():
    logits = torch.full((2, 20_000), -10.0)
    assert sigmoid_loss(logits, torch.tensor([5, 7])).item() == pytest.approx(
        10 + 19_999 * np.log1p(np.exp(-10)), rel=1e-3
    )


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_mixup_is_the_mixture_of_the_losses(loss):
    a, b, lam = torch.tensor([2, 0, 3]), torch.tensor([1, 1, 3]), torch.tensor([0.25, 0.9, 0.5])
    mixed = torch.stack([loss(LOGITS[i : i + 1], a[i : i + 1]) * lam[i] + loss(LOGITS[i : i + 1], b[i : i + 1]) * (1 - lam[i]) for i in range(3)])  # fmt: skip
    assert loss(LOGITS, a, 0.0, b, lam).item() == pytest.approx(mixed.mean().item(), rel=1e-6)
    batch = {"label": a, "label_b": b, "lam": lam}
    kind = "softmax" if loss is softmax_loss else "sigmoid"
    assert training_loss(LOGITS, batch, kind).item() == pytest.approx(mixed.mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_unlabelled_images_do_not_count(loss):
    labelled = loss(LOGITS[:2], torch.tensor([2, 0]))
    assert loss(LOGITS, torch.tensor([2, 0, -1])).item() == pytest.approx(labelled.item(), rel=1e-6)
    logits = LOGITS.clone().requires_grad_()
    nothing = loss(logits, torch.tensor([-1, -1, -1]))
    nothing.backward()
    assert nothing.item() == 0
    assert not logits.grad.any()


def test_losses_are_computed_in_float32():
    low = LOGITS.bfloat16()
    for loss in (softmax_loss, sigmoid_loss):
        assert loss(low, torch.tensor([2, 0, 3])).dtype == torch.float32


def test_multi_hot_and_correct():
    assert multi_hot(torch.tensor([[1, -1], [0, 3], [-1, -1]]), 4).tolist() == [
        [0, 1, 0, 0],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    assert correct(LOGITS, torch.tensor([0, 3, -1])).tolist() == [True, True, False]
    assert correct(LOGITS, torch.tensor([[1, 0], [0, -1], [2, 3]])).tolist() == [True, False, True]


# ---------------------------------------------------------------- masked patch prediction


def pictures(count=3, size=32, seed=0):
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def colour_class(pixels: np.ndarray) -> int:
    """512-way class of a block of pixels (..., 3): 3 bits of the mean of each channel."""
    red, green, blue = (min(7, int(c.mean() / 255 * 8)) for c in np.moveaxis(pixels.astype(np.float64), -1, 0))
    return red + 8 * green + 64 * blue


def test_targets_are_the_colours_of_the_patches():
    batch = pictures()
    batch[0] = 255
    batch[1, :8, :8] = torch.tensor([0, 130, 31])
    patches = patchify(batch, 8, 3)
    mean = create_model("mu/8", 0, image_size=32, mpp="mean").targets(patches)
    small = create_model("mu/8", 0, image_size=32, mpp="downsized").targets(patches)
    full = create_model("mu/8", 0, image_size=32, mpp="full").targets(patches)
    assert mean.shape == (3, 16)
    assert small.shape == (3, 16, 16)
    assert full.shape == (3, 16, 192)
    assert mean[0, 0] == 511
    assert mean[1, 0] == 0 + 8 * 4 + 64 * 0
    for image in range(3):
        for n in range(16):
            block = patches[image, n].reshape(8, 8, 3).numpy()
            assert mean[image, n] == colour_class(block)
            for cell in range(16):
                r, c = 2 * (cell // 4), 2 * (cell % 4)
                assert small[image, n, cell] == colour_class(block[r : r + 2, c : c + 2])
    torch.testing.assert_close(full[2, 3], patches[2, 3].float() / 127.5 - 1)


def test_half_of_the_patches_are_corrupted_80_10_10():
    model = create_model("mu/4", 0, image_size=80, mpp="mean")  # 400 patches
    torch.manual_seed(0)
    x = torch.randn(4, 400, 32)
    with torch.no_grad():
        chosen, corrupted = model.corrupt_patches(x)
    assert chosen.shape == (4, 200)
    for i in range(4):
        picked = chosen[i].tolist()
        assert len(set(picked)) == 200
        rest = [n for n in range(400) if n not in set(picked)]
        assert torch.equal(corrupted[i, rest], x[i, rest])
        masked = [n for n in picked if torch.equal(corrupted[i, n], model.mask_token[0, 0])]
        same = [n for n in picked if torch.equal(corrupted[i, n], x[i, n])]
        other = [n for n in picked if n not in masked and n not in same]
        assert (len(masked), len(other), len(same)) == (160, 20, 20)
        assert all((corrupted[i, n] == x[i]).all(dim=1).any() for n in other)  # an embedding of the same image
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize("kind", ["mean", "downsized", "full"])
def test_masked_prediction_learns_and_its_encoder_transfers(tmp_path, kind):
    torch.manual_seed(0)
    model = create_model("mu/8", 0, image_size=32, mpp=kind)
    plain = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 32, 32, 3) * 30  # one colour per image
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = training_loss(model(plain), {})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    save_checkpoint_weights(model, {}, str(tmp_path))
    assert "mask_token" not in load_model(tmp_path, mpp=None).state_dict()
    encoder = create_model("mu/8", 5, image_size=32)
    report = load_weights(encoder, tmp_path)
    assert set(report.dropped) == {"mask_token", "mpp_head.weight", "mpp_head.bias"}
    assert report.fresh == ("head.weight", "head.bias")
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_masked_loss_is_the_definition():
    torch.manual_seed(0)
    model = create_model("mu/8", 0, image_size=32, mpp="mean")
    output = model(pictures())
    probabilities = output.prediction.detach().double().softmax(-1)
    expected = -probabilities.gather(2, output.target[..., None]).log().mean()
    assert masked_patch_loss(output).item() == pytest.approx(expected.item(), rel=1e-5)


def test_masked_prediction_from_patches_with_some_dropped():
    model = create_model("mu/8", 0, image_size=32, mpp="mean")
    patches, positions = patchify(pictures(), 8, 3), torch.arange(10).expand(3, -1)
    torch.manual_seed(1)
    few = model(patches[:, :10], positions)
    assert few.prediction.shape == (3, 5, 512)
    torch.manual_seed(1)
    again = model(pictures(), positions)
    torch.testing.assert_close(few.prediction, again.prediction)
    assert torch.equal(few.target, again.target)


def test_masked_prediction_refuses_what_it_cannot_do():
    for options in ({"mpp": "colour"}, {"mpp": "mean", "pre_logits": True}, {"mpp": "mean", "variant": "R+Ti/16"}):
        with pytest.raises(UserError):
            create_model(num_classes=0, image_size=64, **{"variant": "mu/8", **options})
