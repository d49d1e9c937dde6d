"""A plan for people."""

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The plan for people."""
    model, hardware, run = result["model"], result["hardware"], result["run"]
    memory, checkpoint = result["memory"], result["checkpoint"]
    lines = [
        f"{result['recipe']}: {model['variant']} at {model['image_size']} px on {hardware['gpus']} x {hardware['gpu']}, "
        f"{hardware['mfu']:.0%} MFU",
        f"  model        {model['parameters'] / 1e6:,.1f}M parameters, {model['forward_gflops_per_image']:,.2f} GFLOPs per image forward",
        f"  corpus       {run['images']:,} images, {run['classes']:,} classes",
        f"  run          {run['steps']:,} steps, {run['images_seen']:,} images seen, {run['train_exaflops']:,.4g} exaFLOPs",
        f"  speed        {run['images_per_second']:,.0f} img/s, {run['step_seconds']:.3g} s a step",
        f"  time         {hours_text(run['hours'])}, {run['gpu_hours']:,.0f} GPU-hours, ${run['cost']:,.0f}",
        "",
        f"  memory per GPU ({_size(memory['usable'])} usable; activations {_size(memory['activations_per_image'])} an image, "
        f"{memory['images_per_gpu']} images per GPU and step)",
        f"    {'':10s}{'model states':>14s}{'buffers':>10s}{'micro-batch':>13s}{'accumulate':>12s}{'used':>10s}",
    ]
    for stage, row in memory["stages"].items():
        chosen = "  <- recipe" if int(stage) == memory["stage"] else ""
        micro, accumulation = (row["micro_batch"], row["accumulation"]) if row["micro_batch"] else ("none fits", "")
        lines.append(
            f"    {f'ZeRO-{stage}':10s}{_size(row['model_states']):>14s}{_size(row['buffers']):>10s}{micro:>13}{accumulation:>12}"
            f"{_size(row['used']):>10s}{chosen}"
        )
    lines += [
        "",
        f"  data plane for {run['images_per_second']:,.0f} img/s",
        f"    {'':10s}{'an image':>10s}{'stored':>10s}{'$/month':>9s}{'read at':>12s}{'cores':>8s}{'read in all':>13s}{'GETs $':>8s}",
    ]
    for name, row in result["data"].items():
        lines.append(
            f"    {name:10s}{_size(row['bytes_per_image']):>10s}{_size(row['stored']):>10s}{row['storage_cost_per_month']:>9,.0f}"
            f"{_size(row['read_bytes_per_second']) + '/s':>12s}{row['cores']:>8,.1f}{_size(row['read']):>13s}{row['request_cost']:>8,.0f}"
        )
    lines += _cores(result)
    lines += [
        "",
        f"  checkpoint   {_size(checkpoint['total'])} ({_size(checkpoint['weights'])} weights), written in "
        f"{checkpoint['write_seconds']:.1f} s; {checkpoint['expected_failures']:.2g} failures expected: best every "
        f"{checkpoint['interval_steps']:,} steps ({checkpoint['interval_seconds'] / 60:.0f} min), the recipe has "
        f"{checkpoint['recipe_interval_steps']:,}",
        "",
        "  the paper's runs (Table 2) on this GPU",
        f"    {'':24s}{'exaFLOPs':>10s}{'TPUv3 core-days':>17s}{'GPU-days':>10s}{'cost':>10s}",
    ]
    for row in result["paper"]:
        lines.append(
            f"    {row['recipe']:24s}{row['train_exaflops']:>10,.0f}{row['tpu_v3_core_days']:>17,}{row['gpu_days']:>10,.1f}"
            f"{'$' + format(row['cost'], ',.0f'):>10s}"
        )
    if prepare := result.get("prepare"):
        lines += [
            "",
            f"  prepare      {prepare['images']:,} originals, {_size(prepare['input_bytes'])}: {prepare['core_hours']:,.0f} "
            f"core-hours, {hours_text(prepare['hours'])} on {prepare['cores']} cores",
        ]
        for name, row in prepare["output"].items():
            lines.append(
                f"    {name:10s}{_size(row['bytes']):>10s} in {row['shards']:,} shards, ${row['storage_cost_per_month']:,.0f} a month"
            )
    return "\n".join(lines)


def _cores(result: dict[str, Any]) -> list[str]:
    """CPU cores for each GPU, beside what the recipe asks for."""
    needed, asked = result["data"]["jpeg"]["cores_per_gpu"], result["hardware"]["cpus_per_worker"]
    patches = result["data"]["patches"]["cores_per_gpu"]
    line = f"  CPU cores    {needed} a GPU from jpeg, {patches} from patches; the recipe asks for {asked:g}"
    if needed > asked:
        line += f": give --cpus-per-worker {needed}, or the GPU waits for images"
    return ["", line]


def _size(count: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def hours_text(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 96 else f"{hours / 24:.1f} days"
