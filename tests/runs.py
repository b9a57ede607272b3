"""The command line in processes that have loaded PyTorch already, as loading takes longer than training here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipelines.datasets import demo

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "launch",
        "stec.evaluation.embed",
        "stec.cli.train",
        "torch",
        "accelerate",
        "pipelines.executors.graph",
        "pipelines.loader",
        "stec.training.loop",
        "stec.runs.run_folder",
    ]
)
SMALL_DEMO = {"train": 256, "test": 64}
"""Images of the demo set, for quick evaluations."""

Prepare = Callable[[], None]
"""What a process does before anything else, say to bring a fault about."""
_started: list[Any] = []
_ports: list[socket.socket] = []


def leave_nothing_running() -> None:
    """A failed test must not leave a stopped process behind, which Python would wait for at its end."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()
    while _ports:
        _ports.pop().close()


def _run(arguments: list[str], logs: Sequence[str], prepare: Prepare | None, environment: dict[str, str]) -> None:
    for descriptor, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY), descriptor)
    os.environ.update(environment)
    demo.IMAGES.update(SMALL_DEMO)
    import launch

    if prepare is not None:
        prepare()
    code = launch.main(arguments)
    sys.stdout.flush()
    os._exit(code)


class Run:
    """``launch.py`` with these arguments, in a process of its own."""

    def __init__(
        self, *arguments: str | Path, prepare: Prepare | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.logs = [tempfile.mkstemp(prefix="run-")[1] for _ in range(2)]
        self.out = self.err = ""
        # What the test has set does not reach the process from which this one is forked.
        here = {name: value for name, value in os.environ.items() if name.startswith(("XDG_", "ACCELERATE_", "CXX"))}
        started = [*map(str, arguments)], self.logs, prepare, {**here, **(environment or {})}
        self.process = PROCESSES.Process(target=_run, args=started)
        self.process.start()
        _started.append(self.process)

    def end(self, code: int = 0) -> str:
        """Wait for it; returns what was printed, on ``out`` and then on ``err``."""
        self.process.join(120)
        self.out, self.err = (Path(log).read_text() for log in self.logs)
        output = self.out + self.err
        assert self.process.exitcode == code, output
        assert "Traceback" not in output
        for log in self.logs:
            Path(log).unlink()
        return output


def together(count: int, *arguments: str | Path, prepare: Sequence[Prepare | None] = ()) -> list[Run]:
    """So many processes that train or evaluate together, as a launcher starts them."""
    # Bound until the test's end, so that no other process is given it, but not listening, so that the main one can.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _ports.append(held)
    port = str(held.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Run(
            *arguments,
            prepare=prepare[rank] if rank < len(prepare) else None,
            environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


@dataclass(frozen=True)
class SignalAtStep:
    """Sends this process a signal during a step."""

    step: int
    number: signal.Signals

    def __call__(self) -> None:
        from stec.training.stops import StopRequests

        after_step, steps = StopRequests.after_step, 0

        def signalled(self_: StopRequests, *, last: bool) -> int:
            nonlocal steps
            steps += 1
            if steps == self.step:
                os.kill(os.getpid(), self.number)
            return after_step(self_, last=last)

        patch.object(StopRequests, "after_step", signalled).start()
