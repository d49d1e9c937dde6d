"""The name and the description of a run: its purpose, data, command and cost.

A description is Markdown in MLflow's note of the run, with one paragraph per subject. The beginning of a paragraph
identifies it, so that one paragraph can be replaced.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.address import data_name
from pipeline.credentials import redacted
from pipeline.tracking import names

DATA, COMMAND, CONTINUE, COST = "**Data:**", "**Command:**", "**To continue:**", "**Cost:**"


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The description of a new run, without the command, which `start_run` adds."""

    what: str
    """One sentence."""
    data: Sequence[str] = ()
    """One line per data set."""
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
    """The costs of a run (`names.COST`) as one line; empty without costs."""
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
    """Replaces the paragraph that begins with one of `markers`; an empty `paragraph` removes it.

    If no paragraph matches, the new one is added at the end, or at the beginning with `first`.
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


def model_name(recipe: str, data: str) -> str:
    """The name of the registered model for a recipe and a data set. Only versions of the same pair are comparable."""
    name = data_name(data)
    return re.sub(r"[/:]+", "-", recipe if name in ("", recipe) else f"{recipe}-{name}")


def checkpoint_name(uri: str) -> str:
    """The name of a checkpoint: runs/b16/checkpoints/step-00000528 -> "b16 step 528"."""
    if uri.startswith(names.RANDOM):
        return f"random weights like {checkpoint_name(uri.removeprefix(names.RANDOM))}"
    if match := re.fullmatch(r"(.*)/checkpoints/step-0*(\d+)", uri.rstrip("/")):
        folder = match[1].rstrip("/")
        return f"{_folder_name(folder)} step {match[2]}"
    return uri if re.match(r"[\w-]+:(?!//)", uri) else _folder_name(uri.rstrip("/"))


def _folder_name(folder: str) -> str:
    """The last part of a path, or the part before it if the last part is `pretrain`."""
    head, _, name = folder.rpartition("/")
    return head.rpartition("/")[2] if name == "pretrain" and head else name


def run_name(*parts: str) -> str:
    """Joins the distinct parts of a run name: "demo · photos"."""
    return " · ".join(dict.fromkeys(part for part in parts if part))
