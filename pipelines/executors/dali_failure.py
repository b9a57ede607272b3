"""Parses the errors of DALI operators: whether an image is the cause, and one sentence for the user if not."""

from __future__ import annotations

import re

from pipelines.errors import UserError

IMAGE_OPERATORS = ("decoders.image", "peek_image_shape", "io.file.read")
FRAME_OF_MESSAGE = r"\s*(Critical error in pipeline|Error in \w+ operator|Current pipeline object|Stacktrace|$)"
"""Lines of DALI's messages around the actual error."""


class DaliFailure:
    """An error of a DALI operator: its name and reason."""

    def __init__(self, error: RuntimeError | str) -> None:
        text = str(error)
        operator = re.search(r"operator `nvidia\.dali\.fn\.([\w.]+)`", text)
        self.operator = operator[1] if operator else ""
        # Between the two is the Python traceback of the operator's definition.
        message = text.rpartition("encountered:")[2].splitlines()
        lines = [line.strip() for line in message if line.strip() and not re.match(FRAME_OF_MESSAGE, line)]
        self.reason = lines[0].rstrip(" :.") if lines else "for an unknown reason"
        self._lowered = " ".join(message).lower()

    @property
    def is_about_an_image(self) -> bool:
        """Whether the cause is an image or its file, and not memory, the GPU or its driver."""
        return self.operator.startswith(IMAGE_OPERATORS) and not (self._out_of_memory or self._at_the_gpu)

    def for_user(self) -> UserError:
        """One sentence with the remedy, for a failure that is not about an image."""
        where = f" in {self.operator}" if self.operator else ""
        if "driver version" in self._lowered or "insufficient driver" in self._lowered:
            remedy = "update the GPU's driver"
        elif self._out_of_memory:
            remedy = "reduce --batch_size or --num_workers, or stop other programs"
        elif self._at_the_gpu:
            remedy = "check the GPU with nvidia-smi"
        else:
            remedy = "try again"
        return UserError(f"DALI failed{where} ({self.reason}); {remedy}, or use --backend torchvision.", local=True)

    @property
    def _out_of_memory(self) -> bool:
        signs = ("out of memory", "bad_alloc", "cannot allocate", "can't allocate", "memoryallocation")
        return any(sign in self._lowered for sign in signs)

    @property
    def _at_the_gpu(self) -> bool:
        return any(sign in self._lowered for sign in ("cuda", "nvml", "gpu"))
