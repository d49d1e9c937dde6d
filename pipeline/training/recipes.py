"""Pre-training recipes: published configurations, and runs for a laptop.

A recipe is a function that returns a `PretrainConfig`; its docstring gives the source, the cost and the expected
result. `python jobs/pretrain.py --recipe NAME --data URI --output URI` runs a recipe, flags override its values, and
`--dry-run` prints all values, including derived ones. The rows of table 3 of the paper and of AugReg share one function
each; tables contain the differences between rows."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from pipeline.data.loading.augment import Augment
from pipeline.training.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig, RuntimeConfig
from pipeline.training.schedule import ScheduleConfig

# ---------------------------------------------------------------- on a laptop


def demo() -> PretrainConfig:
    """Printed letters at 32 px on two CPU workers, about two minutes.

    Source: letters in 21 fonts of matplotlib, 41 classes; three blocks of Ti/8. Crops of at least half of the area give
    features that transfer (`jobs/transfer.py --suite demo`: handwritten digits, which are not in the training data).
    Command: `python jobs/pretrain.py` after `python jobs/prepare.py`.
    Hardware: two cores.
    Cost: 3 teraFLOPs, two minutes.
    Result: 69% top-1 on the held-out fifth of the images.
    """
    return PretrainConfig(
        steps="40epochs",
        batch_size=64,
        image_size=32,
        validation_resize=32,
        loss="softmax",
        model=ModelConfig(variant="Ti/8", depth=3, pool="gap", posemb="sincos2d", pre_logits=False),
        augment=Augment(size=32, area=(0.5, 1.0), flip=False),
        optimizer=OptimizerConfig(
            name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99), decay_filter="all", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10%", end=0.0),
        engine=EngineConfig(zero=1, precision="fp32"),
        runtime=_two_cores(
            "runs/demo/data", "runs/demo/pretrain", validate_every="10epochs", checkpoint_every="5epochs"
        ),
    )


def masked_demo() -> PretrainConfig:
    """Masked patch prediction on the demo's letters at 32 px, two CPU workers, about two minutes.

    Source: arXiv 2010.11929, section 4.6, with the model and data of the demo; `--target downsized` and `--target
    full` are the other two targets of the paper.
    Command: `python jobs/pretrain.py --recipe masked_demo` after `python jobs/prepare.py`; then evaluate the
    encoder on digits, after `python jobs/prepare.py --recipe demo_digits`, with `python jobs/transfer.py --suite
    demo --checkpoint runs/demo/masked`.
    Hardware: two cores.
    Cost: 4 teraFLOPs, two minutes.
    Result: not measured on letters; trained on the digits themselves, the loss went from 6.9 to 1.1, and a linear
    probe on the features had 91% top-1.
    """
    return PretrainConfig(
        steps="24epochs",
        batch_size=64,
        image_size=32,
        validation_resize=32,
        loss="masked",
        target="mean",
        model=ModelConfig(variant="Ti/8", depth=3, pool="gap", posemb="sincos2d", pre_logits=False),
        augment=Augment(size=32, area=(0.9, 1.0), aspect=(0.9, 1.1), flip=False),
        optimizer=OptimizerConfig(
            name="adamw", lr=2e-3, weight_decay=0.05, betas=(0.9, 0.999), decay_filter="all", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10%", end=0.0),
        engine=EngineConfig(zero=1, precision="fp32"),
        runtime=_two_cores("runs/demo/data", "runs/demo/masked", validate_every="10epochs", checkpoint_every="5epochs"),
    )


def cifar10() -> PretrainConfig:
    """CIFAR-10 at 32 px from scratch on a laptop: Ti/4, half of the patches dropped in training, two CPU workers.

    Source: this project; CIFAR-10 as JPEG files in class folders train/ and test/.
    Command: `python jobs/pretrain.py --recipe cifar10` after `python jobs/prepare.py --source cifar10-images/train
    --size 32 --output runs/cifar10/data/train`, and the same for test.
    Hardware: two cores.
    Cost: 1.3 petaFLOPs, 83 minutes on two cores with bfloat16 support.
    Result: 65.1% top-1 on the 10,000 test images; docs/benchmarks.md has the curve.
    """
    return PretrainConfig(
        steps="24epochs",
        batch_size=128,
        image_size=32,
        validation_resize=32,
        loss="softmax",
        model=ModelConfig(variant="Ti/4", pool="gap", posemb="sincos2d", pre_logits=False),
        augment=Augment(size=32, area=(0.5, 1.0), flip=True),
        patch_keep_rate=0.5,
        optimizer=OptimizerConfig(
            name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99), decay_filter="kernels", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10%", end=0.0),
        engine=EngineConfig(zero=1, precision="bf16"),
        runtime=_two_cores("runs/cifar10/data", "runs/cifar10/pretrain", log_every="50steps"),
    )


def _two_cores(
    data: str,
    output: str,
    *,
    log_every: str = "20steps",
    validate_every: str = "1epochs",
    checkpoint_every: str = "1epochs",
) -> RuntimeConfig:
    return RuntimeConfig(
        data=f"{data}/train",
        validation=f"{data}/test",
        output=output,
        workers=2,
        log_every=log_every,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
    )


# ---------------------------------------------------------------- published


def s16_imagenet_90ep() -> PretrainConfig:
    """ "Better plain ViT": S/16, ImageNet-1k, 90 epochs, GAP, sin-cos positions, RandAugment, mixup.

    Source: arXiv 2205.01580, big_vision configs/vit_s16_i1k.py.
    Command: `python jobs/pretrain.py --recipe s16_imagenet_90ep --data URI --validation URI --output URI`, on JPEG
    shards of the first 99% of ImageNet's train set; `--steps 300epochs` for the longer run.
    Hardware: 2 GPUs with 512 images each; any number that divides the 64 lanes. With 8, the host takes longer to launch
    a step of 128 images than the GPU to compute it: `--engine.compile-scope model --engine.compile-mode
    reduce-overhead` records CUDA graphs and was 3.6 times as fast on an H100.
    Cost: 3.16 exaFLOPs; the source took 6 to 7 hours of a TPUv3-8. `jobs/plan.py --recipe s16_imagenet_90ep` estimates
    hours and dollars.
    Result: 76.5% top-1 on ImageNet, as reported.
    """
    return PretrainConfig(
        steps="90epochs",
        batch_size=1024,
        image_size=224,
        loss="softmax",
        model=ModelConfig(variant="S/16", pool="gap", posemb="sincos2d", pre_logits=True),
        augment=Augment(size=224, randaug_layers=2, randaug_magnitude=10, mixup=0.2),
        # big_vision multiplies weight decay 1e-4 by the schedule, not by the learning rate: 1e-4 / 1e-3 in our
        # convention
        optimizer=OptimizerConfig(
            name="adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), decay_filter="kernels", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps", end=0.0),
        spike=3.0,
        lanes=64,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=replace(_eight_gpus("imagenet", "runs/imagenet-s16-90ep"), workers=2, cpus_per_worker=14),
    )


def masked_jft() -> PretrainConfig:
    """Masked patch prediction: B/16, 1M steps of 4096, Adam 2e-4, cosine; half of the embeddings corrupted, no labels.

    Source: arXiv 2010.11929, section 4.6 and appendix B.1.2 (512-way mean colour; `--target` has the other two).
    Command: `python jobs/pretrain.py --recipe masked_jft --data URI --output URI`; `--steps 100000steps` for most
    of the gain.
    Hardware: 8 GPUs; any number that divides the 256 lanes.
    Cost: 432 exaFLOPs; `jobs/plan.py --recipe masked_jft` estimates hours and dollars.
    Result: 79.9% on ImageNet after fine-tuning, 2 points above training from scratch, as reported.
    """
    return PretrainConfig(
        steps="1000000steps",
        batch_size=4096,
        image_size=224,
        loss="masked",
        target="mean",
        model=ModelConfig(variant="B/16", pool="token", posemb="learn", pre_logits=False),
        augment=Augment(size=224),
        optimizer=OptimizerConfig(
            name="adamw", lr=2e-4, weight_decay=0.1, betas=(0.9, 0.999), decay_filter="all", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps", end=0.0),
        spike=3.0,
        lanes=256,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=_eight_gpus("jft300m", "runs/masked-jft-b16"),
    )


def _jft(variant: str, epochs: int, lr: float) -> PretrainConfig:
    """JFT-300M: 303M images, 18,291 classes, several per image; sigmoid loss, head bias -10, linear decay to 1e-5.

    The paper mentions clipping only for ImageNet; the published configuration of L/32 on JFT also clips at 1.
    """
    is_resnet = re.fullmatch(r"R\d+x\d+", variant) is not None
    return PretrainConfig(
        steps=f"{epochs}epochs",
        batch_size=4096,
        image_size=224,
        loss="sigmoid",
        model=ModelConfig(
            variant=variant, pool="token", posemb="learn", pre_logits=not is_resnet, dropout=0.0, head_bias=-10.0
        ),
        augment=Augment(size=224),
        optimizer=OptimizerConfig(
            name="adamw", lr=lr, weight_decay=0.1, betas=(0.9, 0.999), decay_filter="all", clip=1.0
        ),
        schedule=ScheduleConfig(kind="linear", warmup="10000steps", end=1e-5),
        spike=3.0,
        lanes=256,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=_eight_gpus("jft300m", f"runs/jft300m-{_slug(variant)}-{epochs}ep"),
    )


def _imagenet21k(variant: str, epochs: int) -> PretrainConfig:
    """ImageNet-21k: 14M images, 21,843 classes; smoothed sigmoid targets 1e-4, dropout 0.1, weight decay 0.03."""
    return PretrainConfig(
        steps=f"{epochs}epochs",
        batch_size=4096,
        image_size=224,
        loss="sigmoid",
        label_smoothing=1e-4,
        model=ModelConfig(variant=variant, pool="token", posemb="learn", pre_logits=True, dropout=0.1, head_bias=-10.0),
        augment=Augment(size=224),
        optimizer=OptimizerConfig(
            name="adamw", lr=1e-3, weight_decay=0.03, betas=(0.9, 0.999), decay_filter="all", clip=1.0
        ),
        schedule=ScheduleConfig(kind="linear", warmup="10000steps", end=1e-5),
        spike=3.0,
        lanes=256,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=_eight_gpus("imagenet21k", f"runs/imagenet21k-{_slug(variant)}-{epochs}ep"),
    )


def _imagenet(variant: str) -> PretrainConfig:
    """ImageNet-1k: 1.28M images; softmax, cosine, dropout 0.1, weight decay 0.3, 300 epochs."""
    return PretrainConfig(
        steps="300epochs",
        batch_size=4096,
        image_size=224,
        loss="softmax",
        model=ModelConfig(variant=variant, pool="token", posemb="learn", pre_logits=True, dropout=0.1, head_bias=0.0),
        augment=Augment(size=224),
        optimizer=OptimizerConfig(
            name="adamw", lr=3e-3, weight_decay=0.3, betas=(0.9, 0.999), decay_filter="all", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps", end=0.0),
        spike=3.0,
        lanes=256,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=_eight_gpus("imagenet", f"runs/imagenet-{_slug(variant)}"),
    )


def _augreg_imagenet(variant: str, level: str) -> PretrainConfig:
    """AugReg on ImageNet-1k (big_vision configs/vit_i1k.py): class token, tanh layer, head bias -6.9."""
    layers, magnitude, mixup = AUGREG[level]
    return PretrainConfig(
        steps="300epochs",
        batch_size=4096,
        image_size=224,
        loss="sigmoid",
        model=ModelConfig(variant=variant, pool="token", posemb="learn", pre_logits=True, head_bias=-6.9),
        augment=Augment(size=224, randaug_layers=layers, randaug_magnitude=magnitude, mixup=mixup),
        # big_vision multiplies weight decay 1e-4 by the schedule, not by the learning rate: 1e-4 / 1e-3 in our
        # convention
        optimizer=OptimizerConfig(
            name="adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), decay_filter="kernels", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps", end=0.0),
        spike=3.0,
        lanes=256,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=_eight_gpus("imagenet", f"runs/augreg-imagenet-{_slug(variant)}"),
    )


def _augreg_imagenet21k(variant: str, level: str) -> PretrainConfig:
    """AugReg on ImageNet-21k (big_vision configs/vit_i21k.py): mean of tokens, no tanh layer, head bias -10."""
    layers, magnitude, mixup = AUGREG[level]
    return PretrainConfig(
        steps="300epochs",
        batch_size=4096,
        image_size=224,
        loss="sigmoid",
        model=ModelConfig(variant=variant, pool="gap", posemb="learn", pre_logits=False, head_bias=-10.0),
        augment=Augment(size=224, randaug_layers=layers, randaug_magnitude=magnitude, mixup=mixup),
        # big_vision multiplies weight decay 1e-4 by the schedule, not by the learning rate: 1e-4 / 1e-3 in our
        # convention
        optimizer=OptimizerConfig(
            name="adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), decay_filter="kernels", clip=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps", end=0.0),
        spike=3.0,
        lanes=256,
        engine=EngineConfig(zero=1, precision="bf16", compile=True),
        runtime=_eight_gpus("imagenet21k", f"runs/augreg-imagenet21k-{_slug(variant)}"),
    )


def _eight_gpus(corpus: str, output: str) -> RuntimeConfig:
    return RuntimeConfig(
        data=f"data/{corpus}/train",
        output=output,
        workers=8,
        cpus_per_worker=8,
        gpus=True,
        validate_every="5000steps",
        checkpoint_every="2000steps",
    )


# ---------------------------------------------------------------- table rows

# big_vision's AugReg levels: RandAugment layers, magnitude, mixup.
AUGREG = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}

# Tables 3, 5 and 6 of the paper: variant, epochs, learning rate, exaFLOPs of pre-training, and top-1 on ImageNet after
# fine-tuning at 384 px. The exaFLOPs of JFT are from the paper, the others from models.variants.flops.
JFT: list[tuple[str, int, float, float, float]] = [
    ("B/32", 7, 8e-4, 55, 80.73),
    ("B/16", 7, 8e-4, 224, 84.15),
    ("L/32", 7, 6e-4, 196, 84.37),
    ("L/16", 7, 4e-4, 783, 86.30),
    ("L/16", 14, 4e-4, 1567, 87.12),
    ("H/14", 14, 3e-4, 4262, 88.08),
    ("R50x1", 7, 1e-3, 50, 77.54),
    ("R50x2", 7, 1e-3, 199, 82.12),
    ("R101x1", 7, 8e-4, 96, 80.67),
    ("R152x1", 7, 6e-4, 141, 81.88),
    ("R152x2", 7, 6e-4, 563, 84.97),
    ("R50+B/32", 7, 8e-4, 106, 84.90),
    ("R50+B/16", 7, 8e-4, 274, 85.58),
    ("R50+L/32", 7, 2e-4, 246, 85.68),
    ("R50+L/16", 7, 4e-4, 859, 86.60),
    ("R50+L/16", 14, 4e-4, 1668, 87.12),
]
IMAGENET21K: list[
    tuple[str, int, float, float]
] = [  # the paper gives one number per model, without saying for which of the two lengths
    ("B/32", 90, 33.5, 81.28),
    ("B/16", 90, 133, 83.97),
    ("L/32", 30, 38.8, 80.99),
    ("L/32", 90, 116, 80.99),
    ("L/16", 30, 155, 85.15),
    ("L/16", 90, 466, 85.15),
]
IMAGENET: list[tuple[str, float, float]] = [
    ("B/32", 10.2, 73.38),
    ("B/16", 40.5, 77.91),
    ("L/32", 35.5, 71.16),
    ("L/16", 142, 76.53),
]

# AugReg (arXiv 2106.10270), 300 epochs: variant, level by big_vision's choice, exaFLOPs.
AUGREG_IMAGENET: list[tuple[str, str, float]] = [
    ("Ti/16", "light1", 2.89),
    ("S/32", "medium1", 2.64),
    ("S/16", "medium2", 10.6),
    ("B/32", "medium2", 10.2),
    ("B/16", "medium2", 40.5),
    ("L/16", "medium2", 142),
]
AUGREG_IMAGENET21K: list[tuple[str, str, float]] = [
    ("Ti/16", "none", 31.6),
    ("S/32", "none", 28.9),
    ("S/16", "light1", 116),
    ("B/32", "light2", 111),
    ("B/16", "light2", 443),
    ("L/16", "medium2", 1550),
]


def _slug(variant: str) -> str:
    return variant.lower().replace("/", "").replace("+", "-")


def _documented(
    recipe: partial[PretrainConfig], name: str, headline: str, source: str, exaflops: float, result: str
) -> Callable[[], PretrainConfig]:
    recipe.__doc__ = f"""{headline}

    Source: {source}.
    Command: `python jobs/pretrain.py --recipe {name} --data URI --output URI`, on JPEG shards.
    Hardware: 8 GPUs; any number that divides the 256 lanes.
    Cost: {exaflops:g} exaFLOPs; `jobs/plan.py --recipe {name}` estimates hours and dollars.
    Result: {result}.
    """
    return recipe


def _table() -> Iterator[tuple[str, Callable[[], PretrainConfig]]]:
    """The recipes from published tables."""
    paper, tuned = "arXiv 2010.11929, table 3", "top-1 on ImageNet after fine-tuning at 384 px, as reported"
    for variant, epochs, lr, cost, top1 in JFT:
        recipe, name = partial(_jft, variant, epochs, lr), f"{_slug(variant)}_jft300m_{epochs}ep"
        headline = f"Paper, table 3: {variant}, JFT-300M, {epochs} epochs, lr {lr:g}, linear decay."
        yield name, _documented(recipe, name, headline, f"{paper} and 6", cost, f"{top1:.2f}% {tuned}")
    for variant, epochs, cost, top1 in IMAGENET21K:
        recipe, name = partial(_imagenet21k, variant, epochs), f"{_slug(variant)}_imagenet21k_{epochs}ep"
        headline = f"Paper, table 3: {variant}, ImageNet-21k, {epochs} epochs, lr 1e-3, linear decay."
        yield name, _documented(recipe, name, headline, f"{paper} and 5", cost, f"{top1:.2f}% {tuned}")
    for variant, cost, top1 in IMAGENET:
        recipe, name = partial(_imagenet, variant), f"{_slug(variant)}_imagenet"
        headline = f"Paper, table 3: {variant}, ImageNet-1k, 300 epochs, lr 3e-3, cosine."
        yield name, _documented(recipe, name, headline, f"{paper} and 5", cost, f"{top1:.2f}% {tuned}")
    for suffix, corpus, file, rows, function in (
        ("augreg", "imagenet", "vit_i1k.py", AUGREG_IMAGENET, _augreg_imagenet),
        ("augreg21k", "imagenet21k", "vit_i21k.py", AUGREG_IMAGENET21K, _augreg_imagenet21k),
    ):
        for variant, level, cost in rows:
            recipe, name = partial(function, variant, level), f"{_slug(variant)}_{suffix}"
            headline = f"AugReg (arXiv 2106.10270): {variant}, {corpus}, 300 epochs, level {level}."
            source = f"arXiv 2106.10270, figure 4; big_vision configs/{file}"
            result = "only plotted in the source; index.csv of gs://vit_models/augreg lists its checkpoints"
            yield name, _documented(recipe, name, headline, source, cost, result)


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "cifar10": cifar10,
    "masked_demo": masked_demo,
    "s16_imagenet_90ep": s16_imagenet_90ep,
    "masked_jft": masked_jft,
    **dict(_table()),
}
