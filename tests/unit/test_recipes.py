"""Every recipe resolves, without data and workers, to the numbers of its source and of its docstring."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest

from models.cost import flops, parameters
from pipeline.config import from_yaml, parse, to_yaml
from pipeline.errors import UserError
from pipeline.graph.fields import with_values
from pipeline.operations.planning.config import PlanConfig
from pipeline.operations.planning.preview import dry_run, stand_in
from pipeline.training.config import PretrainConfig
from pipeline.training.plan import make_plan, model_options
from pipeline.training.recipes import RECIPES
from tests.runs import changed

NOWHERE = UserError("no dataset here")
EPOCHS = {"s16_imagenet_90ep": 90, "demo": 20, "masked_demo": 20, "cifar10": 20}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves_and_its_docstring_says_what_it_takes(name):
    config, text = RECIPES[name](), inspect.getdoc(RECIPES[name])
    assert [line.split(":")[0] for line in re.findall(r"^[A-Z]\w+: .*", text, re.M)] == [
        "Source",
        "Command",
        "Hardware",
        "Cost",
        "Result",
    ]
    assert re.search(rf"--recipe {name}\b", text) or name == "demo"
    plan = make_plan(config, stand_in(config, name, NOWHERE), config.runtime.workers)
    assert plan.steps_per_epoch == plan.samples // plan.lanes // (config.batch_size // plan.lanes)
    assert plan.warmup < plan.total
    assert 0 < plan.checkpoint_every <= plan.total
    assert from_yaml(PretrainConfig, to_yaml(config)) == config
    assert "none yet" in plan.identity["data"]


@pytest.mark.slow  # counts the FLOPs of nineteen models
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe().runtime.gpus])
def test_docstring_states_the_cost(name):
    config, text = RECIPES[name](), inspect.getdoc(RECIPES[name])
    plan = make_plan(config, stand_in(config, name, NOWHERE), config.runtime.workers)
    exaflops = float(re.search(r"Cost: ([\d.]+) exaFLOPs", text)[1])
    # Without heads, which are less than 0.1%. For ResNets, the paper's counts are 4 to 5% too low.
    forward = flops({"variant": config.model.variant, "num_classes": 0, "image_size": config.image_size})
    assert exaflops == pytest.approx(3 * forward * plan.total * config.batch_size / 1e18, rel=0.05)
    assert f"jobs/plan.py --recipe {name}" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_of_every_recipe(name, tmp_path):
    text = dry_run(RECIPES[name](), name, {})
    assert "parameters" in text
    assert "steps of" in text
    assert ("GPU-hours" in text) == RECIPES[name]().runtime.gpus
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["demo", "masked_demo"])
def test_dry_run_prints_the_plan_and_starts_nothing(name, tmp_path):
    text = dry_run(RECIPES[name](), name, {"optimizer.lr": (1e-3, 2e-3)})
    config = RECIPES[name]()
    count = parameters(model_options(config, len(stand_in(config, name, NOWHERE).classes)))
    assert f"{count / 1e6:.1f}M parameters" in text
    assert "GFLOPs per image" in text
    assert " steps of " in text
    assert "no dataset at" in text
    assert "optimizer.lr = 0.002  (recipe: 0.001)" in text
    assert "teraFLOPs: about" in text
    assert not list(tmp_path.iterdir())


def test_dry_run_of_another_config_needs_its_data():
    with pytest.raises(UserError, match="no dataset"):
        dry_run(RECIPES["demo"](), "mine", {})


def test_dry_run_counts_the_data_that_is_there(tmp_path):
    from pipeline.data.format import write_dataset

    rows = ((f"{i}", b"not decoded", i % 2, 9, 9) for i in range(640))
    write_dataset(str(tmp_path / "mine"), rows, classes=["a", "b"])
    config = changed(RECIPES["demo"](), data=str(tmp_path / "mine"), validation=None)
    text = dry_run(config, "demo", {})
    assert "640 images, 2 classes" in text
    assert "no dataset" not in text
    with pytest.raises(UserError, match="--batch-size 10000 is larger"):
        dry_run(dataclasses.replace(config, batch_size=10_000), "demo", {})


def parsed(*flags):
    return parse([*flags], RECIPES, "demo", prog="jobs/pretrain.py", description="")


def test_crop_and_validation_follow_the_image_size():
    larger = parsed("--image-size", "64")
    assert (larger.image_size, larger.augment.size, larger.validation_resize) == (64, 64, 64)
    assert (larger.augment.area, larger.augment.flip) == ((0.5, 1.0), False)
    assert parsed("--recipe", "b16_imagenet", "--image-size", "384").augment.size == 384
    given = parsed("--image-size", "64", "--augment.size", "48", "--validation-resize", "80")
    assert (given.augment.size, given.validation_resize) == (48, 80)
    assert parsed("--image-size", "24").validation_resize == 32  # large enough
    planned = parse(
        ["--training.image-size", "64"],
        {"demo": lambda: PlanConfig(training=RECIPES["demo"]())},
        "demo",
        prog="jobs/plan.py",
        description="",
    )
    assert planned.training.augment.size == 64
    stage = with_values(RECIPES["demo"](), {"image_size": 64}, "stage")
    assert (stage.augment.size, stage.validation_resize) == (64, 64)


@pytest.mark.parametrize("images", [1, 5, 20, 34, 63])
def test_the_batch_that_the_error_of_a_small_dataset_names_works(images, tmp_path):
    """The first data set of a new user often has fewer images than one batch of the demo."""
    from pipeline.data.format import write_dataset

    rows = ((f"{i}", b"not decoded", i % 2, 9, 9) for i in range(images))
    write_dataset(str(tmp_path / "mine"), rows, classes=["a", "b"])
    config = changed(RECIPES["demo"](), data=str(tmp_path / "mine"), validation=None)
    with pytest.raises(
        UserError, match=r"--batch-size 64 is larger .*; give --batch-size \d+( --workers 1)?, or use"
    ) as error:
        dry_run(config, "demo", {})
    batch = int(re.search(r"give --batch-size (\d+)", str(error.value))[1])
    config = changed(config, batch_size=batch, workers=1 if "--workers 1" in str(error.value) else 2)
    assert f" steps of {batch} " in dry_run(config, "demo", {})


def test_the_batch_for_a_recipe_with_lanes_works_too(tmp_path):
    from pipeline.data.format import write_dataset

    rows = ((f"{i}", b"not decoded", i % 2, 9, 9) for i in range(92))
    write_dataset(str(tmp_path / "mine"), rows, classes=["a", "b"])
    config = changed(RECIPES["b16_imagenet"](), data=str(tmp_path / "mine"), validation=None, workers=1)
    with pytest.raises(UserError, match=r"; give --batch-size 64 --lanes 4, or use more images"):
        dry_run(config, "b16_imagenet", {})
    assert " steps of 64 " in dry_run(changed(config, batch_size=64, lanes=4), "b16_imagenet", {})


def test_paper_table_3():
    """B/16, L/16, H/14, a ResNet and a hybrid, line by line: epochs, rate, decay, weight decay, dropout."""
    lines = {
        "b16_jft300m_7ep": ("7epochs", 8e-4, "linear", 0.1, 0.0),
        "l32_jft300m_7ep": ("7epochs", 6e-4, "linear", 0.1, 0.0),
        "l16_jft300m_14ep": ("14epochs", 4e-4, "linear", 0.1, 0.0),
        "h14_jft300m_14ep": ("14epochs", 3e-4, "linear", 0.1, 0.0),
        "r50x1_jft300m_7ep": ("7epochs", 1e-3, "linear", 0.1, 0.0),
        "r101x1_jft300m_7ep": ("7epochs", 8e-4, "linear", 0.1, 0.0),
        "r152x2_jft300m_7ep": ("7epochs", 6e-4, "linear", 0.1, 0.0),
        "r50-b16_jft300m_7ep": ("7epochs", 8e-4, "linear", 0.1, 0.0),
        "r50-l32_jft300m_7ep": ("7epochs", 2e-4, "linear", 0.1, 0.0),
        "r50-l16_jft300m_14ep": ("14epochs", 4e-4, "linear", 0.1, 0.0),
        "b32_imagenet21k_90ep": ("90epochs", 1e-3, "linear", 0.03, 0.1),
        "l16_imagenet21k_30ep": ("30epochs", 1e-3, "linear", 0.03, 0.1),
        "b16_imagenet": ("300epochs", 3e-3, "cosine", 0.3, 0.1),
        "l32_imagenet": ("300epochs", 3e-3, "cosine", 0.3, 0.1),
    }
    for name, line in lines.items():
        config = RECIPES[name]()
        model, optimizer = config.model, config.optimizer
        assert (
            config.steps,
            optimizer.lr,
            config.schedule.kind,
            optimizer.weight_decay,
            model.dropout,
        ) == line, name
        assert (config.batch_size, config.schedule.warmup, config.image_size) == (4096, "10000steps", 224)
        assert (optimizer.name, optimizer.betas, optimizer.decay_filter) == ("adamw", (0.9, 0.999), "all")
        assert (config.loss == "sigmoid") == ("imagenet" not in name or "21k" in name)
        assert model.head_bias == (-10.0 if config.loss == "sigmoid" else 0.0)


def test_augreg_levels():
    strong = RECIPES["b16_augreg"]()
    assert (strong.augment.randaug_layers, strong.augment.randaug_magnitude, strong.augment.mixup) == (2, 15, 0.5)
    assert (strong.loss, strong.model.head_bias, strong.model.pool, strong.optimizer.decay_filter) == (
        "sigmoid",
        -6.9,
        "token",
        "kernels",
    )
    plain = RECIPES["ti16_augreg21k"]()
    assert (plain.augment.randaug_layers, plain.augment.mixup, plain.model.pool) == (0, 0.0, "gap")


def test_dry_run_is_a_command(capsys, tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from jobs.pretrain import main

    assert main(["--recipe", "b16_jft300m_7ep", "--dry-run", "--workers", "64"]) == 0
    printed = capsys.readouterr().out
    assert "303,000,000 images" in printed
    assert "exaFLOPs" in printed
    assert "64 x h100" in printed
    assert "ZeRO-3" in printed
    assert "GPU-hours" in printed
    assert "workers: 64" in printed
    assert not list(tmp_path.iterdir())
