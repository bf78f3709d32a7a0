"""`fastrcnn convert-cityscapes`, under its name in maskrcnn-benchmark."""

import sys

from fastrcnn.cli import main

if __name__ == "__main__":
    main(["convert-cityscapes", *sys.argv[1:]])
