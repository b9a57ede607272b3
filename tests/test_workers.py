"""Worker processes of the torchvision backend need no shared memory, and end with the others and the main process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray
from pipelines.errors import UserError
from pipelines.executors.torchvision import Step, evaluation_batches, training_steps
from pipelines.sampler import Sampler
from tests.runs import PROCESSES


def images_of(pixels: NDArray[np.uint8]) -> ImageArray:
    return ImageArray(pixels=pixels, labels=np.arange(len(pixels)))


def steps(pixels: NDArray[np.uint8], workers: int) -> Any:
    """Steps larger than the buffer of a pipe, so that workers block until their step is fetched."""
    return training_steps(Sampler(images_of(pixels), Policy(), seed=0, batch_size=64), 0, workers)


def test_a_killed_worker_is_an_error(demo_test_images: ImageArray) -> None:
    """As if memory had run out; the other workers would wait forever."""
    batches = steps(demo_test_images.pixels, 2)
    before = set(multiprocessing.active_children())
    next(batches)
    time.sleep(0.5)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(UserError, match="--num_workers") as raised:
        for _ in batches:
            pass
    assert raised.value.local


def _without_shared_memory(pixels: NDArray[np.uint8]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a fork server would import PyTorch again
    # The limit on the size of files holds for shared memory, too.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    one: list[Step]
    several: list[Step]
    one, several = (list(itertools.islice(steps(pixels, workers), 3)) for workers in (0, 2))
    batches = list(np.arange(64).reshape(4, 16))
    one_plain, several_plain = (
        list(evaluation_batches(images_of(pixels), batches, None, 32, workers)) for workers in (0, 2)
    )
    same = all((a[0] == b[0]).all() for a, b in zip(one, several, strict=True))
    same &= all(bool((a == b).all()) for a, b in zip(one_plain, several_plain, strict=True))
    os._exit(0 if same else 1)


def test_no_shared_memory_is_needed(demo_test_images: ImageArray) -> None:
    process = PROCESSES.Process(target=_without_shared_memory, args=(demo_test_images.pixels[:64],))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def _wait_with_workers(pixels: NDArray[np.uint8], connection: Connection[Any, Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)
    batches = steps(pixels, 3)
    next(batches)
    connection.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(60)


def test_workers_end_with_the_main_process(demo_test_images: ImageArray) -> None:
    receiver, sender = multiprocessing.Pipe()
    process = PROCESSES.Process(target=_wait_with_workers, args=(demo_test_images.pixels[:64], sender))
    process.start()
    workers = receiver.recv()
    process.kill()
    process.join()
    assert len(workers) == 3
    deadline = time.monotonic() + 30
    while any(_is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
