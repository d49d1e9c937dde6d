"""Configuration of pre-training: `PretrainConfig` has the settings that affect the result, `RuntimeConfig` the others.

The identity of a run is its `PretrainConfig` without `runtime` (`PretrainConfig.identity`). A stopped run can continue
with another `runtime` (workers, paths, intervals), but not with other changes. `recipes.py` has the values."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline import config as configuration
from pipeline.data.loading.augment import Augment
from pipeline.training.schedule import ScheduleConfig

try:
    import tyro
except ModuleNotFoundError:  # tests/benchmarks/gpu.py does not need flags and runs on machines without tyro
    WITHOUT_PREFIX: Any = None
else:
    WITHOUT_PREFIX = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture. `models.create_model` documents each option."""

    variant: str = "B/16"
    """Ti/16, S/32, S/16, B/32, B/16, L/32, L/16, H/14, g/14, G/14; any width with any patch size in pixels (Ti/4);
    hybrids (R50+B/16); ResNets (R50x1)."""
    pool: Literal["token", "gap", "map"] = "token"
    """Input of the head: the class token (as in the paper), the mean of all tokens, or attention pooling."""
    pre_logits: bool = True
    """Hidden tanh layer in the pre-training head (section 3.1 of the paper). Fine-tuning drops it."""
    posemb: Literal["learn", "sincos2d", "none"] = "learn"
    """Position embedding: learned, fixed 2D sin-cos, or none."""
    dropout: float = 0.0
    """Dropout probability, 0 to 1."""
    drop_path: float = 0.0
    """Stochastic depth: drop probability of the last block, 0 to 1. The probability increases linearly over the
    blocks."""
    head_bias: float = 0.0
    """Initial bias of the head, in logits; -10 suits sigmoid losses over many classes."""
    depth: int | None = None
    """Number of blocks. None: that of the variant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The paper trains with Adam (b1 0.9, b2 0.999) and decoupled weight decay on every parameter (section 4.1, table
    3)."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw; sgd with momentum, where weight decay is an L2 penalty; or muon for the matrices of the blocks and adamw
    for everything else. Muon's gradient is not clipped, and the gradient norm in its log is the norm of its update."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay. Each step multiplies it by the learning rate."""
    decay_filter: Literal["all", "kernels"] = "all"
    """Parameters with weight decay: all (the paper), or matrices only (big_vision)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment, each 0 to 1 per step."""
    eps: float = 1e-8
    """Adam's epsilon, added to the square root of the second moment."""
    momentum: float = 0.9
    """Momentum of sgd, 0 to 1."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that muon trains."""
    clip: float | None = 1.0
    """Maximum global gradient norm. None: no clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sharding and numerics. Only `precision` is part of a run's identity: the other options affect only rounding and
    dropout masks."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. 1 shards the optimiser states, 2 also the gradients, 3 also the parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of parameters and activations. Optimiser states are always fp32."""
    micro_batch: int | None = None
    """Images per worker in one forward pass; gradients accumulate over the rest of the worker's batch. None: on a GPU
    as many as should fit into its memory, on a CPU the whole batch."""
    offload: bool = False
    """Keep the optimiser states in host memory."""
    compile: bool = False
    """Compile every transformer block and every convolutional stage with torch.compile."""
    compile_scope: Literal["blocks", "model"] = "blocks"
    """Scope of compilation: each block (shorter compile time), or the whole model (one graph)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile. reduce-overhead uses CUDA graphs, for steps limited by kernel launches."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass instead of storing them: less memory, about a third
    more compute."""
    checkpointed_blocks: int | None = None
    """Number of blocks, from the first, whose activations are recomputed. None: all blocks."""
    checkpoint_keeps: Literal["nothing", "products"] = "nothing"
    """Activations that a recomputed block stores: none, or the results of matrix products and attention."""
    overlap_comm: bool = False
    """Reduce gradients during the backward pass (ZeRO 1 and 2; ZeRO-3 always does). This synchronises with the device
    once per backward pass, which is worthwhile between nodes but not over NVLink."""
    gradient_precision: Literal["model", "fp32"] = "model"
    """Number format in which gradients are reduced and accumulated. fp32 needs ZeRO-2, and 4 bytes per parameter of the
    worker's partition."""
    tf32: bool = False
    """Round the inputs of fp32 matrix products to a 10-bit mantissa (Ampere and later GPUs)."""
    deterministic: bool = False
    """Use deterministic GPU kernels, which are slower. CPU kernels are always deterministic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotConfig:
    """A linear probe on frozen features of a few images per class at every validation (section 4.1). Needs `train`."""

    train: str | None = None
    """Labelled dataset with the training images of the probe."""
    test: str | None = None
    """Test dataset of the probe, with the same classes. None: the run's --validation."""
    shots: int = 5
    """Training images per class."""
    l2: float = 1024.0
    """Strength of the L2 regularisation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Execution settings. They do not affect the result and may differ between attempts of a run."""

    data: str = "runs/demo/data/train"
    """Training dataset written by jobs/prepare.py: a folder or prefix (s3://, gs://, az://), or a read-only hf:// or
    https:// address. Several with weights are a mixture: a/train=0.7,b/train=0.3 takes 70% of the images
    from a. A run continues after a dataset has moved, but not after its
    content or weight has changed."""
    validation: str | None = None
    """Validation dataset, for top-1 accuracy. None: no validation."""
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    output: str = "runs/demo/pretrain"
    """Folder or prefix (s3://, gs://, az://) of the run, with run.json and checkpoints. Repeating the command
    continues the run."""
    workers: int = 1
    """Number of training workers, one per GPU."""
    min_workers: int | None = None
    """Minimum number of workers after nodes are lost; the run grows back to --workers when nodes return. None: always
    --workers."""
    cpus_per_worker: float = 1
    """CPU cores per worker."""
    gpus: bool = False
    """Give each worker one GPU."""
    gpu: str = "h100"
    """GPU model for plans: micro-batch, time, CPU cores. Workers use the GPU that they have."""
    threads: int | None = None
    """Decoding threads per worker. None: one per CPU core of the worker."""
    loading_processes: int | None = None
    """Processes per worker among which the decoding threads are divided. 1: the worker itself. None: with --gpus and JPEG
    shards one for each thread, if the lanes divide, otherwise 1."""
    cache: str | None = None
    """Local folder for a cache of shards from object stores."""
    one_class: bool = False
    """Allow training on a dataset with only one class."""
    max_replaced: int | None = None
    """Maximum number of undecodable images that may be replaced before the run fails. None: no limit."""

    log_every: str = "50steps"
    """Interval between log lines: steps, epochs, examples or percent of the run."""
    validate_every: str = "1epochs"
    """Interval between validations: steps, epochs, examples or percent of the run."""
    checkpoint_every: str = "1epochs"
    """Interval between checkpoints: steps, epochs, examples or percent of the run."""
    keep_last: int = 3
    """Number of newest checkpoints to keep. The best one by validation is kept as well."""
    wait_warning: float = 0.1
    """Warn when the fraction of time spent waiting for data exceeds this value, 0 to 1."""

    max_failures: int = 3
    """Maximum number of consecutive restarts without a new checkpoint."""
    stalled_after: float = 1800.0
    """Seconds without progress after which a worker counts as hung and is restarted. 0: never."""
    stop_grace: float = 30.0
    """Seconds for a stopped run (Ctrl-C, SIGTERM, ray job stop) to finish its step and save a checkpoint."""
    stop_after_skipped: int = 50
    """Maximum number of consecutive skipped steps. A step is skipped if its loss is a spike or its gradients are not
    finite."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in --output, or start a new one. never: fail if --output contains a run. must: fail if it
    does not."""
    name: str | None = None
    """Name of the MLflow run. None: the recipe or the variant."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI if set, otherwise SQLite in the current folder."""
    register: str | None = "auto"
    """Registered MLflow model; at the end, the best and the last checkpoint become versions of it. auto: named after
    the recipe and the dataset. None: no registration."""
    licence: str | None = None
    """Licence of the weights, for the model card."""
    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    dry_run: bool = False
    """Check the command, print the plan and all values, and exit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A pre-training run. All fields except `runtime` affect the result. The flags of `runtime` have no prefix (--data,
    --workers)."""

    steps: str = "90epochs"
    """Length of the run, with a unit: 10000steps, 90epochs or 5e8examples."""
    batch_size: int = 4096
    """Global batch size: images per step over all workers."""
    image_size: int = 224
    """Input size of the model, in pixels. The training crop (augment.size) follows it."""
    validation_resize: int | None = None
    """Shorter side of validation images before the centre crop, in pixels. None: 8/7 of --image-size (256 for 224)."""
    seed: int = 0
    """Seed of the initial weights, the sample order, the augmentation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: Literal["softmax", "sigmoid", "masked"] = "softmax"
    """softmax; sigmoid summed over the classes (multi-label data, JFT and ImageNet-21k); or masked patch prediction
    (section 4.6 of the paper)."""
    target: Literal["mean", "downsized", "full"] = "mean"
    """Target of masked patch prediction: the mean colour with 3 bits per channel (512 classes), a 4x4 downsized patch
    in such colours, or all pixels by regression (appendix B.1.2)."""
    label_smoothing: float = 0.0
    """Label smoothing, 0 to 1: the weight that is distributed over all classes."""
    augment: Augment = field(default_factory=Augment)
    patch_keep_rate: float = 1.0
    """Fraction of patches, 0 to 1, that training keeps, chosen at random. Validation uses all patches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema_decay: float = 0.0
    """Decay per step, 0 to 1, of the exponential moving average of the weights (Polyak averaging). 0: no average."""
    spike: float | None = None
    """Skip a step if its loss exceeds the median of the last --spike-window losses by this factor. None: never skip.
    Intended for long runs with large batches, whose loss stays well above zero."""
    spike_window: int = 64
    """Number of past steps in the median of --spike."""
    lanes: int | None = None
    """Number of independent sample streams. It must divide --batch-size, and --workers must divide it. None: derived
    from the batch size."""
    shuffle_window: int = 16_384
    """Number of images that are shuffled together, over all workers."""
    init_from: str | None = None
    """Initial weights: .npz, .safetensors, or a checkpoint of this project."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    runtime: Annotated[RuntimeConfig, WITHOUT_PREFIX] = field(default_factory=RuntimeConfig)

    def with_dependent_values(self, start: "PretrainConfig") -> "PretrainConfig":
        """This config, with the training crop and the validation size of an image size that differs from `start`'s, unless
        they were changed too."""
        if self.image_size == start.image_size or self.image_size < 1:
            return self
        augment, resize = self.augment, self.validation_resize
        if augment.size == start.augment.size == start.image_size:
            augment = replace(augment, size=self.image_size)
        if resize is not None and resize == start.validation_resize and resize < self.image_size:
            resize = round(resize * self.image_size / start.image_size)
        return replace(self, augment=augment, validation_resize=resize)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that identify a run, as plain values."""
        plain = configuration.to_dict(replace(self, engine=EngineConfig(precision=self.engine.precision)))
        return {name: value for name, value in plain.items() if name != "runtime"}

    @property
    def evaluation_view(self) -> Augment:
        """Preprocessing of evaluation images: resize the shorter side, centre crop."""
        size = self.image_size
        return Augment(size=size, crop="center", resize=self.validation_resize or round(size * 8 / 7), flip=False)
