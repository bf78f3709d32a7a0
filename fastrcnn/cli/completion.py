"""Prints the completion script of a shell for the command fastrcnn."""

import argparse

from fastrcnn import cli
from fastrcnn.extras import require

EXAMPLES = """  fastrcnn completion bash >> ~/.bash_completion
      for bash; a new shell then completes commands, flags and files
  fastrcnn completion zsh > ~/.zfunc/_fastrcnn
      for zsh, with ~/.zfunc in its fpath
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: argparse.Namespace) -> None:
    shtab = require("shtab", extra="completion", why="completion scripts")
    print(shtab.complete(cli.whole_parser(), args.shell))
