"""The exceptions whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message is one sentence with the offending value and the remedy.

    ``launch.py`` prints the message without a traceback and exits with code 2. An error that all processes run into is
    printed by the main one; a ``local`` one, such as a file that one process cannot read, by the process that met it.
    """

    def __init__(self, message: str, *, local: bool = False) -> None:
        super().__init__(message)
        self.local = local


class BadImage(UserError):
    """An image that cannot be used: ``name`` and ``reason`` for a person, ``image_id`` for the code that goes on."""

    def __init__(self, name: str, image_id: int, reason: str) -> None:
        super().__init__(f"{name} cannot be used: {reason}; replace it or delete it.", local=True)
        self.name, self.image_id, self.reason = name, image_id, reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, int, str]]:
        # Exceptions are rebuilt from their message alone otherwise, which fails on the way out of a worker process.
        return BadImage, (self.name, self.image_id, self.reason)


class Interrupted(BaseException):
    """Training was stopped from outside; the message says how to go on, ``exit_code`` is the program's.

    Raised in the middle of anything, so, as KeyboardInterrupt, no Exception that a library may catch.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
