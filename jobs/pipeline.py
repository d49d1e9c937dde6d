"""Run a whole pipeline from one file: from raw images to scores and a promoted model (docs/pipeline.md).

    python jobs/pipeline.py run FILE.yaml            unfinished stages
    python jobs/pipeline.py run --recipe demo        prepare, pretrain, transfer
    python jobs/pipeline.py run FILE.yaml --dry-run  the plan and its cost
    python jobs/pipeline.py status FILE.yaml         done, running, or stale
    python jobs/pipeline.py stop FILE.yaml [STAGE]   running stages save first
    python jobs/pipeline.py export FILE.yaml --to argo|airflow|commands|yaml
    python jobs/pipeline.py schema                   JSON schema, for editors
    python jobs/pipeline.py promote --help           the rule for the champion

The word run may be left out. As a Ray job (ray job submit --working-dir . -- python jobs/pipeline.py run FILE.yaml), or
with --address from outside the cluster, each stage is a Ray job. Exit codes: 0 all done, 1 a stage failed, 2 wrong
input, 75 another run goes on or a store is away, 130 and 143 stopped."""

# This file has the same name as the `pipeline` package, and Python puts the folder of a script first on sys.path. So
# `import pipeline` in a job, its Ray workers or its spawned processes may find this file instead of the package. In
# that case this file removes its folder from sys.path and imports the package. The caller gets the package, because
# `import` returns the entry of sys.modules after a module has run.
import os
import sys

_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != _HERE]
if __name__ == "pipeline":
    import importlib

    del sys.modules["pipeline"]
    importlib.import_module("pipeline")
else:
    from pipeline import config
    from pipeline.graph import commands

    def main(argv: list[str]) -> int:
        return commands.main(argv, __doc__ or "", print)

    if __name__ == "__main__":
        config.run_job(main)
