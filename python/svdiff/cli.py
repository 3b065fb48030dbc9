"""The command line: ``svdiff <command> --flags``.

Each command is a function of one dataclass, and the flags are that dataclass's fields: what a script can do, a Python
program can. A user's mistake is one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .termination import exit_if_told, exit_on_signals


@dataclass(frozen=True)
class Command:
    """Where a command lives; nothing is imported before it is asked for."""

    summary: str
    module: str
    config: str
    function: str
    positional: tuple[str, ...] = ()  # flags whose names may be left out, first of all and in this order


COMMANDS = {
    "train": Command("teach a model a subject from a few pictures", "svdiff.train", "TrainConfig", "train"),
    "generate": Command("make pictures, with or without shifts", "svdiff.generate", "GenerateConfig", "generate"),
    "edit": Command("change one picture by words", "svdiff.edit", "EditConfig", "edit"),
    "stylize": Command("draw pictures in a style that was learnt", "svdiff.stylize", "StylizeConfig", "stylize"),
    "combine": Command(
        "make shifts of shifts: add, scale, interpolate, mix by layers",
        "svdiff.combine",
        "CombineConfig",
        "combine",
        ("operation",),
    ),
    "merge": Command(
        "concepts that were trained apart made one, in closed form", "svdiff.merge", "MergeConfig", "merge"
    ),
    "export": Command(
        "shifts as merged weights, a LoRA, or svdiff-pytorch's files",
        "svdiff.export",
        "ExportConfig",
        "export",
        ("format",),
    ),
    "extract": Command(
        "the shifts nearest to a fine-tuned model or a LoRA", "svdiff.extract", "ExtractConfig", "extract", ("source",)
    ),
    "evaluate": Command(
        "measure pictures: alignment with text and subject, KID, FID, diversity, drift",
        "svdiff.evaluate",
        "EvaluateConfig",
        "evaluate",
    ),
    "demo": Command("the whole job in minutes on the built-in miniature model", "svdiff.demo", "DemoConfig", "demo"),
    "bench": Command("measure against what else could be used", "svdiff.bench", "BenchConfig", "bench", ("level",)),
    "cache": Command(
        "build, share, list, verify or prune the stored decompositions",
        "svdiff.cache",
        "CacheConfig",
        "cache",
        ("action", "model", "remote"),
    ),
    "ui": Command(
        "train, draw and edit on a page in the browser",
        "svdiff.ui",
        "UIConfig",
        "ui",
        ("pretrained_model_name_or_path",),
    ),
    "info": Command("what is built, what is used, and why not the rest", "svdiff.info", "InfoConfig", "info"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after a user's mistake, 130 after Ctrl-C, 143 if told to end."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = _command_name(argv[:1])
    exit_on_signals()
    _quieten_libraries()
    try:
        return _run(name, argv[1:])
    except KeyboardInterrupt:
        return 130


def _run(name: str, argv: list[str]) -> int:
    from svdiff_kernels import SVDiffError  # from here on imports take seconds

    from .extras import lacking
    from .processes import FailedElsewhereError, is_first

    try:
        command = COMMANDS[name]
        module = importlib.import_module(command.module)
        config = _parse(name, command, getattr(module, command.config), argv)
        function: Callable[[Any], object] = getattr(module, command.function)
        result = function(config)
        if result is not None and is_first():
            print(result)
        return 0
    except Exception as error:
        exit_if_told()
        if isinstance(error, ModuleNotFoundError):
            error = lacking(error, f"svdiff {name}") or error
        if not isinstance(error, SVDiffError):
            raise
        if not isinstance(error, FailedElsewhereError):
            print(f"svdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        told = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes one a machine
        self.exit(2, f"svdiff: error: {message} (see {self.prog} --help)\n" if told else None)


def _command_name(argv: list[str]) -> str:
    parser = _Parser(
        prog="svdiff",
        description="Fine-tune text-to-image models by the singular values of their weights.",
        epilog="svdiff <command> --help lists a command's flags",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return str(parser.parse_args(argv).command)


def _parse(name: str, command: Command, config: Any, argv: list[str]) -> Any:
    if not fields(config):
        _Parser(prog=f"svdiff {name}", description=command.summary).parse_args(argv)
        return config()
    from transformers import HfArgumentParser

    class ConfigParser(HfArgumentParser, _Parser):
        pass

    named = []
    for flag in command.positional:
        if not argv or argv[0].startswith("-"):
            break
        named += [f"--{flag}", argv.pop(0)]
    make_parser: Any = ConfigParser  # mypy sees the other base's arguments
    parser = make_parser(
        config,
        prog=f"svdiff {name}",
        description=command.summary,
        epilog="--config FILE reads flags from a YAML file; those on the command line come after",
        allow_abbrev=False,
    )
    flags = {flag.lstrip("-") for action in parser._actions if action.nargs != 0 for flag in action.option_strings}
    argv = named + _with_config_file(argv, flags)
    parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    return parsed


def _with_config_file(argv: list[str], known: set[str]) -> list[str]:
    """The arguments with those of ``--config FILE`` put in front."""
    if "config" in known or not any(argument.split("=")[0] == "--config" for argument in argv):
        return argv
    from svdiff_kernels import SVDiffError

    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", required=True)
    found, rest = finder.parse_known_args(argv)
    flags: list[str] = []
    for key, value in _read_settings(found.config).items():
        if key not in known:
            raise SVDiffError(f"{found.config}: there is no setting {key!r}")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, str) for one in values):
            raise SVDiffError(f"{found.config}: {key} must be a value, or a list of values")
        if len(values) == 1:
            flags.append(f"--{key}={values[0]}")  # even if it begins with a dash
        elif values:
            flags += [f"--{key}", *values]
    return flags + rest


def _read_settings(path: str) -> dict[str, Any]:
    """A YAML file's values as they are written there: ``mixed_precision: no`` means "no", as on the command line."""
    import yaml

    from svdiff_kernels import SVDiffError

    class AsWritten(yaml.BaseLoader):
        pass

    null = "tag:yaml.org,2002:null"
    AsWritten.add_implicit_resolver(null, re.compile("null|~|$"), ["n", "~", ""])
    AsWritten.add_constructor(null, lambda loader, node: None)
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, AsWritten)  # makes texts, lists and dictionaries, nothing else
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SVDiffError(f"cannot read the settings in {path}: {reason}") from error
    if not isinstance(settings, dict):
        raise SVDiffError(f"{path} must hold settings, one a line, such as seed: 1")
    return settings


def _quieten_libraries() -> None:
    """Other libraries' notices and bars would bury ours."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "critical")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it asks for a kernel that we never use
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.showwarning = lambda message, *_, **__: print(f"svdiff: warning: {message}", file=sys.stderr)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("svdiff-kernels")
    except PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
