"""The error that a user can cause."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message names the bad value, where it was found, and what to do. Programs print it alone, without a traceback,
    and exit with status 2; every other exception is a defect of ours and keeps its traceback.
    """
