"""Pre-training: the configuration and the recipes, each one a published result or a run that fits a laptop.

A recipe is a function that returns a `PretrainConfig`; its docstring says where the numbers come from, what it costs and
what to expect. `python jobs/pretrain.py --recipe NAME --data URI --output URI`, any field as a flag over it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from pipeline.data.loading.augment import Augment
from pipeline.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture; `models.create_model` explains each option."""

    variant: str = "B/16"
    """Ti/16 S/32 S/16 B/32 B/16 L/32 L/16 H/14 g/14 G/14, any width with any patch (Ti/4), R50+B/16 ..., R50x1 ..."""
    pool: Literal["token", "gap", "map"] = "token"
    """What the head sees: class token (the paper), mean of tokens, attention pooling."""
    pre_logits: bool = True
    """Hidden tanh layer in the pre-training head (section 3.1); dropped for fine-tuning."""
    posemb: Literal["learn", "sincos2d", "none"] = "learn"
    dropout: float = 0.0
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks linearly less."""
    head_bias: float = 0.0
    """Initial bias of the head; -10 for sigmoid losses over many classes."""
    depth: int | None = None
    """Number of blocks, when it is not the variant's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The paper trains with Adam (b1 0.9, b2 0.999) and decoupled weight decay on every parameter (section 4.1, table 3)."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw; sgd with momentum (weight decay is then an L2 penalty); or muon for the matrices of the blocks and adamw for
    the rest. Muon is not clipped, and the gradient norm it logs is that of its update."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled, multiplied by the learning rate."""
    decay: Literal["all", "kernels"] = "all"
    """Which parameters decay: all (the paper) or only matrices (big_vision)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    """Of sgd."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that muon trains."""
    clip: float | None = 1.0
    """Largest global gradient norm; None does not clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the model is placed and computed; none of it changes the mathematics beyond rounding, and which units dropout drops."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 shards optimiser states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of parameters and activations; optimiser states stay float32."""
    micro_batch: int | None = None
    """Images per worker and forward pass; the rest of a worker's share is accumulated. None: all at once."""
    offload: bool = False
    """Keep optimiser states in host memory."""
    compile: bool = False
    """torch.compile of every transformer block."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotConfig:
    """A linear probe on frozen features of a few images per class, at every validation (section 4.1). Off without `train`."""

    train: str | None = None
    """Labelled dataset whose images it learns from."""
    test: str | None = None
    """Dataset that it is scored on, of the same classes; None: the run's `validation`."""
    shots: int = 5
    """Images per class."""
    l2: float = 1024.0
    """Regularisation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    data: str = "runs/demo/data/train"
    """Dataset to train on (written by jobs/prepare.py), local or s3://."""
    validation: str | None = None
    """Dataset to validate on; none by default."""
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    output: str = "runs/demo/pretrain"
    """Run folder: checkpoints, config, identity. The same command again continues the run in it."""
    steps: str = "90epochs"
    """Length of the run: steps, epochs or examples."""
    batch_size: int = 4096
    """Global batch, whatever the number of workers."""
    image_size: int = 224
    validation_resize: int | None = None
    """Shorter side before the centre crop of validation images; None: 8/7 of image_size (256 for 224)."""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: Literal["softmax", "sigmoid", "masked"] = "softmax"
    """softmax; sigmoid summed over classes (multi-label, JFT and ImageNet-21k); masked patch prediction (section 4.6)."""
    target: Literal["mean", "downsized", "full"] = "mean"
    """What masked patch prediction predicts: the 3-bit mean colour (512 classes), a 4x4 version of the patch in such
    colours, or all its pixels by regression (appendix B.1.2)."""
    label_smoothing: float = 0.0
    augment: Augment = field(default_factory=Augment)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: float = 0.0
    """Decay per step of the Polyak average of the weights; 0 keeps none."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    init_from: str | None = None
    """Weights to start from: .npz, .safetensors or a checkpoint of ours."""

    workers: int = 1
    """Training workers (one per GPU)."""
    min_workers: int | None = None
    """Go on with as few as these when nodes are lost, and with up to `workers` when they come back. None: always `workers`."""
    cpus_per_worker: float = 1
    gpus: bool = False
    """One GPU per worker."""
    max_failures: int = 3
    """Restarts in a row, with no new checkpoint between them, before the run gives up."""
    stalled_after: float = 1800.0
    """Seconds without a step after which a worker is taken for hung and started again; 0 waits for ever."""
    lanes: int | None = None
    """Independent sample streams; must divide the batch, the number of workers must divide it. None: chosen from the batch."""
    shuffle_window: int = 16_384
    """Images that are mixed at a time, over all workers."""
    keep_tokens: float = 1.0
    """Share of patches kept in training (the rest is dropped at random); validation sees all."""
    threads: int | None = None
    """Decoding threads per worker; None: the CPUs of the worker."""
    cache: str | None = None
    """Local folder for shards read from s3://."""

    log_every: str = "50steps"
    validate_every: str = "1epochs"
    checkpoint_every: str = "1epochs"
    keep: int = 3
    """Checkpoints kept, besides the best by validation."""
    spike: float | None = None
    """Do not take a step whose loss is more than so many times the median of the last `spike_window`; None takes all.
    For runs of thousands of steps with large batches, whose loss does not come near zero."""
    spike_window: int = 64
    stop_after_skipped: int = 50
    """Give up after so many consecutive steps that were not taken: spikes, or gradients that are not finite."""
    wait_warning: float = 0.1
    """Warn when more than this share of the time goes into waiting for data."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in `output`, or start one; never: refuse an output that holds a run; must: refuse one that does not."""
    name: str | None = None
    """Name of the MLflow run; default: recipe or variant."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""
    register: str | None = "vit"
    """Registered MLflow model whose versions the best and the last checkpoint become at the end; None: register nothing."""
    address: str | None = None
    """Ray cluster to join (auto, host:port); default: the surrounding job's, or an embedded Ray."""
    dry_run: bool = False
    """Resolve everything, print the plan, start nothing."""


# Fields that say how or where a run is executed, not what it computes: they may change between attempts.
OPERATIONAL = frozenset(
    [
        "data",
        "validation",
        "fewshot",
        "output",
        "workers",
        "min_workers",
        "cpus_per_worker",
        "gpus",
        "max_failures",
        "stalled_after",
        "threads",
        "cache",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "keep",
        "stop_after_skipped",
        "wait_warning",
        "resume",
        "name",
        "tracking_uri",
        "register",
        "address",
        "dry_run",
    ]
)


def demo() -> PretrainConfig:
    """Handwritten digits at 32 px on two CPU workers, about two minutes.

    Source: scikit-learn's 1,797 digits; three blocks of Ti/8.
    Command: `python jobs/pretrain.py` after `python jobs/prepare.py`.
    Hardware: two cores.
    Cost: 3.9 teraFLOPs, two minutes.
    Result: top-1 of 98% on the held-out fifth.
    """
    return PretrainConfig(
        data="runs/demo/data/train",
        validation="runs/demo/data/test",
        output="runs/demo/pretrain",
        steps="24epochs",
        batch_size=64,
        image_size=32,
        model=ModelConfig(variant="Ti/8", depth=3, pool="gap", posemb="sincos2d", pre_logits=False),
        validation_resize=32,
        augment=Augment(size=32, area=(0.9, 1.0), aspect=(0.9, 1.1), flip=False),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(kind="cosine", warmup="10%"),
        engine=EngineConfig(zero=1, precision="fp32"),
        workers=2,
        log_every="20steps",
        validate_every="10epochs",
        checkpoint_every="5epochs",
    )


def _paper(variant: str, lr: float, epochs: int, corpus: str, **changes: Any) -> PretrainConfig:
    """What all lines of Table 3 share: batch 4096, 10,000 warm-up steps, 224 px, Adam (0.9, 0.999), inception crop, flip."""
    base = PretrainConfig(
        data=f"data/{corpus}/train",
        steps=f"{epochs}epochs",
        model=ModelConfig(variant=variant),
        optimizer=OptimizerConfig(lr=lr),
        engine=EngineConfig(precision="bf16", compile=True),
        workers=8,
        cpus_per_worker=8,
        gpus=True,
        lanes=256,
        spike=3.0,
        checkpoint_every="2000steps",
        validate_every="5000steps",
    )
    return replace(base, **changes)


def _jft(variant: str, epochs: int, lr: float) -> PretrainConfig:
    """JFT-300M: 303M images, 18,291 classes, several per image; sigmoid loss, head bias -10, linear decay to 1e-5.

    The paper states clipping for ImageNet alone; the published configuration of L/32 on JFT clips at 1, too.
    """
    return _paper(
        variant,
        lr,
        epochs,
        "jft300m",
        output=f"runs/jft300m-{_slug(variant)}-{epochs}ep",
        loss="sigmoid",
        model=ModelConfig(variant=variant, head_bias=-10.0, **_head(variant)),
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.1, clip=1.0),
        schedule=ScheduleConfig(kind="linear", warmup="10000steps", end=1e-5),
    )


def _imagenet21k(variant: str, epochs: int) -> PretrainConfig:
    """ImageNet-21k: 14M images, 21,843 classes; smoothed sigmoid targets 1e-4, dropout 0.1, weight decay 0.03."""
    return _paper(
        variant,
        1e-3,
        epochs,
        "imagenet21k",
        output=f"runs/imagenet21k-{_slug(variant)}-{epochs}ep",
        loss="sigmoid",
        label_smoothing=1e-4,
        model=ModelConfig(variant=variant, head_bias=-10.0, dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.03),
        schedule=ScheduleConfig(kind="linear", warmup="10000steps", end=1e-5),
    )


def _imagenet(variant: str) -> PretrainConfig:
    """ImageNet-1k: 1.28M images; softmax, cosine, dropout 0.1, weight decay 0.3, 300 epochs."""
    return _paper(
        variant,
        3e-3,
        300,
        "imagenet",
        output=f"runs/imagenet-{_slug(variant)}",
        model=ModelConfig(variant=variant, dropout=0.1),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.3, clip=1.0),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps"),
    )


def _augreg(variant: str, level: str, corpus: str) -> PretrainConfig:
    """big_vision's AugReg recipes: sigmoid loss, kernels-only decay, RandAugment and mixup by level; on ImageNet-1k class
    token and head bias -6.9, on ImageNet-21k mean of tokens, no tanh layer and head bias -10."""
    layers, magnitude, mixup = AUGREG[level]
    small = corpus == "imagenet"
    return _paper(
        variant,
        1e-3,
        300,
        corpus,
        output=f"runs/augreg-{corpus}-{_slug(variant)}",
        loss="sigmoid",
        model=ModelConfig(
            variant=variant,
            pool="token" if small else "gap",
            pre_logits=small,
            head_bias=-6.9 if small else -10.0,
        ),
        augment=Augment(randaug_layers=layers, randaug_magnitude=magnitude, mixup=mixup),
        # big_vision multiplies its decay of 1e-4 by the schedule and not by the rate: 1e-4 / 1e-3 in our convention
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, decay="kernels"),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps"),
    )


def s16_imagenet_90ep() -> PretrainConfig:
    """ "Better plain ViT": S/16, ImageNet-1k, 90 epochs, GAP, sin-cos positions, RandAugment, mixup.

    Source: arXiv 2205.01580, big_vision configs/vit_s16_i1k.py.
    Command: `python jobs/pretrain.py --recipe s16_imagenet_90ep --data URI --validation URI --output URI`, on JPEG shards
    of the first 99% of ImageNet's train set; `--steps 300epochs` for the longer run.
    Hardware: 8 GPUs; any number that divides the 64 lanes.
    Cost: 3.16 exaFLOPs, 2.2 H100-hours at 40% MFU; the source took 6 to 7 hours of a TPUv3-8.
    Result: 76.5% top-1 on ImageNet, as reported.
    """
    return _paper(
        "S/16",
        1e-3,
        90,
        "imagenet",
        output="runs/imagenet-s16-90ep",
        batch_size=1024,
        lanes=64,
        model=ModelConfig(variant="S/16", pool="gap", posemb="sincos2d"),
        augment=Augment(randaug_layers=2, randaug_magnitude=10, mixup=0.2),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, decay="kernels"),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps"),
    )


def masked_jft() -> PretrainConfig:
    """Masked patch prediction: B/16, 1M steps of 4096, Adam 2e-4, cosine; half of the embeddings corrupted, no labels.

    Source: arXiv 2010.11929, section 4.6 and appendix B.1.2 (512-way mean colour; `--target` has the other two).
    Command: `python jobs/pretrain.py --recipe masked_jft --data URI --output URI`; `--steps 100000steps` for most of the gain.
    Hardware: 8 GPUs; any number that divides the 256 lanes.
    Cost: 432 exaFLOPs, 303 H100-hours at 40% MFU.
    Result: 79.9% on ImageNet after fine-tuning, 2 points above training from scratch, as reported.
    """
    return _paper(
        "B/16",
        2e-4,
        1,
        "jft300m",
        output="runs/masked-jft-b16",
        steps="1000000steps",
        loss="masked",
        model=ModelConfig(variant="B/16", pre_logits=False),
        optimizer=OptimizerConfig(lr=2e-4, weight_decay=0.1),
        schedule=ScheduleConfig(kind="cosine", warmup="10000steps"),
    )


def masked_demo() -> PretrainConfig:
    """Masked patch prediction on the demo's digits at 32 px, two CPU workers, about two minutes.

    Source: arXiv 2010.11929, section 4.6, on the demo's model and data; `--target downsized` and `--target full` are the
    paper's other two targets.
    Command: `python jobs/pretrain.py --recipe masked_demo` after `python jobs/prepare.py`; then its encoder to
    `python jobs/transfer.py --suite demo --data runs/demo/data --checkpoint runs/demo/masked`.
    Hardware: two cores.
    Cost: 4 teraFLOPs, two minutes.
    Result: loss from 6.9 to 1.1; a linear probe on its features, which have seen no label, has 91% top-1.
    """
    return replace(
        demo(),
        output="runs/demo/masked",
        loss="masked",
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05),
    )


def cifar10() -> PretrainConfig:
    """CIFAR-10 at 32 px from scratch on a laptop: Ti/4, half of the patches dropped in training, two CPU workers.

    Source: this project's choice; CIFAR-10 as one JPEG an image in class folders train/ and test/.
    Command: `python jobs/pretrain.py --recipe cifar10` after
    `python jobs/prepare.py --source cifar10-images/train --size 32 --output runs/cifar10/data/train`, and the same for test.
    Hardware: two cores.
    Cost: 1.3 petaFLOPs, 83 minutes of two cores that compute bfloat16.
    Result: 65.1% top-1 on the 10,000 test images; the README has the curve.
    """
    return replace(
        demo(),
        data="runs/cifar10/data/train",
        validation="runs/cifar10/data/test",
        output="runs/cifar10/pretrain",
        steps="24epochs",
        batch_size=128,
        validation_resize=32,
        model=ModelConfig(variant="Ti/4", pool="gap", posemb="sincos2d", pre_logits=False),
        augment=Augment(size=32, area=(0.5, 1.0)),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.05, decay="kernels", betas=(0.9, 0.99)),
        engine=EngineConfig(zero=1, precision="bf16"),
        keep_tokens=0.5,
        log_every="50steps",
        validate_every="1epochs",
        checkpoint_every="1epochs",
    )


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

# Table 3 of the paper with its Tables 5 and 6: variant, epochs, learning rate, exaFLOPs of pre-training, and top-1 on
# ImageNet after fine-tuning at 384 px. The exaFLOPs of JFT are the paper's, the others counted by models.variants.flops.
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
] = [  # the paper gives one number a model and does not say after which of its two horizons
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


def _head(variant: str) -> dict[str, Any]:
    """ResNets have no tanh layer below the head."""
    return {"pre_logits": False} if re.fullmatch(r"R\d+x\d+", variant) else {}


def _documented(
    recipe: partial[PretrainConfig], name: str, headline: str, source: str, exaflops: float, result: str
) -> Callable[[], PretrainConfig]:
    hours = exaflops * 1e18 / (0.4 * 989.5e12) / 3600
    recipe.__doc__ = f"""{headline}

    Source: {source}.
    Command: `python jobs/pretrain.py --recipe {name} --data URI --output URI`, on JPEG shards.
    Hardware: 8 GPUs; any number that divides the 256 lanes.
    Cost: {exaflops:g} exaFLOPs, {hours:,.{0 if hours > 10 else 1}f} H100-hours at 40% MFU.
    Result: {result}.
    """
    return recipe


def _table() -> Iterator[tuple[str, Callable[[], PretrainConfig]]]:
    """The recipes that are lines of published tables."""
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
    for suffix, corpus, file, rows in (
        ("augreg", "imagenet", "vit_i1k.py", AUGREG_IMAGENET),
        ("augreg21k", "imagenet21k", "vit_i21k.py", AUGREG_IMAGENET21K),
    ):
        for variant, level, cost in rows:
            recipe, name = partial(_augreg, variant, level, corpus), f"{_slug(variant)}_{suffix}"
            headline = f"AugReg (arXiv 2106.10270): {variant}, {corpus}, 300 epochs, level {level}."
            source = f"arXiv 2106.10270, figure 4; big_vision configs/{file}"
            result = "plotted in the source, not printed; index.csv of gs://vit_models/augreg lists its checkpoints"
            yield name, _documented(recipe, name, headline, source, cost, result)


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "cifar10": cifar10,
    "masked_demo": masked_demo,
    "s16_imagenet_90ep": s16_imagenet_90ep,
    "masked_jft": masked_jft,
    **dict(_table()),
}
