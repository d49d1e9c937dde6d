"""Configuration of pre-training: `PretrainConfig` decides which numbers are computed, `RuntimeConfig` where and how.

The two are kept apart by type: a run's identity is its `PretrainConfig` without `runtime` (`PretrainConfig.identity`), so a
stopped run may continue with other workers, paths or intervals, and with nothing else. `recipes.py` has the values.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from pipeline import config as configuration
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
    decay_filter: Literal["all", "kernels"] = "all"
    """Which parameters decay: all (the paper) or only matrices (big_vision)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    """Momentum of sgd."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that muon trains."""
    clip: float | None = 1.0
    """Largest global gradient norm; None does not clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the model is placed and computed. Only `precision` is part of a run's identity: the other options change rounding alone,
    and which units dropout drops."""

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
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass instead of keeping them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotConfig:
    """A linear probe on frozen features of a few images per class, at every validation (section 4.1). Off unless `train` is given."""

    train: str | None = None
    """Labelled dataset whose images it learns from."""
    test: str | None = None
    """Dataset that it is scored on, of the same classes; None: the run's `validation`."""
    shots: int = 5
    """Images per class."""
    l2: float = 1024.0
    """Regularisation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how a run is executed. Nothing here changes which numbers are computed: all of it may differ between attempts."""

    data: str = "runs/demo/data/train"
    """Dataset to train on (written by jobs/prepare.py), local or s3://. Its content is part of the identity, its place is not."""
    validation: str | None = None
    """Dataset to validate on; none by default."""
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    output: str = "runs/demo/pretrain"
    """Run folder: checkpoints, config, identity. The same command again continues the run in it."""
    workers: int = 1
    """Training workers (one per GPU)."""
    min_workers: int | None = None
    """Continue with as few workers as this when nodes are lost, and with up to `workers` when they come back. None: always
    `workers`."""
    cpus_per_worker: float = 1
    gpus: bool = False
    """One GPU per worker."""
    threads: int | None = None
    """Decoding threads per worker; None: the CPUs of the worker."""
    cache: str | None = None
    """Local folder for shards read from s3://."""
    max_replaced: int | None = None
    """Stop when one worker has met more than this many images that do not decode and were replaced; None: no limit."""

    log_every: str = "50steps"
    validate_every: str = "1epochs"
    checkpoint_every: str = "1epochs"
    keep_last: int = 3
    """Checkpoints kept, besides the best by validation."""
    wait_warning: float = 0.1
    """Warn when more than this share of the time is spent waiting for data."""

    max_failures: int = 3
    """Restarts in a row, with no new checkpoint between them, before the run gives up."""
    stalled_after: float = 1800.0
    """Seconds without a step after which a worker counts as hung and is restarted; 0 waits for ever."""
    stop_grace: float = 30.0
    """Seconds that a stopped run (Ctrl-C, SIGTERM, ray job stop) gets to finish the step in hand and save it."""
    stop_after_skipped: int = 50
    """Give up after so many consecutive skipped steps: loss spikes, or gradients that are not finite."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in `output`, or start one; never: refuse an output that holds a run; must: refuse one without."""
    name: str | None = None
    """Name of the MLflow run; default: recipe or variant."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""
    register: str | None = "vit"
    """Registered MLflow model whose versions the best and the last checkpoint become at the end; None: register nothing."""
    address: str | None = None
    """Ray cluster to join (auto, host:port); default: the surrounding job's, or an embedded Ray."""
    dry_run: bool = False
    """Check everything, print the plan and every value, start nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One pre-training run. Every field but `runtime` (whose flags have no prefix: --data, --workers) decides the numbers."""

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
    patch_keep_rate: float = 1.0
    """Share of patches kept in training (the rest is dropped at random); validation sees all."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema_decay: float = 0.0
    """Decay per step of the exponential moving average of the weights (Polyak averaging); 0 keeps no average."""
    spike: float | None = None
    """Skip a step whose loss is more than so many times the median of the last `spike_window` losses; None skips none.
    For runs of thousands of steps with large batches, whose loss does not come near zero."""
    spike_window: int = 64
    lanes: int | None = None
    """Independent sample streams. `lanes` must divide the batch, and the number of workers must divide `lanes`. None: chosen
    from the batch."""
    shuffle_window: int = 16_384
    """Images that are mixed at a time, over all workers."""
    init_from: str | None = None
    """Weights to start from: .npz, .safetensors or a checkpoint of ours."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    runtime: Annotated[RuntimeConfig, tyro.conf.arg(name="")] = field(default_factory=RuntimeConfig)

    @property
    def identity(self) -> dict[str, Any]:
        """What two launches of the same run have in common, as plain values."""
        plain = configuration.to_dict(replace(self, engine=EngineConfig(precision=self.engine.precision)))
        return {name: value for name, value in plain.items() if name != "runtime"}
