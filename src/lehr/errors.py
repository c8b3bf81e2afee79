"""The one exception for faults that the user can mend."""


class InputError(ValueError):
    """A fault in what the user gave; its message is one sentence that says what to do.

    The command line prints the message alone and exits with code 2.
    """
