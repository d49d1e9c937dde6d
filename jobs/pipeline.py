"""A whole pipeline in one file and one command: from raw images to scores and a promoted model (docs/pipeline.md).

    python jobs/pipeline.py run FILE.yaml            what is not done yet
    python jobs/pipeline.py run --recipe demo        prepare, pretrain, transfer
    python jobs/pipeline.py run FILE.yaml --dry-run  what would run, its cost
    python jobs/pipeline.py status FILE.yaml         done, running, or stale
    python jobs/pipeline.py stop FILE.yaml [STAGE]   what runs saves itself
    python jobs/pipeline.py export FILE.yaml --to argo|airflow|commands|yaml
    python jobs/pipeline.py schema                   JSON schema, for editors
    python jobs/pipeline.py promote --help           the rule for the champion

The word run may be left out. As a Ray job (ray job submit --working-dir . -- python jobs/pipeline.py run FILE.yaml), or
with --address from outside the cluster, each stage is a Ray job. Exit codes: 0 all done, 1 a stage failed, 2 wrong input,
75 another run goes on or a store is away, 130 and 143 stopped.
"""

# The name of this file is that of the project's package, and the folder of a started script leads Python's search path. So
# `import pipeline` in any job, in its Ray workers and in its spawned processes may find this file first. It then takes its
# folder out of the search and imports the package, which Python hands out, because the import system returns what
# sys.modules holds once a module has run.
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
