"""`fastrcnn show-data`, from a checkout."""

import sys

from fastrcnn.cli import main

if __name__ == "__main__":
    main(["show-data", *sys.argv[1:]])
