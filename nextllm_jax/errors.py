"""The exceptions that the command line turns into one sentence and an exit code, and the codes."""

import os
from pathlib import Path

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 75


class InputError(Exception):
    """Bad input: one sentence that names the file or the field, and the fix.

    The command line prints the message without a traceback and exits 2.
    """


class RunFailed(Exception):
    """A run that cannot go on: one sentence that says why and what stands.

    The command line prints the message without a traceback and exits 1.
    """


def failed_path(error: OSError, default: os.PathLike[str]) -> Path:
    """What a failure to write is about: the path that the system named, or the nearest directory of it that exists."""
    path = Path(os.fsdecode(error.filename2 or error.filename or default))
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
