"""The exceptions whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message is one sentence with the offending value and the remedy.

    ``launch.py`` prints the message without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """Training was stopped from outside, after a checkpoint; the message says how to go on. Exit code 130."""
