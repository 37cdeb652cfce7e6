"""The exceptions that the command line prints as a one-line message, and the exit codes."""

import os
from pathlib import Path

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 75


class InputError(Exception):
    """Bad input. The message names the file or the field, and the fix, in one line.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = EXIT_BAD_INPUT


class RunFailed(Exception):
    """A run that cannot continue. The message says why, and what was saved, in one line.

    The command line prints the message without a traceback and exits 1.
    """


def missing_package(use: str, error: ModuleNotFoundError, requirement: str) -> InputError:
    """The error that a use, such as "gs:// paths need", lacks a package that an extra installs."""
    return InputError(f"{use} the package {error.name}; install the extra with pip install '{requirement}'")


def failed_path(error: OSError, default: os.PathLike[str]) -> Path:
    """The path that could not be written, according to the error, or its nearest parent that exists."""
    path = Path(os.fsdecode(error.filename2 or error.filename or default))
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
