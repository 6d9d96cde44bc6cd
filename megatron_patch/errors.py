"""The one exception that means: the input is wrong, the program is not."""


class UserError(ValueError):
    """Bad user input.  The message says what, got, wanted and remedy; command lines print it and exit with code 2."""
