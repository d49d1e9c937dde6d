"""Images of the model's input: the first batch of the loader, attention on validation images, and sheets."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models import create_model
from pipeline.data import open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.pictures import sheet
from pipeline.training import samples
from pipeline.training.config import ModelConfig
from pipeline.training.engine import Worker
from pipeline.training.loop import open_loader
from pipeline.training.plan import make_plan
from tests.images import encoded, photo
from tests.runs import pretrain_config

CLASSES = ["$a$ cat", "a\ndog", "fox"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("samples") / "set")
    rows = ((f"{i:02d}", encoded(photo(48, 48, i), "PNG"), i % 3, 48, 48) for i in range(48))
    write_dataset(root, rows, classes=CLASSES, row_group_bytes=20_000)
    view = Augment(size=32, crop="inception", flip=True)
    model = ModelConfig(variant="Ti/8")
    return pretrain_config(
        data=root, validation=root, model=model, image_size=32, batch_size=16, lanes=4, augment=view, steps="3steps"
    )


def first_batch(config):
    plan = make_plan(config, open_dataset(config.runtime.data), 1)
    loader = open_loader(
        plan, open_dataset(config.runtime.data), 0, Worker(rank=0, world=1, device=torch.device("cpu"))
    )
    try:
        return next(iter(loader)), plan
    finally:
        loader.close()


class Recorded:
    """A run that stores the logged values."""

    def __init__(self):
        self.files = {}

    def log_bytes(self, data, path):
        self.files[path] = Image.open(io.BytesIO(data)).size


def test_the_pictures_are_the_inputs_of_the_model(config):
    batch, _ = first_batch(config)
    whole = np.stack(samples.batch_pictures(batch, config))
    assert (whole == batch["image"].numpy()).all()
    dropping = replace(config, patch_keep_rate=0.5)
    kept = np.stack(samples.batch_pictures(first_batch(dropping)[0], dropping))
    tiles = kept.reshape(16, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(16, 16, -1)
    seen = (tiles != samples.GREY).any(-1)
    assert (seen.sum(1) == 8).all()
    original = whole.reshape(16, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(16, 16, -1)
    assert (tiles[seen] == original[seen]).all()


def test_titles_are_classes_or_the_shares_of_two(config):
    batch, plan = first_batch(config)
    assert samples.batch_titles(batch, plan.classes, 16) == [CLASSES[i] for i in batch["label"]]
    mixed = {"label": torch.tensor([0, -1]), "label_b": torch.tensor([2, 0]), "lam": torch.tensor([0.75, 0.5])}
    assert samples.batch_titles(mixed, CLASSES, 2) == ["75% $a$ cat, 25% fox", "50% no label, 50% $a$ cat"]
    several = {"label": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])}
    assert samples.batch_titles(several, CLASSES, 2) == ["$a$ cat, fox", "none"]


def test_a_run_gets_its_first_batch_and_its_attention(config, monkeypatch):
    batch, plan = first_batch(config)
    run, model = Recorded(), create_model(**plan.model_options)
    monkeypatch.setattr(samples, "open_model", lambda uri: (model, {}))
    samples.log_batch(run, batch, plan)
    samples.log_attention(run, plan, "checkpoint")
    assert set(run.files) == {samples.BATCH, samples.ATTENTION}
    wide, high = run.files[samples.ATTENTION]
    assert wide > 8 * 128
    assert high > 3 * 128


def test_a_picture_that_cannot_be_made_does_not_stop_the_run(config, caplog):
    plan = make_plan(config, open_dataset(config.runtime.data), 1)
    run = Recorded()
    samples.log_batch(run, {"label": torch.zeros(2)}, plan)
    samples.log_attention(run, plan, "nowhere")
    assert run.files == {}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_a_sheet_takes_pictures_of_any_size_and_titles_of_any_length():
    pictures = [photo(8, 8), photo(300, 100), photo(64, 200), np.zeros((5, 5, 1), np.uint8)]
    page = Image.open(io.BytesIO(sheet(pictures, ["猫 $x$", "a" * 300, "", "line\nbreak"], "word " * 90, columns=3)))
    assert page.width >= 3 * 128
    assert page.height > 2 * 128
    assert np.asarray(page).std() > 0
