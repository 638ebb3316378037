"""What a person sees while a job runs: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
PATIENCE_SECONDS = 2.0
"""Work that may be over at once is only shown if it is not over by then."""
LINE_SECONDS = 5.0
"""A plain line at most this often."""


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("note", "")))


class Display:
    """One line of progress: ``update(done, note)`` as often as you like."""

    def __init__(self, name: str, total: int, unit: str, bar: Progress | None, before: int = 0):
        self.name, self.total, self.unit, self.bar = name, total, unit, bar
        self.started = self.printed = time.monotonic()
        self.before = before
        self.last = before
        self.task = bar.add_task(name, total=total, note="") if bar else None

    def update(self, done: int, note: str = "") -> None:
        """``note`` stands before the rate, e.g. ``3 rejected``."""
        seconds = time.monotonic() - self.started
        rate = (done - self.before) / seconds if seconds > 0 else 0.0
        words = ", ".join(w for w in (note, f"{rate:.1f} {self.unit}/s" if done > self.before and self.unit != "%" else "") if w)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=words)
            return
        finished = done >= self.total > self.last
        if finished or (done < self.total and time.monotonic() - self.printed >= LINE_SECONDS):
            left = f", {(self.total - done) / rate:.0f} s left" if rate and not finished else ""
            console.print(f"{self.name}: {done}/{self.total} {self.unit}, {words or 'starting'}{left}", markup=False)
            self.printed = time.monotonic()
        self.last = done


@contextmanager
def display(name: str, total: int, unit: str = "rows", before: int = 0) -> Iterator[Display]:
    """Shows ``name`` and what happens to ``total`` things, of which ``before`` were done earlier."""
    if not console.is_terminal:
        console.print(f"{name}: starting")
        yield Display(name, total, unit, None, before)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Note(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield Display(name, total, unit, bar, before)


class LateDisplay:
    """Shows work of which nobody knows whether it takes any time; ``update(done, total)``. Gone when all is done."""

    def __init__(self, name: str, unit: str):
        self.name, self.unit = name, unit
        self.started = time.monotonic()
        self.shown: Display | None = None
        self.stack = ExitStack()

    def update(self, done: int, total: int) -> None:
        if self.shown is None and done < total and time.monotonic() - self.started >= PATIENCE_SECONDS:
            self.shown = self.stack.enter_context(display(self.name, total, self.unit))
        if self.shown is not None:
            self.shown.update(done)
        if done >= total:
            self.stack.close()


@contextmanager
def late_display(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with how much is done and how much there is."""
    late = LateDisplay(name, unit)
    with late.stack:
        yield late.update
