"""Advice for runs that are out of memory or wait for data."""

from pipeline import address, storage
from pipeline.data.format import Dataset
from pipeline.training.config import PretrainConfig
from pipeline.training.plan import loading_threads, memory_remedies


def out_of_memory(config: PretrainConfig, micro_batch: int, *, host: bool) -> str:
    """The settings that this run still has against running out of memory. micro_batch: images of one forward pass.

    host: the node's memory, not the device's.
    """
    settings = memory_remedies(config)
    if host:
        settings = [
            setting for setting in settings if not setting.startswith(("--engine.offload", "--engine.precision"))
        ]
        settings.append(f"fewer workers per node, or a --shuffle-window below {config.shuffle_window}")
    if micro_batch > 1:
        smaller = max(n for n in range(1, micro_batch) if micro_batch % n == 0)
        settings.insert(0, f"--engine.micro-batch {smaller} (now {micro_batch}; the batch size stays the same)")
    where = "host" if host else "device"
    return f"out of {where} memory; try {'; '.join(settings) or 'a GPU with more memory'}"


def data_wait_advice(config: PretrainConfig, dataset: Dataset, share: float) -> str:
    """A warning that training waits for data, with settings that may help this run."""
    threads = loading_threads(config)
    settings = []
    if any(map(storage.is_remote, address.uris(config.runtime.data))) and config.runtime.cache is None:
        settings.append("keep the shards on a local disk (--cache FOLDER)")
    if threads < config.runtime.cpus_per_worker:
        settings.append(
            f"decode with more threads (--threads, now {threads} of the worker's {config.runtime.cpus_per_worker:g} CPUs)"
        )
    else:
        settings.append(f"give each worker more CPUs (--cpus-per-worker, now {config.runtime.cpus_per_worker:g})")
    if dataset.encoding == "jpeg":
        settings.append("prepare the data with --encoding patches, which needs no decoding")
    return f"{share:.0%} of the time was spent waiting for data: {'; or '.join(settings)}"
