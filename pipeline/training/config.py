"""Configuration of pre-training: `PretrainConfig` decides which numbers are computed, `RuntimeConfig` where and how.

The two are kept apart by type: a run's identity is its `PretrainConfig` without `runtime` (`PretrainConfig.identity`), so a
stopped run may continue with other workers, paths or intervals, and with nothing else. `recipes.py` has the values.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline import config as configuration
from pipeline.data.loading.augment import Augment
from pipeline.training.schedule import ScheduleConfig

try:
    import tyro
except ModuleNotFoundError:  # a machine that only computes (tests/benchmarks/gpu.py) parses no flags
    WITHOUT_PREFIX: Any = None
else:
    WITHOUT_PREFIX = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture; `models.create_model` explains each option."""

    variant: str = "B/16"
    """Ti/16, S/32, S/16, B/32, B/16, L/32, L/16, H/14, g/14, G/14; any width with any patch size in pixels (Ti/4);
    hybrids (R50+B/16); ResNets (R50x1)."""
    pool: Literal["token", "gap", "map"] = "token"
    """What the head reads: the class token (as in the paper), the mean of all tokens, or attention pooling."""
    pre_logits: bool = True
    """Hidden tanh layer in the pre-training head (section 3.1 of the paper). Fine-tuning drops it."""
    posemb: Literal["learn", "sincos2d", "none"] = "learn"
    """Position embedding: learned, fixed 2D sines and cosines, or none."""
    dropout: float = 0.0
    """Probability of dropout, 0 to 1."""
    drop_path: float = 0.0
    """Probability, 0 to 1, with which stochastic depth drops the last block. It grows linearly over the blocks."""
    head_bias: float = 0.0
    """Initial bias of the head, in logits; -10 suits sigmoid losses over many classes."""
    depth: int | None = None
    """Number of blocks, where it differs from the variant's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The paper trains with Adam (b1 0.9, b2 0.999) and decoupled weight decay on every parameter (section 4.1, table 3)."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw; sgd with momentum, where weight decay is an L2 penalty; or muon for the matrices of the blocks and adamw
    for everything else. Muon's gradient is not clipped, and the gradient norm in its log is the norm of its update."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, a factor per step that is multiplied by the learning rate."""
    decay_filter: Literal["all", "kernels"] = "all"
    """Parameters that decay: all (the paper), or matrices only (big_vision)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment, each 0 to 1 per step."""
    eps: float = 1e-8
    """Adam's epsilon, added to the root of the second moment."""
    momentum: float = 0.9
    """Momentum of sgd, 0 to 1."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that muon trains."""
    clip: float | None = 1.0
    """Largest global gradient norm. None: no clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the model is placed and computed. Only `precision` is part of a run's identity: the other options change rounding alone,
    and which units dropout drops."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. 1 shards the optimiser states, 2 also the gradients, 3 also the parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of parameters and activations. Optimiser states are always fp32."""
    micro_batch: int | None = None
    """Images per worker in one forward pass; gradients accumulate over the rest of the worker's batch. None: as many
    as fit into the GPU's memory by estimate, and on a CPU all of them."""
    offload: bool = False
    """Keep the optimiser states in host memory."""
    compile: bool = False
    """Compile every transformer block and every convolutional stage with torch.compile."""
    compile_scope: Literal["blocks", "model"] = "blocks"
    """What is compiled together: each block alone (a short warm-up), or the whole model (one graph)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile. reduce-overhead records CUDA graphs, for steps that the host cannot launch fast enough."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass instead of storing them: less memory, a third more
    compute."""
    checkpointed_blocks: int | None = None
    """Number of blocks, from the first, whose activations are recomputed. None: all blocks."""
    checkpoint_keeps: Literal["nothing", "products"] = "nothing"
    """What a recomputed block stores: nothing, or the results of matrix products and attention."""
    overlap_comm: bool = False
    """Reduce gradients during the backward pass (ZeRO 1 and 2; ZeRO-3 always does). DeepSpeed then waits for the device once
    in each backward pass, which pays between nodes and not over NVLink."""
    gradient_precision: Literal["model", "fp32"] = "model"
    """Number format in which gradients are reduced and accumulated. fp32 needs ZeRO-2 and 4 bytes for each parameter of a
    worker's share."""
    tf32: bool = False
    """Round the inputs of fp32 matrix products to 10 bits of mantissa (Ampere and later GPUs)."""
    deterministic: bool = False
    """Use kernels that compute the same bits in every run on a GPU. They are slower. CPU kernels always do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotConfig:
    """A linear probe on frozen features of a few images per class, at every validation (section 4.1). Off unless `train` is given."""

    train: str | None = None
    """Labelled dataset from which the probe takes its training images."""
    test: str | None = None
    """Dataset on which the probe is scored, with the same classes. None: the run's --validation."""
    shots: int = 5
    """Training images per class."""
    l2: float = 1024.0
    """Strength of the L2 regularisation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how a run is executed. Nothing here changes which numbers are computed: all of it may differ between attempts."""

    data: str = "runs/demo/data/train"
    """Dataset to train on, written by jobs/prepare.py: a folder or s3:// prefix. A run continues when the dataset has
    moved, and is refused when its content has changed."""
    validation: str | None = None
    """Dataset to validate on, and so to report top-1. None: no validation."""
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    output: str = "runs/demo/pretrain"
    """Folder or s3:// prefix of the run, for its checkpoints and its identity. The same command continues the run in
    it."""
    workers: int = 1
    """Number of training workers, one per GPU."""
    min_workers: int | None = None
    """Continue with as few workers as this after losing nodes, and with up to --workers when nodes return. None:
    always --workers."""
    cpus_per_worker: float = 1
    """CPU cores per worker."""
    gpus: bool = False
    """Give each worker one GPU."""
    gpu: str = "h100"
    """GPU model that plans are made for: the micro-batch, the time, the CPU cores. Workers take the one that they find."""
    threads: int | None = None
    """Decoding threads per worker. None: one per CPU core of the worker."""
    cache: str | None = None
    """Local folder in which to keep shards that are read from s3://."""
    one_class: bool = False
    """Train although the data set has one class."""
    max_replaced: int | None = None
    """Stop when more images than this could not be decoded and were replaced. None: no limit."""

    log_every: str = "50steps"
    """Interval between log lines: steps, epochs, examples or percent of the run."""
    validate_every: str = "1epochs"
    """Interval between validations: steps, epochs, examples or percent of the run."""
    checkpoint_every: str = "1epochs"
    """Interval between checkpoints: steps, epochs, examples or percent of the run."""
    keep_last: int = 3
    """Number of newest checkpoints to keep. The best one by validation is kept as well."""
    wait_warning: float = 0.1
    """Warn when a larger share of the time than this, 0 to 1, passes waiting for data."""

    max_failures: int = 3
    """Number of restarts in a row, without a new checkpoint between them, after which the run fails."""
    stalled_after: float = 1800.0
    """Seconds without a step after which a worker counts as hung and is restarted. 0: wait for ever."""
    stop_grace: float = 30.0
    """Seconds in which a stopped run (Ctrl-C, SIGTERM, ray job stop) may finish its step and save it."""
    stop_after_skipped: int = 50
    """Number of skipped steps in a row after which the run fails. A step is skipped when its loss is a spike or its
    gradients are not finite."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in --output, or start one. never: refuse an --output that holds a run. must: refuse an
    --output without one."""
    name: str | None = None
    """Name of the run in MLflow. None: the recipe or the variant."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""
    register: str | None = "auto"
    """Registered MLflow model of which the best and the last checkpoint become versions at the end. auto: one named after
    the recipe and the data set. None: none."""
    licence: str | None = None
    """Licence of the weights, for the model card."""
    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    dry_run: bool = False
    """Check everything, print the plan and every value, and start nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One pre-training run. Every field but `runtime` (whose flags have no prefix: --data, --workers) decides the numbers."""

    steps: str = "90epochs"
    """Length of the run, with its unit: 10000steps, 90epochs or 5e8examples."""
    batch_size: int = 4096
    """Images per step over all workers together."""
    image_size: int = 224
    """Side of the model's input, in pixels."""
    validation_resize: int | None = None
    """Shorter side, in pixels, to which validation images are resized before the centre crop. None: 8/7 of
    --image-size (256 for 224)."""
    seed: int = 0
    """Seed of the weights, the order of the images, the augmentation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: Literal["softmax", "sigmoid", "masked"] = "softmax"
    """softmax; sigmoid summed over the classes (multi-label data, JFT and ImageNet-21k); or masked patch prediction
    (section 4.6 of the paper)."""
    target: Literal["mean", "downsized", "full"] = "mean"
    """What masked patch prediction predicts: the mean colour in 3 bits per channel (512 classes), a 4x4 version of the
    patch in such colours, or all its pixels by regression (appendix B.1.2)."""
    label_smoothing: float = 0.0
    """Share of the label's weight, 0 to 1, that is spread over all classes."""
    augment: Augment = field(default_factory=Augment)
    patch_keep_rate: float = 1.0
    """Share of the patches, 0 to 1, that training keeps, chosen at random. Validation sees all patches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema_decay: float = 0.0
    """Decay per step, 0 to 1, of the exponential moving average of the weights (Polyak averaging). 0: no average."""
    spike: float | None = None
    """Skip a step whose loss exceeds the median of the last --spike-window losses by more than this factor. None: skip
    none. Meant for long runs with large batches, whose loss stays well above zero."""
    spike_window: int = 64
    """Number of past steps whose median loss --spike compares with."""
    lanes: int | None = None
    """Number of independent sample streams. It must divide the batch, and --workers must divide it. None: chosen from
    the batch."""
    shuffle_window: int = 16_384
    """Images that are shuffled together at a time, over all workers."""
    init_from: str | None = None
    """Weights to start from: .npz, .safetensors, or a checkpoint of this project."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    runtime: Annotated[RuntimeConfig, WITHOUT_PREFIX] = field(default_factory=RuntimeConfig)

    @property
    def identity(self) -> dict[str, Any]:
        """What two launches of the same run have in common, as plain values."""
        plain = configuration.to_dict(replace(self, engine=EngineConfig(precision=self.engine.precision)))
        return {name: value for name, value in plain.items() if name != "runtime"}
