r"""Pre-train a Vision Transformer on a dataset that jobs/prepare.py wrote.

    python jobs/pretrain.py                            the demo recipe
    python jobs/pretrain.py --recipe b16_imagenet --workers 16 --dry-run \
        --data s3://bucket/data/train --output s3://bucket/runs/b16
    python jobs/pretrain.py --repair runs/x            checks every checkpoint
    python jobs/pretrain.py --repair runs/x --delete   removes the broken ones

A recipe sets all hyperparameters, and each flag overrides one. --dry-run prints
the plan and exits. Repeating a command continues its run from the last complete
checkpoint, also on another number of workers that divides the lanes.
"""

from pipeline import cluster, help, logs
from pipeline.config import diff, parse_recipe, run_job
from pipeline.errors import UserError
from pipeline.lines import fit
from pipeline.training.recipes import RECIPES


def main(argv: list[str]) -> int:
    repair = help.ArgumentParser(add_help=False)
    repair.add_argument("--repair")
    repair.add_argument("--delete", action="store_true")
    wanted, argv = repair.parse_known_args(argv)
    if wanted.delete and not wanted.repair:
        raise UserError("--delete needs --repair URI")
    if wanted.repair:
        from pipeline.training import checkpoint

        lines, is_sound = checkpoint.repair(wanted.repair, wanted.delete)
        print(fit("\n".join(lines)))
        return 0 if is_sound else 1
    config, base, recipe = parse_recipe(argv, RECIPES, "demo", prog="jobs/pretrain.py", description=__doc__ or "")
    from pipeline.operations import doctor, next_steps
    from pipeline.training import run

    runtime = config.runtime
    if runtime.dry_run:
        from pipeline.operations.planning.preview import dry_run

        print(dry_run(config, recipe, diff(config, base)))
        return 0
    doctor.preflight(runtime.address, runtime.tracking_uri)
    cluster.configure(runtime.address, num_cpus=max(2, round(runtime.workers * runtime.cpus_per_worker)))
    try:
        result = run.pretrain(config, base, recipe=recipe)
    except run.IncompleteRun as error:
        print(fit(run.summarize(error.result)))
        raise
    if "images" in result:
        print(fit(run.summarize(result)))
    for version, checkpoint in result["registered"].items():
        print(fit(f"pretrain: registered={version} {checkpoint}"))
    logs.show(next_steps.after_pretraining(config))
    return 0


if __name__ == "__main__":
    run_job(main)
