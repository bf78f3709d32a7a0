"""`fastrcnn convert-weights`, from a checkout."""

import sys

from fastrcnn.cli import main

if __name__ == "__main__":
    main(["convert-weights", *sys.argv[1:]])
