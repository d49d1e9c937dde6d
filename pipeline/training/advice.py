"""Which settings help a run that is short of memory or waits for its data."""

from pipeline import storage
from pipeline.data.format import Dataset
from pipeline.training.config import PretrainConfig
from pipeline.training.plan import loading_threads


def out_of_memory(config: PretrainConfig, workers: int, *, host: bool) -> str:
    """The settings that this run still has against running out of memory. host: the node's memory, not the device's."""
    engine = config.engine
    micro_batch = engine.micro_batch or config.batch_size // max(workers, config.runtime.workers)
    settings = []
    if micro_batch > 1:
        settings.append(f"--engine.micro-batch {micro_batch // 2} (now {micro_batch}; the batch stays as it is)")
    if not engine.activation_checkpointing:
        settings.append("--engine.activation-checkpointing")
    if engine.zero < 3:
        settings.append(f"--engine.zero {engine.zero + 1} with more workers (now {engine.zero})")
    if host:
        settings.append(f"fewer workers on a node, or a --shuffle-window below {config.shuffle_window}")
    else:
        settings += [] if engine.offload or engine.zero == 0 else ["--engine.offload (optimiser states in host memory)"]
        settings += [] if engine.precision != "fp32" else ["--engine.precision bf16"]
    return f"out of {'host' if host else 'device'} memory; try {'; '.join(settings)}"


def data_wait_advice(config: PretrainConfig, dataset: Dataset, share: float) -> str:
    """Says that training waits for its data, with the settings that could help this run."""
    threads = loading_threads(config)
    settings = []
    if storage.is_remote(config.runtime.data) and config.runtime.cache is None:
        settings.append("keep the shards on a local disk (--cache FOLDER)")
    if threads < config.runtime.cpus_per_worker:
        settings.append(
            f"decode with more threads (--threads, now {threads} of the worker's {config.runtime.cpus_per_worker:g} CPUs)"
        )
    else:
        settings.append(f"give each worker more CPUs (--cpus-per-worker, now {config.runtime.cpus_per_worker:g})")
    if dataset.encoding == "jpeg":
        settings.append("prepare the data as patches, which need no decoding (--encoding patches)")
    return f"{share:.0%} of the time was spent waiting for data: {'; or '.join(settings)}"
