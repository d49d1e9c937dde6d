"""Everything that this project measures on a GPU, in one command with a time limit, the most valuable sections first.

    python tests/benchmarks/gpu.py --output OUT --budget 560                 one GPU, about nine minutes
    python tests/benchmarks/gpu.py --output OUT --only profile levers        some sections
    python tests/benchmarks/gpu.py --output OUT --device cpu --tiny          every section at toy size, to try this program

Each section runs in a process of its own with a limit of its own: one that fails, hangs or runs out of memory costs itself alone.
Every finding is a line of OUT/results.jsonl as soon as it is known; OUT/log.txt has what the sections printed. A table of the
findings is printed at the end, within --budget seconds whatever happens; what found no time is listed in it. The exit code is 1
when a section failed or a comparison was wrong. Needs torch, DeepSpeed, OpenCV, simplejpeg, Pillow, PyArrow, SciPy, PyYAML, psutil and this
project's files, but no Ray, MLflow, tyro, s3fs or rich; timm for its rows. Changes no setting of the card.

    facts         versions, the card, what it multiplies and copies      levers       L/16: attention backends, batches, gradients
    correct       logits and gradients against float64                   attention    each backend at the models' shapes
    step_*        training steps: ours, plain PyTorch, timm              loader       JPEG and patches; training from both
    waits         where the host waits for the device in a step          finetuning   B/16 at 384 px: resident, streamed
    profile       L/16: kinds of kernels, the costliest, idle gaps       objectives   masked patches, dropped patches
    restore       ZeRO 0 to 3: leave and continue, bit for bit           recompute    H/14: what is recomputed, ZeRO-3
    curves        losses of every engine against float32                 convolutions the hybrid's stem
    modes         ways to compile                                    compilers    L/16: kernels tuned and fused otherwise
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

# In order of value: (seconds at most, seconds below which the section is not begun).
SECTIONS = {
    "facts": (60, 20),
    "correct": (60, 25),
    "step_L": (120, 45),
    "waits": (90, 30),
    "profile": (80, 35),
    "restore": (110, 40),
    "step_B": (100, 40),
    "curves": (110, 40),
    "step_H": (120, 45),
    "step_S": (90, 40),
    "levers": (150, 45),
    "attention": (60, 25),
    "modes": (150, 45),
    "loader": (90, 40),
    "finetuning": (100, 40),
    "objectives": (70, 35),
    "recompute": (100, 40),
    "convolutions": (90, 40),
    "compilers": (200, 45),
}
# Run only if named: they test the driver with sections that fail or hang.
TRIALS = {"fails": (60, 1), "hangs": (10, 1)}
LEFT_OVER = 5.0  # seconds of the budget that are kept for the table


def main(argv: list[str]) -> int:
    options = _options(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.section:
        return run_section(options, options.section)
    results = options.output / "results.jsonl"
    results.unlink(missing_ok=True)
    began = time.time()
    outcomes: dict[str, str] = {}
    for number, name in enumerate(options.only or SECTIONS):
        most, least = {**SECTIONS, **TRIALS}[name]
        left = options.budget - LEFT_OVER - (time.time() - began)
        if left < (least if not options.tiny else 1):
            outcomes[name] = "no time"
        elif options.here:
            outcomes[name] = "ok" if run_section(options, name) == 0 else "failed"
        else:
            outcomes[name] = _run_process(argv, options, name, min(most * options.patience, left), number)
    print(table(results, outcomes))
    return 0 if set(outcomes.values()) <= {"ok", "no time"} else 1


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir(), "gpu-benchmark"))
    parser.add_argument("--budget", type=float, default=560, help="seconds after which the table is printed")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *TRIALS], help="sections, in this order")
    parser.add_argument("--rows", nargs="+", choices=("ours", "torch", "timm"), default=("ours", "torch", "timm"),
                        help="of the sections step_*")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, nothing compiled")
    parser.add_argument("--here", action="store_true", help="all sections in this process, without limits of their own")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the limits of sections")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # a process's share
    return parser.parse_args(argv)


def _run_process(argv: list[str], options: argparse.Namespace, name: str, seconds: float, number: int) -> str:
    """Runs a section in a separate process, which is killed with its children after so many seconds. Returns how it
    ended."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--section", name]
    port = {"MASTER_PORT": str(29600 + (os.getpid() + number) % 2000)}
    with (options.output / "log.txt").open("ab") as log:
        log.write(f"\n===== {name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **port}, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group that the line above made
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "ok" if code == 0 else "failed" if code == 1 else f"ended with {code}"


def run_section(options: argparse.Namespace, name: str) -> int:
    """Runs one section in this process; 0 when nothing in it failed."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29600"}
    os.environ.update({"DS_ACCELERATOR": options.device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    import torch

    from tests.benchmarks.gpu_parts import Bench

    bench = Bench(
        device=torch.device(options.device), tiny=options.tiny, results=options.output / "results.jsonl",
        section=name, began=time.time(), rows=tuple(options.rows),
    )  # fmt: skip
    try:
        _section(name)(bench)
    except Exception as error:
        bench.put("failed", error=f"{type(error).__name__}: {str(error)[:800]}", trace=traceback.format_exc()[-3000:])
    return int(bench.failures > 0)


def _section(name: str) -> Callable[[Any], None]:
    from tests.benchmarks import gpu_correct, gpu_speed

    if name in TRIALS:
        return {"fails": _fails, "hangs": lambda bench: time.sleep(600)}[name]
    if name.startswith("step_"):
        return gpu_speed.step_rows({"S": "S/16", "B": "B/16", "L": "L/16", "H": "H/14"}[name[-1]])
    return getattr(gpu_correct, name, None) or getattr(gpu_speed, name)


def _fails(bench: Any) -> None:
    raise RuntimeError("this section fails whenever it is asked for")


# ---------------------------------------------------------------- the table

LONG = ("section", "t", "what", "trace", "top", "gaps_us", "ok", "error")


def table(results: Path, outcomes: dict[str, str]) -> str:
    """One line for each finding, by section, with its outcome; failures are marked."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    lines = []
    for name, outcome in outcomes.items():
        lines.append(f"\n{name}: {outcome}")
        for row in (row for row in rows if row["section"] == name):
            mark = "ERROR" if "error" in row else "WRONG" if row.get("ok") is False else ""
            values = "  ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in LONG)
            lines.append(f"  {mark:5s} {row['what']:28s} {values}  {row.get('error', '')}".rstrip()[:400])
            lines += [
                f"          {ms:9.3f} ms  {count:5d} x  {kernel}" for kernel, ms, count in row.get("top", [])[:12]
            ]
    wrong = [name for name, outcome in outcomes.items() if outcome not in ("ok", "no time")]
    late = [name for name, outcome in outcomes.items() if outcome == "no time"]
    lines.append(f"\nfailed: {', '.join(wrong) or 'none'}; no time for: {', '.join(late) or 'none'}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(part)}" for key, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
