"""Reads command lines with the parsers of the programs that they start, without running these."""

import argparse
import contextlib
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import tyro

from pipeline.graph import commands

ROOT = Path(__file__).parents[1]


class Parsed(Exception):
    """Stops a program after its command line is read; holds the config."""


def parse_job(job, argv, monkeypatch):
    """The config that jobs/<job>.py reads from argv, by its own main(); None for a command that prints help."""
    if job == "pipeline":
        command = argv[0] if argv[0] in commands.COMMANDS else "run"
        with help_may_exit(argv):
            if command in ("schema", "promote"):  # the first has no flags, the second a parser of its own
                return commands.main(argv, "", print)
            return commands.parse(command, argv[argv[0] == command :])[0]
        return None
    name = f"jobs_{job}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "jobs" / f"{job}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    read = tyro.cli

    def stop(*args, **options):
        raise Parsed(read(*args, **options))

    def stop_at_repair(run, delete):  # jobs/pretrain.py --repair does not train
        raise Parsed(run)

    with monkeypatch.context() as patch, help_may_exit(argv):
        patch.setattr(tyro, "cli", stop)
        patch.setattr("pipeline.training.checkpoint.repair", stop_at_repair)
        with pytest.raises(Parsed) as parsed:
            sys.modules[name].main(argv)
        return parsed.value.args[0]
    return None


@contextlib.contextmanager
def help_may_exit(argv):
    """Accepts the exit with code 0 of a command that asks for help or a list."""
    try:
        yield
    except SystemExit as ended:
        if ended.code or not {"--help", "--help-all", "--list-recipes"} & set(argv):
            raise


def parse_script(path, argv, monkeypatch):
    """The options that another program of the project, with argparse, reads from argv. For a program without a parser: whether
    it knows the flags."""
    text = (ROOT / path).read_text()
    if "ArgumentParser" not in text:
        assert all(word in text for word in argv if word.startswith("--")), f"{path} does not read {argv}"
        return None
    read = argparse.ArgumentParser.parse_args

    def stop(self, *args, **options):
        raise Parsed(read(self, *args, **options))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(ROOT / path), *argv])
        patch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(str(ROOT / path), run_name="__main__")
    return parsed.value.args[0]
