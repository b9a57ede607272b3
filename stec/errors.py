"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message is one sentence with the offending value and the remedy.

    ``launch.py`` prints the message without a traceback and exits with code 2.
    """
