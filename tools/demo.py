"""`fastrcnn demo`, from a checkout."""

import sys

from fastrcnn.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
