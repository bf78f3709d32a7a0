"""`fastrcnn test`, from a checkout."""

import sys

from fastrcnn.cli import main

if __name__ == "__main__":
    main(["test", *sys.argv[1:]])
