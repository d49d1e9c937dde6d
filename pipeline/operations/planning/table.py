"""Formats a plan as text."""

from typing import Any

from pipeline.errors import plural
from pipeline.lines import fit
from pipeline.units import bytes_text, flops_text

LIMITS = {
    "gpus": "the GPUs",
    "launching": "launching kernels",
    "decoding": "decoding on the CPUs",
    "reading": "reading shards",
}


def plan_table(result: dict[str, Any]) -> str:
    """The plan as a text table."""
    model, hardware, run = result["model"], result["hardware"], result["run"]
    memory, checkpoint = result["memory"], result["checkpoint"]
    lines = [
        f"{result['recipe']}: {model['variant']} at {model['image_size']} px on {hardware['gpus']} x {hardware['gpu']}, "
        f"{hardware['mfu']:.0%} MFU",
        f"  model        {model['parameters'] / 1e6:,.1f}M parameters, {model['forward_gflops_per_image']:,.2f} GFLOPs an image forward",
        f"  corpus       {plural(run['images'], 'image')}, {plural(run['classes'], 'class')}",
        f"  run          {plural(run['steps'], 'step')}, {plural(run['images_seen'], 'image')} seen, {flops_text(run['train_exaflops'] * 1e18)}",
        f"  speed        {run['images_per_second']:,.0f} img/s, {run['step_seconds']:.3g} s a step, limited by "
        f"{LIMITS[run['limited_by']]}",
        *_limits(run),
        f"  time         {hours_text(run['hours'])}, {_few(run['gpu_hours'])} GPU-hours, ${_few(run['cost'])}",
        "",
        f"  memory per GPU ({bytes_text(memory['usable'])} usable; activations {bytes_text(memory['activations_per_image'])} an image;",
        f"  {plural(memory['images_per_gpu'], 'image')} per GPU and step)",
        f"    {'':7s}{'model states':>13s}{'buffers':>9s}{'micro-batch':>12s}{'accumulate':>11s}{'used':>9s}",
    ]
    for stage, row in memory["stages"].items():
        chosen = "  <- recipe" if int(stage) == memory["stage"] else ""
        micro, accumulation = (row["micro_batch"], row["accumulation"]) if row["micro_batch"] else ("none fits", "")
        lines.append(
            f"    {f'ZeRO-{stage}':7s}{bytes_text(row['model_states']):>13s}{bytes_text(row['buffers']):>9s}{micro:>12}{accumulation:>11}"
            f"{bytes_text(row['used']):>9s}{chosen}"
        )
    lines += [
        "",
        f"  data plane for the {run['wanted_images_per_second']:,.0f} img/s of GPUs that do not wait",
        f"    {'':10s}{'an image':>9s}{'stored':>9s}{'$/month':>9s}{'read at':>11s}{'cores':>9s}{'read in all':>12s}{'GETs $':>7s}",
    ]
    for name, row in result["data"].items():
        lines.append(
            f"    {name:10s}{bytes_text(row['bytes_per_image']):>9s}{bytes_text(row['stored']):>9s}{row['storage_cost_per_month']:>9,.0f}"
            f"{bytes_text(row['read_bytes_per_second']) + '/s':>11s}{row['cores']:>9,.1f}{bytes_text(row['read']):>12s}{row['request_cost']:>7,.0f}"
        )
    lines += _cores(result)
    lines += [
        "",
        f"  checkpoint   {bytes_text(checkpoint['total'])} ({bytes_text(checkpoint['weights'])} weights), written in "
        f"{checkpoint['write_seconds']:.1f} s",
        f"               {checkpoint['expected_failures']:.2g} failures expected: best every "
        f"{plural(checkpoint['interval_steps'], 'step')} ({checkpoint['interval_seconds'] / 60:.0f} min),",
        f"               the recipe has {checkpoint['recipe_interval_steps']:,}",
    ]
    lines += _paper(result)
    if "prepare" in result:
        lines += _prepare(result["prepare"])
    return fit("\n".join(lines), indent=13)


def _paper(result: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "  the paper's runs (Table 2) on this GPU",
        f"    {'':24s}{'exaFLOPs':>10s}{'TPUv3 core-days':>17s}{'GPU-days':>10s}{'cost':>10s}",
    ]
    for row in result["paper"]:
        lines.append(
            f"    {row['recipe']:24s}{row['train_exaflops']:>10,.0f}{row['tpu_v3_core_days']:>17,}{row['gpu_days']:>10,.1f}"
            f"{'$' + format(row['cost'], ',.0f'):>10s}"
        )
    return lines


def _prepare(prepare: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"  prepare      {prepare['images']:,} originals, {bytes_text(prepare['input_bytes'])}: {_few(prepare['core_hours'])} core-hours,",
        f"               {hours_text(prepare['hours'])} on {plural(prepare['cores'], 'core')}",
    ]
    for name, row in prepare["output"].items():
        lines.append(
            f"    {name:10s}{bytes_text(row['bytes']):>10s} in {plural(row['shards'], 'shard')}, ${row['storage_cost_per_month']:,.0f} a month"
        )
    return lines


def _cores(result: dict[str, Any]) -> list[str]:
    """CPU cores per GPU, compared with the request of the recipe."""
    needed, asked = result["data"]["jpeg"]["cores_per_gpu"], result["hardware"]["cpus_per_worker"]
    patches = result["data"]["patches"]["cores_per_gpu"]
    line = f"  CPU cores {needed} per GPU from jpeg, {patches} from patches; the recipe requests {asked:g}"
    waits = f"               give --cpus-per-worker {needed}, or the GPU waits for images"
    return ["", line, *([waits] if needed > asked else [])]


def _limits(run: dict[str, Any]) -> list[str]:
    """The speeds that the other parts of the run would allow."""
    others = [name for name in run["limits"] if name != run["limited_by"]]
    return [f"               {run['limits'][name]:,.0f} img/s allowed by {LIMITS[name]}" for name in others]


def _few(value: float) -> str:
    """Two significant digits for small numbers, and integers for large ones: 0.023, 1,204."""
    return f"{value:,.0f}" if value >= 10 or not value else f"{value:.2g}"


def hours_text(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 96 else f"{hours / 24:.1f} days"
