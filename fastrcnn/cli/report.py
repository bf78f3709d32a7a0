"""Writes the report of a training run: one HTML file with its figures, curves, best and worst images."""

import argparse
from pathlib import Path

from fastrcnn.report import write_report

EXAMPLES = """  fastrcnn report output/quick_start
      report.html in that folder, as fastrcnn train leaves it; again after fastrcnn test --weights output/quick_start
  fastrcnn report output/quick_start --output /tmp/shapes.html
      another file; it holds its pictures and can be sent as it is

Datasets lie in ./datasets, or in the folder that FASTRCNN_DATASETS names; without them the report has no pictures.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, its OUTPUT_DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML file to write (default: RUN/report.html)")


def run(args: argparse.Namespace) -> None:
    print(f"written to {write_report(args.run, args.output)}")
