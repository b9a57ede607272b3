"""What the user sees while training: a live display on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Console:
    """Prints on the main process only; on the others every method does nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self._rich = RichConsole(quiet=not enabled, highlight=False)
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
        """A table whose first column is text and whose other columns are numbers, or text like it."""
        table = Table()
        for k, column in enumerate(columns):
            table.add_column(column, justify="right" if numbers and k > 0 else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._rich.print(title, style="bold")
        self._rich.print(table)

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """A spinner with ``text`` while the context is open (terminal only)."""
        return self._rich.status(text) if self._rich.is_terminal else nullcontext()

    @contextmanager
    def counting(self) -> Iterator[Callable[[str, int, int], None]]:
        """A function that shows what is being done, how much of it is done and of how much: as bars or, where there is
        no terminal, as a line for each thing."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=self._rich, transient=True, disable=not self._rich.is_terminal) as progress:

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, total=total)
                    if not self._rich.is_terminal:
                        self.say(f"{what} ({total})")
                progress.update(tasks[what], completed=done)

            yield show

    @contextmanager
    def training(self, *, first_step: int, total_steps: int) -> Iterator[None]:
        """While this is open, ``report`` moves a progress display (terminal) or prints lines (elsewhere)."""
        if not self._rich.is_terminal:
            yield
            return
        self._progress = _Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[pace]}"),
            console=self._rich,
            transient=True,
            expand=True,
        )
        with self._progress:
            self._task = self._progress.add_task("training", total=total_steps, completed=first_step, pace="")
            yield
        self._progress = None

    def report(self, values: Mapping[str, float], *, epochs: int, eta_seconds: float, end_of_epoch: bool) -> None:
        """Show a step's metrics: always on the live display, as a line of its own at the end of an epoch."""
        parts = [f"loss {values['loss']:.3f}"]
        # A loss of exactly 0 is one that is not trained: SimCLR has no inverse model, a linear fit only the probe, and
        # images without labels have none.
        if values["discrimination"]:
            parts.append(f"contrast {values['discrimination']:.3f}")
        if values["manipulation"]:
            parts.append(f"inverse {values['manipulation']:.3f} ({values['manipulation_accuracy']:.2f})")
        if values["supervised"]:
            parts.append(f"probe {values['supervised_accuracy']:.2f}")
        parts.append(f"lr {values['learning_rate']:.3g}")
        learning = "  ".join(parts)
        left = timedelta(seconds=round(min(eta_seconds, 1e9)))
        pace = f"{values['images_per_second']:.0f} images/s  wait {values['wait_share']:.0%}  left {left}"
        epoch = f"epoch {int(values['epoch']) + 1}/{epochs}"
        if self._progress is not None:
            self._progress.metrics = learning
            self._progress.update(self._task, completed=values["step"], description=epoch, pace=pace)
        if end_of_epoch:
            self.say(f"{epoch}  {learning}  {pace}")


class _Progress(Progress):
    """A progress bar with a line of metrics below it, which narrow terminals cut off instead of the bar."""

    metrics = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.metrics, no_wrap=True, overflow="ellipsis")
