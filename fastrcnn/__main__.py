"""`python -m fastrcnn`, which torchrun needs: `torchrun --nproc_per_node=8 -m fastrcnn train`."""

from fastrcnn.cli import main

main()
