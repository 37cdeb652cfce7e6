"""The one exception that means "the user can fix this"."""


class InputError(Exception):
    """Bad input: one sentence that names the file or the field, and the fix.

    The command line prints the message without a traceback and exits 2.
    """
