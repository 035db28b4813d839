"""The two ways a command ends when it does not succeed; the command line turns each into one line and an exit status."""


class UserError(Exception):
    """The user's input is wrong (exit status 2). The message is one line: it names the file, key or value and what to do."""


class RunError(Exception):
    """The input was right but the work failed, for instance a full disk (exit status 1). One line, says what is left and what to do."""
