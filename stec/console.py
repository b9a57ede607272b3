"""What the user sees while training: a live display on a terminal, plain lines elsewhere; tables, next steps."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

UNLIMITED = 10_000
"""Characters of a line where nothing has a width: a log file's lines are for grep."""


class Console:
    """Prints on the main process only; on the others every method does nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self._rich = RichConsole(quiet=not enabled, highlight=False)
        # In a terminal that is really one: colors may be forced upon a log file (FORCE_COLOR), and a notebook gives
        # its commands a terminal that shows each refresh of a display as a line of its own.
        self._on_terminal = (
            self._rich.is_interactive and self._rich.file.isatty() and "JPY_PARENT_PID" not in os.environ
        )
        if self._rich.is_dumb_terminal:
            self._rich.size = ConsoleDimensions(*shutil.get_terminal_size())  # which Rich would not ask for
        elif not self._rich.file.isatty() and not self._rich.is_jupyter:
            self._rich.width = UNLIMITED
        self._progress: _Progress | None = None
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
        """A table whose first column is text and whose other columns are numbers, or text like it.

        Where it is wider than the terminal even with all of its texts wrapped, its rows become lines.
        """
        table = Table()
        for k, column in enumerate(columns):
            table.add_column(column, justify="right" if numbers and k > 0 else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._rich.print(title, style="bold")
        # Measured without a limit, as within one what does not fit is cut.
        unlimited = self._rich.options.update(width=UNLIMITED)
        if Measurement.get(self._rich, unlimited, table).minimum <= self._rich.width:
            self._rich.print(table)
            return
        for first, *others in rows:
            self._rich.print(Text(first))
            for name, value in zip(columns[1:], others, strict=True):
                self._rich.print(Padding(Text(f"{name}: {value}"), (0, 0, 0, 2), expand=False))

    def next_steps(self, title: str, steps: Sequence[tuple[str, Sequence[str]]]) -> None:
        """What may be done now, each with the words of its command, which can be copied whatever the terminal's width.

        There are no borders to be copied along, and a long command goes on after a backslash, as shells read it.
        """
        self._rich.print(title, style="bold")
        for what, words in steps:
            self._rich.print(f"  {what}", style="cyan", markup=False)
            self._in_lines([shlex.quote(word) for word in words], separator=" ", continued=" \\", indent="    ")

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """A spinner with ``text`` while the context is open (terminal only)."""
        if not self._on_terminal:
            return nullcontext()
        return self._rich.status(text, spinner="line" if self._rich.options.ascii_only else "dots")

    @contextmanager
    def counting(self) -> Iterator[Callable[[str, int, int], None]]:
        """A function that shows what is being done, how much of it is done and of how much: as bars or, where there is
        no terminal, as a line for each thing."""
        if not self._on_terminal:
            told: set[str] = set()

            def tell(what: str, _done: int, total: int) -> None:
                if what not in told:
                    told.add(what)
                    self.say(f"{what} ({total})")

            yield tell
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=self._rich, transient=True) as progress:

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, total=total)
                progress.update(tasks[what], completed=done)

            yield show

    @contextmanager
    def training(self, *, first_step: int, total_steps: int) -> Iterator[None]:
        """While this is open, ``report`` moves a progress display (terminal) or prints lines (elsewhere)."""
        if not self._on_terminal:
            yield
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
        """Show a step's metrics: always on the live display, as a line of its own at the end of an epoch."""
        learning = [f"loss {values['loss']:.3f}"]
        # A loss of exactly 0 is one that is not trained: SimCLR has no inverse model, a linear probing only the
        # online classifier, and
        # images without labels have none.
        if values["discrimination"]:
            learning.append(f"contrast {values['discrimination']:.3f}")
        if values["manipulation"]:
            learning.append(f"inverse {values['manipulation']:.3f} ({values['manipulation_accuracy']:.2f})")
        if values["supervised"]:
            learning.append(f"online linear classifier {values['supervised_accuracy']:.2f}")
        learning.append(f"lr {values['learning_rate']:.3g}")
        left = timedelta(seconds=round(min(eta_seconds, 1e9)))
        pace = [f"left {left}", f"{values['images_per_second']:.0f} images/s", f"wait {values['wait_fraction']:.0%}"]
        epoch = f"epoch {int(values['epoch']) + 1}/{epochs}"
        if self._progress is not None:
            self._progress.below = ["  ".join(pace), "  ".join(learning)]
            self._progress.update(self._task, completed=values["step"], description=epoch)
        if end_of_epoch:
            self._in_lines([epoch, *learning, *pace])

    def _in_lines(self, parts: Sequence[str], *, separator: str = "  ", continued: str = "", indent: str = "") -> None:
        """Print parts side by side, each whole, on as many lines as the width asks for; later lines are indented more.

        A part that is wider than the terminal has a line of its own, which the terminal wraps; it is not indented.
        """
        line = indent + parts[0]
        for k, part in enumerate(parts[1:], start=1):
            room = self._rich.width - len(continued) * (k < len(parts) - 1)
            if len(line) + len(separator) + len(part) <= room:
                line += separator + part
            else:
                self.say(line + continued)
                line = f"{indent}  {part}"
                if len(line) > self._rich.width:
                    line = part
        self.say(line)


class _Progress(Progress):
    """A progress bar with lines of figures below it, which narrow terminals cut off instead of the bar."""

    below: Sequence[str] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for line in self.below:
            text = Text(line, no_wrap=True)
            # Terminals write ^C where the cursor is; after a full line that would push the display down, and a part of
            # it would stay.
            text.truncate(self.console.width - len("^C"), overflow="ellipsis")
            yield text
