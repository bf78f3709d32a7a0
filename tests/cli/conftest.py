"""The command line as a user runs it, in this process."""

import pytest

from fastrcnn.cli import main


@pytest.fixture
def fastrcnn_command(capsys):
    """fastrcnn_command("train", arguments…) → (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        return code, *capsys.readouterr()

    return run
