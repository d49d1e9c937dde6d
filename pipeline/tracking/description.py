"""What a person reads first of a run: its name, and a description of what it is, with which command, and at what cost.

A description is Markdown in MLflow's note of the run, a paragraph a subject. Paragraphs are known by how they begin, so
that one can be replaced while the others stay.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.credentials import redacted
from pipeline.tracking import names

DATA, COMMAND, CONTINUE, COST = "**Data:**", "**Command:**", "**To continue:**", "**Cost:**"
SPLITS = ("train", "training", "val", "valid", "validation", "test", "eval")
GENERIC = ("data", "dataset", "datasets", "shards", "sets", "prepared")


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What `start_run` writes into a new run's description, besides the command."""

    what: str
    """A sentence."""
    data: Sequence[str] = ()
    """A line a data set."""
    to_continue: str = "repeat the command to continue where this run stopped."

    def text(self) -> str:
        paragraphs = [self.what]
        if self.data:
            paragraphs.append(f"{DATA} {'; '.join(self.data)}")
        paragraphs += [command_paragraph(), f"{CONTINUE} {self.to_continue}"]
        return "\n\n".join(paragraphs)


def command_paragraph() -> str:
    """The command line of this process, without passwords."""
    program = sys.argv[0] or "python"
    if os.path.isabs(program):
        program = os.path.relpath(program) if os.path.exists(program) else os.path.basename(program)
    line = shlex.join(["python", program, *sys.argv[1:]]) if program.endswith(".py") else shlex.join(sys.argv)
    return f"{COMMAND} `{redacted(line)[:1500]}`"


def cost_paragraph(costs: Mapping[str, float]) -> str:
    """The costs of a run (`names.COST`) as one line; empty without any."""
    parts = []
    if names.SECONDS in costs:
        parts.append(f"{duration(costs[names.SECONDS])} of wall time")
    if costs.get(names.GPU_HOURS):
        parts.append(f"{costs[names.GPU_HOURS]:.2f} GPU hours")
    if costs.get(names.TRAIN_FLOPS):
        parts.append(f"{flops(costs[names.TRAIN_FLOPS])} of training")
    if costs.get(names.ENERGY_KWH):
        parts.append(f"{costs[names.ENERGY_KWH]:.3g} kWh of the GPUs")
    return f"{COST} {', '.join(parts)}" if parts else ""


def duration(seconds: float) -> str:
    """90 -> "1 min 30 s"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def flops(value: float) -> str:
    """3.9e12 -> "3.9 teraFLOPs"."""
    for unit, size in (("zetta", 1e21), ("exa", 1e18), ("peta", 1e15), ("tera", 1e12)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOPs"
    return f"{value / 1e9:.3g} gigaFLOPs"


def replace_paragraph(text: str, markers: Iterable[str], paragraph: str, first: bool = False) -> str:
    """The text with one paragraph, known by what it begins with, replaced in its place; an empty one is removed.

    A new one goes to the end, or to the beginning.
    """
    starts, parts, done = tuple(markers), [], not paragraph
    for part in (part for part in text.split("\n\n") if part):
        if not part.startswith(starts):
            parts.append(part)
        elif not done and not first:
            parts.append(paragraph)
            done = True
    if not done:
        parts.insert(0 if first else len(parts), paragraph)
    return "\n\n".join(parts)[: names.MAX_VALUE]


# ---------------------------------------------------------------- names


def data_name(uri: str) -> str:
    """What a data set is called: the last part of its address that says something.

    s3://bucket/imagenet/train -> imagenet, runs/demo/data/train -> demo, photos -> photos.
    """
    parts = [part for part in re.sub(r"^\w+://", "", uri).split("/") if part]
    useful = [part for part in parts if part.lower() not in SPLITS + GENERIC]
    return useful[-1] if useful else (parts[-1] if parts else uri)


def model_name(recipe: str, data: str) -> str:
    """The registered model of a recipe on a data set: one for each pair, since others cannot be compared."""
    name = data_name(data)
    return re.sub(r"[/:]+", "-", recipe if name in ("", recipe) else f"{recipe}-{name}")


def checkpoint_name(uri: str) -> str:
    """What a checkpoint is called: runs/b16/checkpoints/step-00000528 -> "b16 step 528"."""
    if uri.startswith(names.RANDOM):
        return f"random weights like {checkpoint_name(uri.removeprefix(names.RANDOM))}"
    if match := re.fullmatch(r"(.*)/checkpoints/step-0*(\d+)", uri.rstrip("/")):
        folder = match[1].rstrip("/")
        return f"{_folder_name(folder)} step {match[2]}"
    return uri if re.match(r"[\w-]+:(?!//)", uri) else _folder_name(uri.rstrip("/"))


def _folder_name(folder: str) -> str:
    """The last part of a path, with the one before it where the last is `pretrain`."""
    head, _, name = folder.rpartition("/")
    return head.rpartition("/")[2] if name == "pretrain" and head else name


def run_name(*parts: str) -> str:
    """Parts that tell runs apart, each once: "demo · photos"."""
    return " · ".join(dict.fromkeys(part for part in parts if part))
