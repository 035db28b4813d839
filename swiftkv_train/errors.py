"""The two ways a command ends when it does not succeed; the command line makes of each one line and a status."""


class UserError(Exception):
    """The user's input is wrong (exit status 2). One line that names the file, key or value and what to do."""


class RunError(Exception):
    """The input was right but the work failed (exit status 1). One line that says what is left and what to do."""
