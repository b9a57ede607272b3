"""Exceptions with a message for the user."""


class UserError(Exception):
    """An error that the user can fix; the message is one sentence with the value and the remedy.

    ``launch.py`` prints it without a traceback and exits with code 2. The main process prints an error that all
    processes raise; a ``local`` error, such as an unreadable file, is printed by the process that raises it.
    """

    def __init__(self, message: str, *, local: bool = False) -> None:
        super().__init__(message)
        self.local = local


class BadImage(UserError):
    """An image that cannot be used: its ``name`` and the ``reason`` for the user, its ``image_id`` for the caller."""

    def __init__(self, name: str, image_id: int, reason: str) -> None:
        super().__init__(f"{name} cannot be used: {reason}; replace it or delete it.", local=True)
        self.name, self.image_id, self.reason = name, image_id, reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, int, str]]:
        # By default, unpickling calls the class with the message alone, which fails.
        return BadImage, (self.name, self.image_id, self.reason)


class Interrupted(BaseException):
    """Training was stopped by a signal; the message is how to continue, ``exit_code`` the program's exit code.

    It can be raised anywhere, so it is no Exception, which libraries may catch; neither is KeyboardInterrupt.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
