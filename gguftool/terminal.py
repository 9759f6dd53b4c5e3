"""How gguftool talks: results on stdout, progress and logs on stderr, JSON where it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .live import View, shown
from .printable import printable

Update = Callable[[int, int, str], None]
Watch = Callable[[str, Mapping[str, Any]], None]


class _Memory(ProgressColumn):
    """Most memory that this process, or the largest one that it started, has taken so far."""

    def render(self, task: Task) -> Text:
        import resource  # not on Windows; see Terminal.progress

        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds) * (1 if sys.platform == "darwin" else 1024)
        return Text(f"{peak / 1e9:.1f} GB")


def _columns() -> tuple[ProgressColumn, ...]:
    memory = () if sys.platform == "win32" else (_Memory(),)
    return (TextColumn("{task.description:<40.40}", markup=False), BarColumn(), TimeRemainingColumn(), *memory)


class PlainConsole(Console):
    """A console that nothing in a name, a path or a recipe means anything to: it is printed, and does nothing more.

    Neither [en] nor :key: is a sign, and what `printable` does not let through is written out. Where a table wants a style,
    it takes Text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Lines and cells of tables come by here before rich lays them out: what is written out takes more room."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything comes by here, what a Text held too."""
        for segment in super().render(renderable, options):
            safe = segment.control or segment.text.isprintable()
            yield segment if safe else Segment(printable(segment.text), segment.style)


class Terminal:
    """One command's output. NO_COLOR and terminals that are none are rich's own concern."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        is_screen = sys.stdout.isatty()
        self.out = PlainConsole(soft_wrap=not is_screen, width=None if is_screen else 160)
        self.err = PlainConsole(stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        """A line of log, on stderr."""
        self.err.print(_line(text), soft_wrap=True)

    def show(self, value: dict[str, Any], *tables: Table | str) -> None:
        """The result, on stdout: `value` as JSON with --json, else the tables and lines."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=1) + "\n")
            return
        for table in tables:
            # A line is one line on any screen: a command that is broken into two cannot be pasted.
            if isinstance(table, str):
                self.out.print(_line(table), soft_wrap=True)
            else:
                _name_on_a_line(table)
                self.out.print(table)

    @contextmanager
    def progress(self) -> Iterator[Update]:
        """A bar with time left and memory on stderr, fed by (done, total, text); a line a phase where there is no terminal."""
        if not self.err.is_terminal:
            yield self._lines()
            return
        with Progress(*_columns(), console=self.err, transient=True, disable=self.quiet) as bar:
            task = bar.add_task("", total=None)
            seen = [-1]

            def update(done: int, total: int, text: str) -> None:
                if total != seen[0]:
                    bar.reset(task)
                    seen[0] = total
                bar.update(task, completed=done, total=total, description=text)

            yield update

    @contextmanager
    def live(self, title: str, quant: str | None, fit: bool = False) -> Iterator[tuple[Update, Watch]]:
        """The live view of a run on stderr, `fit` where it has a budget: gives what takes (done, total, text) and what is told of
        steps and measurements.

        Where stderr is no terminal, or --quiet, it is `progress`: plain lines, or none.
        """
        if not self.err.is_terminal or self.err.is_dumb_terminal or self.quiet:
            with self.progress() as progress:
                yield progress, lambda _what, _facts: None
            return
        view = View(title, quant, _columns(), fit=fit)
        with shown(view, self.err):
            yield view.progress, view.watch

    def _lines(self) -> Update:
        seen = [-1, -1]

        def update(done: int, total: int, text: str) -> None:
            tenth = 10 * done // max(total, 1)
            if [total, tenth] != seen:
                seen[:] = [total, tenth]
                self.say(f"  {done}/{total} {text}")

        return update


def _line(text: str) -> str:
    """Without line ends: a name that holds one must not look like a line of ours."""
    return text.replace("\n", " ")


def _name_on_a_line(table: Table) -> None:
    """Title and caption stand outside of the table's frame."""
    for place in ("title", "caption"):
        text = getattr(table, place)
        if isinstance(text, Text):
            text.plain = _line(text.plain)
        elif text is not None:
            setattr(table, place, _line(text))
