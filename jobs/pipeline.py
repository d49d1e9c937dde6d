"""A whole pipeline in one file and one command: from raw images to scores and a promoted model."""

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

    def main(argv: list[str]) -> int:
        print(config.__name__, sys.modules["pipeline"].__file__)
        return 0

    if __name__ == "__main__":
        config.run_job(main)
