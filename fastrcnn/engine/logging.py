"""Messages: to the terminal without tearing progress bars, and to OUTPUT_DIR/log.txt."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from fastrcnn.data import SampleError
from fastrcnn.engine import distributed

logger = logging.getLogger("fastrcnn")
# what a user can mend: told in one message. RuntimeError and the rest are ours and keep their stack trace
USER_ERRORS = (ValueError, OSError, FloatingPointError)


class _TqdmHandler(logging.Handler):
    """Prints above the progress bars that are running."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def has_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar makes sense."""
    return sys.stderr.isatty()


@contextmanager
def log_to(folder: str | Path) -> Iterator[None]:
    """For the length of the block, the messages of rank 0 go to stderr and, with stack traces, to `folder`/log.txt."""
    if not distributed.is_main():
        before = logger.disabled
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    terminal, file = _TqdmHandler(logging.INFO), logging.FileHandler(Path(folder) / "log.txt", encoding="utf-8")
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(terminal)
    logger.addHandler(file)
    try:
        yield
    except BaseException as error:
        logger.debug("stopped by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        logger.removeHandler(terminal)
        logger.removeHandler(file)
        file.close()
        logger.level, logger.propagate = before


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """For command-line tools: a mistake of the user ends with one message and exit code 2, Ctrl-C with 130; a defect
    keeps its trace.

    All processes of a machine meet the same mistakes, so the first one tells it; but each reads its own images.
    """
    try:
        yield
    except USER_ERRORS as error:
        if distributed.is_first_here() or isinstance(error, SampleError):
            where = "" if distributed.is_main() else f" in process {distributed.rank()}"
            print(f"error{where}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        if distributed.is_main():
            print(str(error) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
