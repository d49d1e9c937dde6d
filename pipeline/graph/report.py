"""Text and plots about a pipeline: status, dry run, cost table, results, graph."""

import io
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.errors import plural
from pipeline.graph import cost, results
from pipeline.graph.estimate import Estimate
from pipeline.graph.plan import DONE, FAILED, RUNNING, STALE, STOPPED, WAITING, Plan, Status
from pipeline.graph.state import Running
from pipeline.lines import WIDTH, cut, with_prefix
from pipeline.units import bytes_text

COLOURS = {
    DONE: "#cfe8cf",
    RUNNING: "#cfe0f7",
    FAILED: "#f6cccc",
    STOPPED: "#f3dfc1",
    STALE: "#fff2b8",
    WAITING: "#eeeeee",
}


# ---------------------------------------------------------------- status


def status_table(plan: Plan, states: Mapping[str, Status], runner: str | None = None) -> str:
    """One line per stage, at most 80 columns."""
    counts = {state: sum(s.state == state for s in states.values()) for state in COLOURS}
    head = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    width = min(36, max(len(name) for name in states))
    lines = [cut(f"{plan.pipeline.name}: {head}", WIDTH), cut(f"  in {plan.state.root}", WIDTH)]
    if runner:
        lines.append(cut(f"  {runner}", WIDTH))
    lines.append("")
    for name, status in states.items():
        lines.append(
            f"{cut(name, width):{width}s}  {status.state:7s}  {cut(detail(plan, name, status), WIDTH - width - 11)}".rstrip()
        )
    logs = {name: log for name, status in states.items() if (log := _log(plan, name, status))}
    if logs:
        lines += ["", "logs, in that folder:", *(f"  {log}" for log in logs.values())]
    return "\n".join(lines)


def _log(plan: Plan, name: str, status: Status) -> str:
    """The log of a running or failed attempt, relative to the output of the pipeline."""
    record = plan.state.records.get(name)
    if record is None:
        return ""
    if status.state == RUNNING and record.running is not None:
        return record.running.log
    return record.failed.log if status.state in (FAILED, STOPPED) and record.failed is not None else ""


def detail(plan: Plan, name: str, status: Status) -> str:
    """The text of `status` for a stage: cost and result, progress, or reason."""
    record = plan.state.records.get(name)
    if status.state == DONE and status.version is not None:
        found = [cost.duration(status.version.cost.get("seconds", 0.0)), brief(status.version.result)]
        return ": ".join(filter(None, found))
    if status.state == RUNNING and record is not None and record.running is not None:
        return describe_progress(plan.state.root, record.running)
    return status.why


def describe_progress(root: str, running: Running) -> str:
    """The progress of a running attempt in words, before its first report the time since its start."""
    progress = results.read_progress(root, running.job)
    if progress is None:
        return f"for {cost.duration(max(0.0, time.time() - running.started))}"
    left = f", {cost.duration(progress.left)} left" if progress.left is not None else ""
    return f"{progress.share:.0%}{left}{': ' if progress.note else ''}{progress.note}"


def brief(result: Mapping[str, Any]) -> str:
    """A short text for the result of a job."""
    if "prepared" in result:
        return f"{plural(result['prepared'], 'image')}, {plural(result['rejects'], 'reject')}"
    if "steps" in result:
        top1 = f", top-1 {result['top1']:.2f}%" if "top1" in result else ""
        return f"{plural(result['steps'], 'step')}{top1}"
    if "promoted" in result:
        if result["promoted"]:
            return f"version {result['promoted']} is champion, {result['score']:.2f}"
        return str(result.get("why", "")).removeprefix(f"{result.get('model')} ")
    numbers = {
        key: value
        for key, value in result.items()
        if isinstance(value, int | float) and not key.startswith(results.RANDOM)
    }
    if not numbers:
        return ""
    if len(numbers) == 1:
        return " ".join(f"{name} {value:.2f}" for name, value in numbers.items())
    return f"mean {sum(numbers.values()) / len(numbers):.2f} of {len(numbers)}"


def sentence(plan: Plan, states: Mapping[str, Status]) -> str:
    """The result of a pipeline in one sentence: how many stages are done, and what the last ones found."""
    done = [name for name, status in states.items() if status.state == DONE]
    found = [
        f"{name}: {text}"
        for name in done
        if plan.instances[name].kind.name in ("pretrain", "transfer", "promote")
        and (version := states[name].version) is not None
        and (text := brief(version.result))
    ]
    shown = [*found[:3], "..."] if len(found) > 4 else found
    return f"{plan.pipeline.name}: {len(done)} of {plural(len(states), 'stage')} done. {'; '.join(shown)}".rstrip()


def status_json(plan: Plan, states: Mapping[str, Status]) -> dict[str, Any]:
    """The content of `status` as plain values."""
    stages = {}
    for name, status in states.items():
        instance, record = plan.instances[name], plan.state.records.get(name)
        running = record.running if record is not None else None
        progress = results.read_progress(plan.state.root, running.job) if running else None
        stages[name] = {
            "job": instance.kind.name,
            "state": status.state,
            "why": status.why,
            "needs": list(instance.needs),
            "output": plan.state.address(status.version.output) if status.version else plan.folder(name),
            "cost": status.version.cost if status.version else None,
            "result": status.version.result if status.version else None,
            "progress": {"share": progress.share, "seconds_left": progress.left, "note": progress.note}
            if progress
            else None,
            "attempt": {"job": running.job, "log": plan.state.address(running.log)} if running else None,
        }
    return {"pipeline": plan.pipeline.name, "output": plan.state.root, "stages": stages}


# ---------------------------------------------------------------- dry run and costs


def dry_run(
    plan: Plan, states: Mapping[str, Status], selected: Collection[str], estimates: Mapping[str, Estimate | None]
) -> str:
    """The stages that would run, with reasons and estimated costs."""
    todo = [name for name in selected if states[name].state != DONE or name in plan.forced]
    lines = [f"{plan.pipeline.name}: {len(todo)} of {plural(len(states), 'stage')} would run, in {plan.state.root}", ""]
    if not todo:
        return lines[0]
    width = min(36, max(len(name) for name in todo))
    lines.append(f"{'stage':{width}s} {'time':>7s} {'CPU-h':>7s} {'GPU-h':>7s} {'$':>8s}  why")
    for name in todo:
        why = "forced" if name in plan.forced else states[name].why
        lines.append(
            f"{cut(name, width):{width}s} {_numbers(estimates.get(name))}  {cut(why, max(12, WIDTH - width - 37))}"
        )
    known = [e for name in todo if (e := estimates.get(name)) is not None]
    whole = Estimate(
        seconds=sum(e.seconds for e in known),
        cpu_hours=sum(e.cpu_hours for e in known),
        gpu_hours=sum(e.gpu_hours for e in known),
        dollars=sum(e.dollars for e in known if e.dollars is not None)
        if any(e.dollars is not None for e in known)
        else None,
    )
    note = "run one after another" if len(known) == len(todo) else f"for the {len(known)} with an estimate"
    lines.append(f"{'in all':{width}s} {_numbers(whole)}  {note}")
    return "\n".join(lines)


def _numbers(estimate: Estimate | None) -> str:
    if estimate is None:
        return f"{'?':>7s} {'?':>7s} {'?':>7s} {'':>8s}"
    money = "" if estimate.dollars is None else cost.money(estimate.dollars)
    gpu = _hours(estimate.gpu_hours) if estimate.gpu_hours else ""
    return f"{cost.duration(estimate.seconds):>7s} {_hours(estimate.cpu_hours):>7s} {gpu:>7s} {money:>8s}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 1000 else f"{hours:.2f}"


def cost_rows(plan: Plan, states: Mapping[str, Status], estimates: Mapping[str, float]) -> list[list[str]]:
    """[stage, time, estimate, CPU-h, GPU-h, read, written, $] for every finished stage and in total."""
    rows = []
    done = {name: status.version for name, status in states.items() if status.version is not None}
    for name, version in done.items():
        rows.append(_cost_row(name, version.cost, estimates.get(name)))
    if rows:
        guessed = sum(estimates[name] for name in done) if set(done) <= set(estimates) else None
        rows.append(_cost_row("in all", cost.total([version.cost for version in done.values()]), guessed))
    return rows


def _cost_row(name: str, spent: Mapping[str, Any], estimate: float | None) -> list[str]:
    return [
        name,
        cost.duration(spent.get("seconds", 0.0)),
        "" if estimate is None else cost.duration(estimate),
        f"{spent['cpu_hours']:.3f}" if "cpu_hours" in spent else "",
        f"{spent['gpu_hours']:.3f}" if spent.get("gpu_hours") else "",
        bytes_text(spent["read"]) if "read" in spent else "",
        bytes_text(spent["written"]) if "written" in spent else "",
        "" if spent.get("dollars") is None else cost.money(spent["dollars"]),
    ]


HEADER = ["stage", "time", "est.", "CPU-h", "GPU-h", "read", "written", "$"]


def cost_table(rows: Sequence[Sequence[str]]) -> str:
    """The table at the end of a run, at most 80 columns wide, without empty columns."""
    kept = [i for i in range(len(HEADER)) if i == 0 or any(row[i] for row in rows)]
    table = [[HEADER[i] for i in kept], *([row[i] for i in kept] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(kept))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - len(widths) + 1)
    lines = []
    for row in table:
        cells = [
            f"{cut(row[0], widths[0]):{widths[0]}s}",
            *(f"{cell:>{w}s}" for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)


def result_text(plan: Plan, states: Mapping[str, Status], seconds: float) -> str:
    """The results: a table of accuracies in percent, then machine-readable lines for each stage."""
    pipeline = plan.pipeline.name
    alone = {
        kind: sum(i.kind.name == kind for i in plan.instances.values()) == 1
        for kind in ("prepare", "pretrain", "transfer")
    }
    rows: list[tuple[str, float]] = []
    others: dict[str, float] = {}
    lines: list[str] = []
    for name, status in states.items():
        if status.version is None:
            continue
        kind, found = plan.instances[name].kind.name, status.version.result
        only = alone.get(kind, False)
        prefix = f"{pipeline}: " if only else f"{pipeline}: {name} "
        if kind in ("prepare", "vtab") and found:
            prefix = f"{pipeline}: " if name == "data" else prefix
            lines.append(f"{prefix}prepared={found['prepared']} shards={found['shards']} rejects={found['rejects']}")
        elif kind == "pretrain" and found:
            if "top1" in found:
                rows.append(("pre-trained, held-out images" if only else name, found["top1"]))
            shown = [f"{key}={found[key]:.4f}" for key in ("loss_first", "loss_last") if key in found]
            shown += [f"top1={found['top1']:.2f}"] if "top1" in found else []
            lines.append(prefix + " ".join(shown))
        elif kind == "transfer" and found:
            title = "transfer" if only else name
            random = {k.removeprefix(results.RANDOM): v for k, v in found.items() if k.startswith(results.RANDOM)}
            found = {task: score for task, score in found.items() if not task.startswith(results.RANDOM)}
            rows += [(f"{title} {task}", score) for task, score in found.items()]
            others |= {f"{title} {task}": score for task, score in random.items()}
            lines += with_prefix(f"{pipeline}: {title}", [f"{task}={score:.2f}" for task, score in found.items()])
            scores = [f"{task}={score:.2f}" for task, score in random.items()]
            lines += with_prefix(f"{pipeline}: {'random' if only else f'{name} random'}", scores)
        elif kind == "promote" and found:
            lines.append(f"{pipeline}: promote {found['why']}")
    width = max((len(label) for label, _ in rows), default=0)
    width = max(32, width)
    table = [
        f"{label:{width}s}{score:7.2f}" + (f"{others[label]:16.2f}" if label in others else "") for label, score in rows
    ]
    if table:
        head = [f"{'top-1 accuracy in %':{width}s}{'':7s}{'random encoder':>16s}"] if others else []
        table = [*head, *table, *([] if others else ["(top-1 accuracy, %)"]), ""]
    return "\n".join([*table, *lines, f"{pipeline}: seconds={seconds:.1f}"])


# ---------------------------------------------------------------- the graph


def layers(plan: Plan) -> list[list[str]]:
    """The instances by depth in the graph. An instance without dependencies is placed one layer before its dependents."""
    depth: dict[str, int] = {}
    for name, instance in plan.instances.items():
        depth[name] = max((depth[up] + 1 for up in instance.needs), default=0)
    readers: dict[str, list[int]] = {}
    for name in plan.instances:
        for up in direct_needs(plan, name):
            readers.setdefault(up, []).append(depth[name])
    for name, levels in readers.items():
        if not plan.instances[name].needs:
            depth[name] = min(levels) - 1
    return [[name for name in depth if depth[name] == level] for level in range(max(depth.values()) + 1)]


def direct_needs(plan: Plan, name: str) -> list[str]:
    """The dependencies of an instance that are not also dependencies of its other dependencies."""
    needs = plan.instances[name].needs
    through: set[str] = set()
    left = list(needs)
    while left:
        for up in plan.instances[left.pop()].needs:
            if up not in through:
                through.add(up)
                left.append(up)
    return [up for up in needs if up not in through]


HALF = 0.44
"""Half the width of a box, in units of a column."""


def picture(plan: Plan, states: Mapping[str, Status]) -> bytes:
    """The graph as a PNG, from left to right: one box per stage, in the colour of its state."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = [column[:40] for column in layers(plan)]
    rows = max(map(len, columns))
    # MLflow scales a picture to the width of its page; narrow columns keep the text legible.
    figure = Figure(figsize=(2.35 * len(columns) + 0.2, 0.62 * rows + 0.5), dpi=144)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(-rows - 0.1, 0.7)
    axes.axis("off")
    place = {
        name: (x + 0.5, -(y + 0.5) - (rows - len(column)) / 2)
        for x, column in enumerate(columns)
        for y, name in enumerate(column)
    }
    for name, (x, y) in place.items():
        for up in direct_needs(plan, name):
            if up in place:
                ends: dict[str, Any] = {"xy": (x - HALF, y), "xytext": (place[up][0] + HALF, place[up][1])}
                axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "#888888", "lw": 0.8}, zorder=1)
    for name, (x, y) in place.items():
        status = states[name]
        style: dict[str, Any] = {"facecolor": COLOURS[status.state], "edgecolor": "#666666", "linewidth": 0.7}
        axes.add_patch(Rectangle((x - HALF, y - 0.38), 2 * HALF, 0.76, zorder=2, **style))
        text = f"{cut(name, 31)}\n{cut(detail(plan, name, status) or status.state, 34)}"
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, zorder=3)
    shown = [state for state in COLOURS if any(status.state == state for status in states.values())]
    for i, state in enumerate(shown):
        box = {"boxstyle": "round,pad=0.25", "facecolor": COLOURS[state], "edgecolor": "#666666", "linewidth": 0.5}
        axes.text(0.5 - HALF + 0.03 + i * 0.3, 0.35, state, fontsize=8.5, va="center", bbox=box)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def page(plan: Plan, states: Mapping[str, Status], rows: Sequence[Sequence[str]], links: Mapping[str, str]) -> str:
    """The report as Markdown: stages, states, outputs and costs. links: {stage: URL of its MLflow run}."""
    lines = [f"# Pipeline {plan.pipeline.name}", "", f"State and outputs: `{plan.state.root}`", ""]
    lines += ["| stage | job | state | | output in that folder |", "| --- | --- | --- | --- | --- |"]
    for name, status in states.items():
        title = f"[{name}]({links[name]})" if name in links else name
        output = f"`{status.version.output}`" if status.version else ""
        what = detail(plan, name, status).replace("|", "/")
        lines.append(f"| {title} | {plan.instances[name].kind.name} | {status.state} | {what} | {output} |")
    if rows:
        lines += ["", "## Costs", "", "| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", "CPU-hours and GPU-hours are those of the allocated CPUs and GPUs."]
    return "\n".join(lines) + "\n"
