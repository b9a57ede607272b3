"""Output for the user: a live display on a terminal, plain lines elsewhere; tables, next steps."""

from __future__ import annotations

import html
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

UNLIMITED = 10_000
"""Maximum number of characters in a line if there is no terminal: long lines suit grep."""


class Console:
    """Prints on the main process only; on the others every method does nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self._rich = RichConsole(quiet=not enabled, highlight=False)
        # Rich also takes a log file with forced colors (FORCE_COLOR) for a terminal; and a notebook runs commands on a
        # terminal that shows each refresh of a display as a new line.
        self._on_terminal = (
            self._rich.is_interactive and self._rich.file.isatty() and "JPY_PARENT_PID" not in os.environ
        )
        if self._rich.is_dumb_terminal:
            self._rich.size = ConsoleDimensions(*shutil.get_terminal_size())  # Rich assumes 80 columns
        elif not self._rich.file.isatty() and not self._rich.is_jupyter:
            self._rich.width = UNLIMITED
        self._progress: _Progress | None = None
        self._notebook_bar: _NotebookBar | None = None
        self._task = TaskID(0)

    def say(self, text: str) -> None:
        self._rich.print(text, markup=False, soft_wrap=True)

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of names and values."""
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        self._rich.print(title, style="bold")
        self._rich.print(table)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> None:
        """A table whose first column is text and whose other columns are ``numbers``, or else text as well.

        If it does not fit the terminal even with all texts wrapped, its cells become lines.
        """
        table = Table()
        for k, column in enumerate(columns):
            table.add_column(column, justify="right" if numbers and k > 0 else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._rich.print(title, style="bold")
        # Measured without a limit, as Rich cuts off what does not fit.
        unlimited = self._rich.options.update(width=UNLIMITED)
        if Measurement.get(self._rich, unlimited, table).minimum <= self._rich.width:
            self._rich.print(table)
            return
        for first, *others in rows:
            self._rich.print(Text(first))
            for name, value in zip(columns[1:], others, strict=True):
                self._rich.print(Padding(Text(f"{name}: {value}"), (0, 0, 0, 2), expand=False))

    def next_steps(self, title: str, steps: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Print descriptions, each with the words of a command that can be copied from a terminal of any width.

        A long command continues after a backslash, as in shells.
        """
        self._rich.print(title, style="bold")
        for description, words in steps:
            self._rich.print(f"  {description}", style="cyan", markup=False)
            self._in_lines([shlex.quote(word) for word in words], separator=" ", continued=" \\", indent="    ")

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """A spinner with ``text`` while the context is open (terminal only)."""
        if not self._on_terminal:
            return nullcontext()
        return self._rich.status(text, spinner="line" if self._rich.options.ascii_only else "dots")

    @contextmanager
    def counting(self) -> Iterator[Callable[[str, int, int], None]]:
        """A callback ``(description, done, total)`` that reports progress: by a bar on a terminal, elsewhere by one
        line per description."""
        if not self._on_terminal:
            printed: set[str] = set()

            def print_once(description: str, _done: int, total: int) -> None:
                if description not in printed:
                    printed.add(description)
                    self.say(f"{description} ({total})")

            yield print_once
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=self._rich, transient=True) as progress:

            def show(description: str, done: int, total: int) -> None:
                if description not in tasks:
                    tasks[description] = progress.add_task(description, total=total)
                progress.update(tasks[description], completed=done)

            yield show

    @contextmanager
    def training(self, *, first_step: int, total_steps: int) -> Iterator[None]:
        """While open, ``report`` updates a live display (terminal, notebook) or prints lines (elsewhere)."""
        if self._rich.is_jupyter and not self._rich.quiet:
            self._notebook_bar = _NotebookBar(first_step, total_steps)
        if not self._on_terminal:
            yield
            self._notebook_bar = None
            return
        self._progress = _Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            console=self._rich,
            transient=True,
            expand=True,
        )
        with self._progress:
            self._task = self._progress.add_task("training", total=total_steps, completed=first_step)
            yield
        self._progress = None

    def report(self, values: Mapping[str, float], *, epochs: int, eta_seconds: float, end_of_epoch: bool) -> None:
        """Show metrics: on the live display, and as a line at the end of an epoch."""
        learning = [f"loss {values['loss']:.3f}"]
        # The metrics of a head that the model does not have are missing.
        if "contrastive_loss" in values:
            learning.append(f"contrast {values['contrastive_loss']:.3f}")
        if "inverse_loss" in values:
            learning.append(f"inverse {values['inverse_loss']:.3f} ({values['inverse_accuracy']:.2f})")
        if "classifier_loss" in values:
            learning.append(f"classifier {values['classifier_accuracy']:.2f}")
        if "knn" in values:
            learning.append(f"kNN {values['knn']:.2f}")
        if "rankme" in values:
            learning.append(f"RankMe {values['rankme']:.1f}")
        learning.append(f"lr {values['learning_rate']:.3g}")
        left = timedelta(seconds=round(min(eta_seconds, 1e9)))
        pace = [f"left {left}", f"{values['images_per_second']:.0f} images/s", f"wait {values['wait_fraction']:.0%}"]
        epoch = f"epoch {int(values['epoch']) + 1}/{epochs}"
        if self._progress is not None:
            self._progress.below = ["  ".join(pace), "  ".join(learning)]
            self._progress.update(self._task, completed=values["step"], description=epoch)
        if self._notebook_bar is not None:
            self._notebook_bar.update(int(values["step"]), [epoch, *pace, *learning], at_once=end_of_epoch)
        if end_of_epoch:
            self._in_lines([epoch, *learning, *pace])

    def _in_lines(self, parts: Sequence[str], *, separator: str = "  ", continued: str = "", indent: str = "") -> None:
        """Print parts side by side, without breaking them, on the number of lines that the width requires.

        Lines after the first are indented by two more columns. A part that is wider than the terminal is on a separate
        line without indentation, which the terminal wraps.
        """
        line = indent + parts[0]
        for k, part in enumerate(parts[1:], start=1):
            available = self._rich.width - len(continued) * (k < len(parts) - 1)
            if len(line) + len(separator) + len(part) <= available:
                line += separator + part
            else:
                self.say(line + continued)
                line = f"{indent}  {part}"
                if len(line) > self._rich.width:
                    line = part
        self.say(line)


class _Progress(Progress):
    """A progress bar above lines of figures, which narrow terminals cut off instead of the bar."""

    below: Sequence[str] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for line in self.below:
            yield Text(line, no_wrap=True, overflow="ellipsis")

    def get_renderable(self) -> RenderableType:
        return _Narrower(super().get_renderable())


class _NotebookBar:
    """A progress bar with figures in the output of a notebook's cell, which is replaced in place.

    Rich's own needs a widget, which not all notebooks have.
    """

    SECONDS = 0.2
    """Least time between two updates, each of which is a message to the browser."""

    def __init__(self, step: int, total_steps: int) -> None:
        from IPython.display import display

        self._total, self._updated = total_steps, time.monotonic()
        self._handle = display(self._content(step, ["training"]), raw=True, display_id=True)

    def update(self, step: int, figures: Sequence[str], *, at_once: bool) -> None:
        """Show the step; ``at_once`` even if the last update was just before."""
        now = time.monotonic()
        if at_once or now - self._updated >= self.SECONDS:
            self._updated = now
            self._handle.update(self._content(step, figures), raw=True)

    def _content(self, step: int, figures: Sequence[str]) -> dict[str, str]:
        percentage, text = f"{step / self._total:.0%}", "  ".join(figures)
        bar = f'<progress value="{step}" max="{self._total}" style="width: 50%"></progress>'
        return {
            "text/plain": f"{percentage}  {text}",
            "text/html": f"<div>{bar} {percentage}</div><pre>{html.escape(text)}</pre>",
        }


@dataclass(frozen=True)
class _Narrower:
    """Leaves two columns free.

    Terminals write ^C at the cursor; after a full line that would move the display down, and a part of it would remain.
    """

    renderable: RenderableType

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.renderable, options.update_width(options.max_width - len("^C")))
