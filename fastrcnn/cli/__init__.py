"""The command line: `fastrcnn <command>`, one module of this package for each command.

A module has a docstring (what the command does, in one sentence), EXAMPLES, `add_arguments(parser)` and `run(args)`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import fastrcnn
from fastrcnn.engine.logging import exit_on_user_error

COMMANDS = (
    "train",
    "test",
    "demo",
    "show-data",
    "report",
    "export",
    "analyze",
    "convert-weights",
    "convert-cityscapes",
    "completion",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; `argv` is its name and arguments, by default those of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = arguments[0] if arguments else "--help", arguments[1:]
    if name in COMMANDS:
        module = command(name)
        parser = describe(argparse.ArgumentParser, module, prog=f"fastrcnn {name}")
        module.add_arguments(parser)
        args = parser.parse_intermixed_args(rest)
        with exit_on_user_error():
            module.run(args)
    else:
        whole_parser().parse_args([name, *rest])


def command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def describe(make, module: ModuleType, **arguments) -> argparse.ArgumentParser:
    """A parser, as `make` makes it, with the description and the examples of a command."""
    epilog = f"examples:\n{module.EXAMPLES}"
    formatter = argparse.RawDescriptionHelpFormatter
    return make(description=module.__doc__, epilog=epilog, formatter_class=formatter, **arguments)


def whole_parser() -> argparse.ArgumentParser:
    """The parser of all commands: for --help, for mistakes and for the shell's completion."""
    parser = argparse.ArgumentParser(prog="fastrcnn", description=fastrcnn.__doc__)
    parser.add_argument("--version", action="version", version=f"fastrcnn {fastrcnn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = command(name)
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(describe(commands.add_parser, module, name=name, help=summary))
    return parser
