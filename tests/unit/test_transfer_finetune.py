"""Fine-tuning arithmetic: accumulation, schedule, averaging, crops, determinism, evaluation."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from models import create_model
from pipeline.data import open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.patches import patchify
from pipeline.errors import UserError
from pipeline.transfer import features, finetune
from pipeline.transfer.finetune import Examples, Execution, FineTuning
from pipeline.transfer.protocols import FineTune, Probe, Split
from tests.datasets import write_tinted_patches

CPU = Execution()
SIZE = 16


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("mu/4", num_classes=7, image_size=SIZE, depth=2, pre_logits=True)


def colours(uri, n=60, seed=0):
    """Noise with one channel brighter than the others: three classes that a small model learns in seconds."""
    write_tinted_patches(uri, n, SIZE, seed=seed, noise=120, tint=100)
    return Examples(open_dataset(uri), Split(uri=uri))


@pytest.fixture
def train(tmp_path):
    return colours(str(tmp_path / "train"))


PROTOCOL = FineTune(resolution=SIZE, crop="squash", flip=False, steps=6, batch_size=30, lrs=(0.05,))


def tune(model, data, protocol=PROTOCOL, lr=0.05, seed=0, micro_batch=64):
    execution = Execution(micro_batch=micro_batch)
    return FineTuning(model, data, protocol, lr=lr, seed=seed, execution=execution).run()


def predict(model, data, resolution=SIZE):
    return finetune.predict(model, data, resolution=resolution, execution=Execution(micro_batch=4))


def state(tuned):
    return torch.cat([p.detach().flatten() for p in tuned.model.parameters()])


def test_it_learns_and_leaves_the_pretrained_model_alone(model, train, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    protocol = dataclasses.replace(PROTOCOL, steps=40, warmup=4)
    training = FineTuning(model, train, protocol, lr=0.05, seed=0, execution=CPU)
    tuned = training.run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert tuned.curve[0][1] == pytest.approx(math.log(3), rel=1e-5)  # the head starts at zero: uniform predictions
    assert training.progress == (40, 40, tuned.curve[-1][1])
    found = predict(tuned.model, colours(str(tmp_path / "test"), 50, 1))
    assert found.accuracy() > 90
    assert len(set(found.keys)) == 50


def test_accumulated_gradients_are_those_of_the_whole_batch(model, train):
    whole, parts = (tune(model, train, micro_batch=n) for n in (30, 7))
    assert torch.allclose(state(whole), state(parts), atol=2e-6)
    assert not torch.allclose(
        state(whole),
        torch.cat([p.detach().flatten() for p in tune(model, train, lr=0.01).model.parameters()]),
        atol=1e-4,
    )


@pytest.mark.slow  # compiles
@pytest.mark.timeout(900)
def test_compiled_blocks_train_as_eager_ones_and_keep_their_names(model, train):
    protocol = dataclasses.replace(PROTOCOL, steps=4, ema_decay=0.5)
    tuned = [
        FineTuning(model, train, protocol, lr=0.01, seed=0, execution=Execution(compile=compiled)).run()
        for compiled in (False, True)
    ]
    eager, compiled = (part.model.state_dict() for part in tuned)
    assert list(compiled) == list(eager)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


def test_the_seed_determines_the_weights(model, train):
    protocol = dataclasses.replace(PROTOCOL, crop="random", flip=True)
    first, again, other = (tune(model, train, protocol, seed=s) for s in (1, 1, 2))
    assert torch.equal(state(first), state(again))
    assert not torch.equal(state(first), state(other))


def test_sgd_step_is_momentum_on_clipped_gradients(model, train):
    """Two steps by hand: g is clipped to norm 1 before it enters the momentum; no weight decay."""
    protocol = dataclasses.replace(PROTOCOL, steps=2, clip=0.05)
    tuned = tune(model, train, protocol)
    hand = create_model(**{**model.config})
    hand.load_state_dict(model.state_dict())
    hand.replace_head(3)
    velocity = [torch.zeros_like(p) for p in hand.parameters()]
    stream = finetune.batches(train, protocol, seed=0, execution=CPU)
    for step in range(2):
        images, labels = next(stream)
        gradients = torch.autograd.grad(
            torch.nn.functional.cross_entropy(hand(images), labels), list(hand.parameters())
        )
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > 0.05
        lr = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 2))
        with torch.no_grad():
            for v, g, p in zip(velocity, gradients, hand.parameters(), strict=True):
                v.mul_(0.9).add_(g * 0.05 / (norm + 1e-6))
                p -= lr * v
    assert torch.allclose(state(tuned), torch.cat([p.detach().flatten() for p in hand.parameters()]), atol=1e-6)


def test_averaged_weights(model, train, monkeypatch):
    """The average starts at w_1, then a_n = 0.9 a_(n-1) + 0.1 w_n, and the average is evaluated."""
    weights = []
    step = torch.optim.SGD.step

    def recording(self, closure=None):
        step(self, closure)
        weights.append(torch.cat([p.detach().flatten() for group in self.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.SGD, "step", recording)
    averaged = tune(model, train, dataclasses.replace(PROTOCOL, ema_decay=0.9))
    expected = weights[0]
    for w in weights[1:]:
        expected = 0.9 * expected + 0.1 * w
    assert len(weights) == PROTOCOL.steps
    assert torch.allclose(state(averaged), expected, atol=1e-6)
    assert not torch.allclose(state(averaged), weights[-1], atol=1e-5)


def test_schedules():
    cosine = FineTune(steps=100, warmup=10)
    rates = [finetune.learning_rate_at(cosine, 2.0, step) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.001
    steps = FineTune(steps=1000, decay="step", warmup=80)
    rates = [finetune.learning_rate_at(steps, 1.0, step) for step in (0, 40, 80, 299, 300, 599, 600, 900)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.001])


def test_divergence_is_a_separate_kind_of_error(model, train):
    with torch.no_grad():
        model.norm.bias.fill_(float("nan"))
    with pytest.raises(finetune.Diverged, match=r"step 1 with learning rate 0\.05"):
        tune(model, train)


# ---------------------------------------------------------------- images


def numbered(uri, encoding, n=11):
    """Images whose pixels encode their position: red = column, green = row, blue = number."""
    import cv2

    def rows():
        for i in range(n):
            grid = np.indices((SIZE, SIZE)).astype(np.uint8) * 10
            picture = np.stack([grid[1], grid[0], np.full_like(grid[0], i)], -1)
            stored = (
                patchify(picture, 4)
                if encoding == "patches"
                else cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
            )
            yield f"k{i}", stored, i % 3, SIZE, SIZE

    image = {"height": SIZE, "width": SIZE, "patch_size": 4, "channels": 3} if encoding == "patches" else {}
    write_dataset(uri, rows(), classes=["a", "b", "c"], encoding=encoding, image=image)
    return Examples(open_dataset(uri), Split(uri=uri))


@pytest.mark.parametrize("encoding", ["patches", "jpeg"])
@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_full_and_cover_every_epoch_and_cross_its_end(tmp_path, monkeypatch, encoding, resident):
    monkeypatch.setattr(finetune, "RESIDENT_BYTES", 1 << 30 if resident else 0)
    data = numbered(str(tmp_path / "set"), encoding)
    protocol = dataclasses.replace(PROTOCOL, batch_size=4)
    stream = finetune.batches(data, protocol, seed=0, execution=CPU)
    images, labels = zip(*itertools.islice(stream, 11), strict=True)  # 44 examples: four epochs of 11
    assert all(batch.shape == (4, SIZE, SIZE, 3) for batch in images)
    numbers = torch.cat(images)[:, 0, 0, 2].tolist()
    assert [number % 3 for number in numbers] == torch.cat(labels).tolist()
    epochs = [numbers[start : start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert torch.equal(torch.cat(images)[0, :, :, :2], torch.cat(images)[5, :, :, :2])  # squash keeps pixels in place


def test_batch_larger_than_the_dataset_is_still_full(tmp_path, monkeypatch):
    data = numbered(str(tmp_path / "set"), "patches", n=5)
    protocol = dataclasses.replace(PROTOCOL, batch_size=12)
    for limit in (1 << 30, 0):
        monkeypatch.setattr(finetune, "RESIDENT_BYTES", limit)
        images, _ = next(finetune.batches(data, protocol, seed=0, execution=CPU))
        assert len(images) == 12
        assert set(images[:, 0, 0, 2].tolist()) == set(range(5))


def test_crops_are_windows_of_the_picture_and_half_are_mirrored():
    x = torch.arange(20, dtype=torch.uint8)
    picture = torch.stack([x.expand(20, 20), x[:, None].expand(20, 20), torch.zeros(20, 20, dtype=torch.uint8)], -1)
    protocol = FineTune(resolution=16, crop="random", flip=True)
    picked = torch.zeros(2000, dtype=torch.int64)
    crops = finetune.crop_and_flip(picture[None], picked, protocol, torch.Generator().manual_seed(0)).int()
    steps = crops[:, 0, 1:, 0] - crops[:, 0, :-1, 0]
    assert ((steps == 1).all(1) | (steps == -1).all(1)).all()
    assert 0.45 < (steps[:, 0] == -1).float().mean() < 0.55
    assert torch.equal(crops[:, 1:, 0, 1] - crops[:, :-1, 0, 1], torch.ones(2000, 15, dtype=torch.int32))
    corners = torch.stack([crops[:, 0, :, 0].amin(1), crops[:, 0, 0, 1]], 1)
    assert len(torch.unique(corners, dim=0)) == 25  # every corner from 0 to 4, both ways
    still = finetune.crop_and_flip(picture[None], picked, dataclasses.replace(protocol, flip=False), torch.Generator())
    assert (still[:, 0, 1:, 0].int() - still[:, 0, :-1, 0].int() == 1).all()


def test_higher_resolution_resizes_images_and_positions(model, train):
    tuned = tune(model, train, dataclasses.replace(PROTOCOL, resolution=24, crop="random", flip=True, steps=2))
    assert tuned.model.config["image_size"] == 24
    assert tuned.model.pos_embed.shape[1] == 1 + 6 * 6
    found = predict(tuned.model, train, resolution=24)
    assert len(found.keys) == 60


def test_parts_train_and_score_only_their_examples(model, train):
    rest, dev = (
        dataclasses.replace(train, split=dataclasses.replace(train.split, part=part))
        for part in ((0.3, 1.0), (0.0, 0.3))
    )
    tuned = tune(model, rest)
    scored = predict(tuned.model, dev).keys
    images, _ = next(finetune.batches(rest, dataclasses.replace(PROTOCOL, batch_size=200), seed=0, execution=CPU))
    seen = {bytes(image.numpy()) for image in images}
    assert 5 < len(scored) < 40
    assert len(scored) + len(seen) == 60


def test_multilabel_and_unlabelled_test_images(tmp_path, model):
    rows = [
        (f"k{i}", np.zeros((16, 48), np.uint8), labels, 16, 16) for i, labels in enumerate([[0, 2], [], [1], [0, 1, 2]])
    ]
    image = {"height": SIZE, "width": SIZE, "patch_size": 4, "channels": 3}
    uri = str(tmp_path / "multi")
    write_dataset(uri, rows, classes=["a", "b", "c"], encoding="patches", image=image, multilabel=True)
    model.replace_head(3)
    with torch.no_grad():
        model.head.bias[1] = 1.0
    found = predict(model, Examples(open_dataset(uri), Split(uri=uri)))
    assert found.labelled().tolist() == [True, False, True, True]
    assert found.accuracy() == pytest.approx(200 / 3)
    assert found.accuracy(without=frozenset({"k0"})) == 100
    assert math.isnan(found.accuracy(without=frozenset({"k0", "k2", "k3"})))


def test_outputs_that_are_not_finite_are_no_predictions(model, train):
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.fill_(1e38)
    with pytest.raises(finetune.Diverged, match="the outputs for 60 of 60 images are not finite"):
        predict(model.eval(), train)
    wanted = features.feature_set(train.split, train.dataset, "checkpoint", Probe(resolution=SIZE, resize=SIZE))
    with pytest.raises(UserError, match="the features of 60 of 60 images are not finite"):
        features.compute_features(model, wanted, Execution(micro_batch=2))


# ---------------------------------------------------------------- features


def test_concatenated_feature_parts_equal_the_whole(tmp_path, model, train):
    dataset, split = train.dataset, train.split
    model.eval()
    wanted = features.feature_set(split, dataset, "checkpoint", Probe(resolution=SIZE, resize=SIZE))
    whole = features.compute_features(model, wanted, Execution(micro_batch=2))
    folder = str(tmp_path / "features")
    names = [f"part-{i:05d}-of-00004.parquet" for i in range(4)]
    for i, name in enumerate(names):
        features.write_part(
            f"{folder}/{name}", *features.compute_features(model, wanted, Execution(micro_batch=2), part=(i, 4))
        )
    (tmp_path / "features" / features.INDEX).write_text(f'{{"parts": {names}}}'.replace("'", '"'))
    keys, labels, values = features.load_features(folder)
    assert keys == whole[0] == [f"0-{i}" for i in range(60)]
    assert np.array_equal(labels, whole[1])
    assert np.allclose(values.numpy(), whole[2], atol=1e-6)
    expected = model.features(torch.from_numpy(dataset.read([5])[0]["image"])[None])  # after the tanh: 'pre_logits'
    assert torch.allclose(values[5], expected[0], atol=1e-5)

    part = tmp_path / "features" / names[2]
    data = bytearray(part.read_bytes())
    data[data.index(values[40].numpy().tobytes())] ^= 1  # one bit of one feature
    part.write_bytes(data)
    with pytest.raises(UserError, match=f"{names[2]}: missing or damaged"):
        features.load_features(folder)
    assert sorted(p.name for p in part.parent.iterdir()) == [name for name in names if name != part.name]


def test_feature_sets_differ_with_everything_that_changes_them(train):
    dataset, split = train.dataset, train.split
    probe = Probe(resolution=SIZE, resize=SIZE)
    variants = [
        features.feature_set(split, dataset, "a", probe),
        features.feature_set(split, dataset, "b", probe),
        features.feature_set(split, dataset, "a", dataclasses.replace(probe, resize=20)),
        features.feature_set(split, dataset, "a", dataclasses.replace(probe, resolution=20)),
        features.feature_set(dataclasses.replace(split, part=(0.0, 0.5)), dataset, "a", probe),
    ]
    assert len({variant.name for variant in variants}) == 5
    assert features.feature_set(split, dataset, "a", Probe(kind="knn", resolution=SIZE, resize=SIZE)) == variants[0]
