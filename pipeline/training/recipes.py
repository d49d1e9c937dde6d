"""Pre-training: the configuration and the recipes, each one a published result or a run that fits a laptop.

A recipe is a function that returns a `PretrainConfig`; its docstring says where the numbers come from, what it costs and
what to expect. `python jobs/pretrain.py --recipe NAME --data URI --output URI`, any field as a flag over it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.data.augment import Augment
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

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum (weight decay is then an L2 penalty)."""
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
    clip: float | None = 1.0
    """Largest global gradient norm; None does not clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the model is placed and computed; none of it changes the mathematics beyond rounding."""

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
class PretrainConfig:
    data: str = "runs/demo/data/train"
    """Dataset to train on (written by jobs/prepare.py), local or s3://."""
    validation: str | None = None
    """Dataset to validate on; none by default."""
    output: str = "runs/demo/pretrain"
    """Run folder: checkpoints, config, identity. The same command again continues the run in it."""
    steps: str = "90epochs"
    """Length of the run: steps, epochs or examples."""
    batch_size: int = 4096
    """Global batch, whatever the number of workers."""
    image_size: int = 224
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: Literal["softmax", "sigmoid", "masked"] = "softmax"
    """softmax; sigmoid summed over classes (multi-label, JFT and ImageNet-21k); masked patch prediction (section 4.6)."""
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
    cpus_per_worker: float = 1
    gpus: bool = False
    """One GPU per worker."""
    max_failures: int = 3
    """Restarts after lost workers before the run gives up."""
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
    stop_after_skipped: int = 50
    """Give up after so many consecutive steps without finite gradients."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in `output`, or start one; never: refuse an output that holds a run; must: refuse one that does not."""
    name: str | None = None
    """Name of the MLflow run; default: recipe or variant."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""
    address: str | None = None
    """Ray cluster to join (auto, host:port); default: the surrounding job's, or an embedded Ray."""
    dry_run: bool = False
    """Resolve everything, print the plan, start nothing."""


# Fields that say how or where a run is executed, not what it computes: they may change between attempts.
OPERATIONAL = frozenset(
    [
        "data",
        "validation",
        "output",
        "workers",
        "cpus_per_worker",
        "gpus",
        "max_failures",
        "threads",
        "cache",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "keep",
        "stop_after_skipped",
        "resume",
        "name",
        "tracking_uri",
        "address",
        "dry_run",
    ]
)


def demo() -> PretrainConfig:
    """Handwritten digits at 32 px on two CPU workers, about two minutes.

    Command: `python jobs/pretrain.py` after `python jobs/prepare.py`. A ViT of 192 width and 4 layers' worth of Ti/4
    learns scikit-learn's 1,797 digits; expect top-1 above 90% on the held-out fifth.
    """
    return PretrainConfig(
        data="runs/demo/data/train",
        validation="runs/demo/data/test",
        output="runs/demo/pretrain",
        steps="30epochs",
        batch_size=64,
        image_size=32,
        model=ModelConfig(variant="Ti/8", depth=4, pool="gap"),
        augment=Augment(size=32, crop="inception", area=(0.6, 1.0), flip=False),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig(kind="cosine", warmup="10%"),
        engine=EngineConfig(zero=1, precision="fp32"),
        workers=2,
        log_every="20steps",
        validate_every="10epochs",
        checkpoint_every="5epochs",
    )


def _jft(variant: str, epochs: int, lr: float) -> PretrainConfig:
    """Table 3, JFT-300M: batch 4096, Adam, linear decay, weight decay 0.1; loss and biases from the reference code."""
    return PretrainConfig(
        steps=f"{epochs}epochs",
        model=ModelConfig(variant=variant, head_bias=-10.0),
        loss="sigmoid",
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.1),
        schedule=ScheduleConfig(kind="linear", warmup="10000steps", end=1e-5),
        engine=EngineConfig(precision="bf16", micro_batch=None, compile=True),
        gpus=True,
        workers=8,
        output=f"runs/jft300m-{variant.replace('/', '-')}",
        checkpoint_every="5000steps",
        validate_every="5000steps",
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {"demo": demo}
