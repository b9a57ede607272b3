"""Worker processes: what they make comes back in order, whatever happens to them or to shared memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.images import ImageArray
from pipelines.order import Order
from pipelines.reference import reference_evaluation, reference_steps
from pipelines.workers import made_by_workers
from stec.commands import Policy
from stec.errors import UserError
from tests.runs import PROCESSES


def squared(key: int) -> int:
    return key**2


def large(key: int) -> NDArray[np.int64]:
    """More than a pipe holds, so that a worker waits in the middle of it until it is fetched."""
    return np.full(2**20, key)


def interrupted(key: int) -> int:
    """What a scheduler sends to all processes of a job, workers included."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return key


def no_file(key: int) -> bytes:
    return Path(f"/nowhere/{key}").read_bytes()


def test_items_come_in_order() -> None:
    for count in (1, 3):
        assert list(made_by_workers(squared, range(20), count)) == [key**2 for key in range(20)]
    endless = made_by_workers(large, itertools.count(), 2)
    assert [int(item[-1]) for item in itertools.islice(endless, 7)] == list(range(7))
    endless.close()
    assert not multiprocessing.active_children()


def test_workers_leave_stopping_to_the_main_process() -> None:
    assert list(made_by_workers(interrupted, range(4), 2)) == list(range(4))


def test_a_killed_worker_is_reported_even_in_the_middle_of_an_item() -> None:
    items = made_by_workers(large, itertools.count(), 2)
    next(items)
    time.sleep(0.5)  # both have made what was asked for, and wait in the middle of the next
    process = multiprocessing.active_children()[0]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"SIGKILL.*--num_workers") as raised:
        list(itertools.islice(items, 20))
    assert raised.value.local
    assert not multiprocessing.active_children()


def test_a_worker_that_fails_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="exit code 1"):
        next(made_by_workers(no_file, range(4), 2))
    assert "FileNotFoundError" in capfd.readouterr().err


def _without_shared_memory(pixels: NDArray[np.uint8]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a server of its own would load PyTorch again
    # Shared memory is made of files, too, which may not grow to what an item takes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    images = ImageArray(pixels=pixels, labels=np.arange(len(pixels)))
    order = Order(images, Policy(), seed=0, batch_size=16)
    one, several = (
        [views for views, _, _ in itertools.islice(reference_steps(order, 0, workers), 4)] for workers in (0, 2)
    )
    batches = list(np.arange(64).reshape(4, 16))
    plain, made = (list(reference_evaluation(images, batches, None, 32, workers)) for workers in (0, 2))
    same = all((a == b).all() for a, b in zip([*one, *plain], [*several, *made], strict=True))
    os._exit(0 if same else 1)


def test_no_shared_memory_is_needed(demo_test_images: ImageArray) -> None:
    process = PROCESSES.Process(target=_without_shared_memory, args=(demo_test_images.pixels[:64],))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def _wait_with_workers(connection: Connection[Any, Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)
    items = made_by_workers(large, itertools.count(), 3)
    next(items)
    connection.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(60)


def test_workers_end_with_the_main_process() -> None:
    ours, its = multiprocessing.Pipe()
    process = PROCESSES.Process(target=_wait_with_workers, args=(its,))
    process.start()
    workers = ours.recv()
    process.kill()
    process.join()
    assert len(workers) == 3
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
