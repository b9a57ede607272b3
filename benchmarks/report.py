"""What benchmarks share: contenders that take turns, and figures on the screen and on disk, with the machine's name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.cpus import available_cpus
from pipelines.errors import UserError
from pipelines.files import atomic_write, write_json
from stec.console import Console

PACKAGES = ("torch", "torchvision", "numpy", "numba", "Pillow", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where figures go beside the screen; a benchmark's options are a subclass."""

    json: Path | None = None
    """Also write the figures here."""
    chart: Path | None = None
    """Also draw the figures here, as a PNG."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Values of some contenders in one unit."""

    title: str
    unit: str
    turns: dict[str, list[float]]
    """The values of each contender, one a turn; the first contender is the one that others are compared with."""

    def rows(self) -> list[list[str]]:
        """Name, median, lowest, highest and ratio to the first of each contender."""
        baseline = statistics.median(next(iter(self.turns.values())))
        return [
            [
                name,
                *(readable(value) for value in (statistics.median(values), min(values), max(values))),
                f"{statistics.median(values) / baseline:.2f}" if baseline else "",
            ]
            for name, values in self.turns.items()
        ]


def readable(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def take_turns(
    contenders: Mapping[str, Callable[[], float]], *, repeats: int, console: Console
) -> dict[str, list[float]]:
    """What each contender returns in each of ``repeats`` turns, say images per second, after one turn for warming up.

    Contenders alternate, so that a machine whose speed drifts treats them alike.
    """
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, take_turn in contenders.items():
            with console.waiting(f"{name}: {f'turn {turn} of {repeats}' if turn else 'warming up'}"):
                value = take_turn()
            if turn:
                turns[name].append(value)
    return turns


@contextmanager
def processes_apart() -> Iterator[Callable[[], Callable[..., Any]]]:
    """A function that starts a process and returns a second one, ``call(function, *arguments)``, which calls there.

    Contenders that fork, start threads or allocate memory do not meet in one process like this, and what their
    functions cache stays from turn to turn. The processes are forked from one that has done nothing but import what
    takes long, and end with the context.
    """
    executors: list[ProcessPoolExecutor] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms.v2", "pipelines.loader"])
    prepare = partial(_prepare_process, multiprocessing.get_start_method())

    def start() -> Callable[..., Any]:
        executor = ProcessPoolExecutor(1, mp_context=context, initializer=prepare)
        executors.append(executor)
        # A process that is about to start could not be ended.
        with _ctrl_c_waits():
            executor.submit(os.getpid).result()
        return lambda function, *arguments: executor.submit(function, *arguments).result()

    try:
        yield start
    except BaseException:
        # At once and with all that they have started, whose parting words would be tracebacks.
        for process in multiprocessing.active_children():
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        for executor in executors:
            executor.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    pressed: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt


def _prepare_process(start_method: str) -> None:
    os.setpgrp()
    # The main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its child processes, those of a DataLoader, start by the default method.
    multiprocessing.set_start_method(start_method, force=True)


def machine() -> dict[str, str]:
    """What the figures depend on, and how they were made."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if _is_installed(name)]
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        from nvidia import dali

        versions.append(f"DALI {dali.__version__}")
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {module.name}" if module is not None else Path(sys.argv[0]).name
    return {
        "processor": f"{_processor()}, {available_cpus()} core(s), {_memory_gib():.0f} GiB",
        "GPU": _gpu(),
        "versions": ", ".join(versions),
        "command": f"{program} {shlex.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def wait_for_gpu() -> None:
    """Return when the GPU, if this process uses one, has done all that it was asked to."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def check_positive(options: object, *names: str) -> None:
    """Raise UserError where one of these options, a number, several of them or None, is not above 0."""
    for name in names:
        value = getattr(options, name)
        values = value if isinstance(value, tuple) else (value,)
        if value is not None and not min(values, default=0) > 0:
            raise UserError(f"--{name} {' '.join(map(str, values))} must be more than 0.")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def check_writable(*paths: Path | None) -> None:
    """Raise UserError where a file could not be written in the end, before anything is measured."""
    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise UserError(f"{path} cannot be written; name a file in an existing folder of yours.")


def check(output: Output) -> None:
    """Raise UserError where the figures could not be written in the end."""
    check_writable(output.json, output.chart)
    if output.chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--chart needs matplotlib; run pip install -e '.[benchmarks]' or leave it out.")


def publish(
    figures: Sequence[Figures], output: Output, console: Console, remarks: Sequence[str] = (), **more: Any
) -> None:
    """Print the figures, and write them where ``output`` says; ``more`` goes into the JSON file alone."""
    about = machine()
    console.facts("", list(about.items()))
    for part in figures:
        columns = ["", "median", "lowest", "highest", "ratio"]
        console.table(f"{part.title}: {part.unit}", columns, part.rows())
    for remark in remarks:
        console.say(remark)
    if output.json is not None:
        write_json(
            output.json, {"machine": about, "figures": [asdict(part) for part in figures], "remarks": remarks, **more}
        )
    if output.chart is not None:
        draw_chart(figures, about, output.chart)


def draw_chart(figures: Sequence[Figures], about: Mapping[str, str], path: Path) -> None:
    """Bars of the medians with their ranges, below each other."""
    from matplotlib.figure import Figure

    lengths = [len(part.turns) for part in figures]
    picture = Figure(figsize=(9, 1.2 + sum(0.7 + 0.35 * length for length in lengths)), layout="constrained")
    axes = picture.subplots(len(figures), squeeze=False, gridspec_kw={"height_ratios": [1 + n for n in lengths]})
    for axis, part in zip(axes[:, 0], figures):
        names, turns = list(part.turns), list(part.turns.values())
        medians = [statistics.median(values) for values in turns]
        below = [median - min(values) for median, values in zip(medians, turns)]
        above = [max(values) - median for median, values in zip(medians, turns)]
        bars = axis.barh(names, medians, xerr=[below, above], capsize=3, color="tab:blue", ecolor="black")
        axis.bar_label(bars, [readable(median) for median in medians], padding=6)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(f"{part.title}: {part.unit}", 60), loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    caption = "\n".join(f"{name}: {value}" for name, value in about.items())
    picture.supxlabel(caption, x=0.01, ha="left", fontsize="xx-small", wrap=True)
    atomic_write(path, lambda file: picture.savefig(file, format="png", dpi=150))


def run(benchmark: Callable[[], None]) -> int:
    """Exit code of a benchmark: what the user can fix, and Ctrl-C, end in one sentence."""
    try:
        benchmark()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0
