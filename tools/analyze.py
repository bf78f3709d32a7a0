"""`fastrcnn analyze`, from a checkout."""

import sys

from fastrcnn.cli import main

if __name__ == "__main__":
    main(["analyze", *sys.argv[1:]])
