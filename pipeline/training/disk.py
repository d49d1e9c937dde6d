"""Space for the checkpoints of a run, compared with a disk before the run starts."""

import os
import shutil
import tempfile

from pipeline import storage
from pipeline.errors import UserError
from pipeline.units import bytes_text


def checkpoint_bytes(parameters: int, *, optimizer: str = "adamw", ema: bool = False) -> dict[str, int]:
    """Bytes of one checkpoint in float32: model.safetensors and the training state."""
    copies = {"adamw": 3, "sgd": 2, "muon": 2}[optimizer] + ema
    weights = 4 * parameters * (1 + ema)  # the average is a separate file
    return {"weights": weights, "state": 4 * parameters * copies, "total": weights + 4 * parameters * copies}


def check_disk(output: str, size: int, keep: int) -> str:
    """Compares the free space of a local output with its checkpoints; of a remote one, that of the temporary folder,
    through which its files go. Returns a warning, or "".

    size: bytes of one checkpoint. keep: how many the run keeps; one more is written before another is removed. Raises
    UserError if not even one fits."""
    output = storage.normalise(output)
    if storage.is_remote(output):
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        scarce = f"{folder}: {bytes_text(free)} free, and a checkpoint of up to {bytes_text(size)} goes through this folder; "
        return f"{scarce}free some space there or set TMPDIR" if free < size else ""
    folder = output
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"--output {output}: {bytes_text(free)} free, and a checkpoint of this run takes {bytes_text(size)}; free some space or "
            "choose another --output"
        )
    present = sum(file.size for file in storage.list_files(storage.join(output, "checkpoints")))
    needed = (keep + 1) * size - present
    if free < needed:
        return (
            f"--output {output}: {bytes_text(free)} free, and {keep} kept checkpoints and the next one take {bytes_text(needed)}; "
            "free some space or lower --keep-last"
        )
    return ""
