"""What commands show: their progress, and what they found as tables for a terminal or one JSON document."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from moleblend_ray.config.describe import json_values
from moleblend_ray.settings import to_dict

logger = logging.getLogger(__name__)

_LOG_EVERY_S: Final = 10.0
_CONTINUED: Final = " \\"
_PROSE_WIDTH: Final = 40
"""Least characters of a line of prose beside other columns."""


def json_text(value: Any) -> str:
    """A dataclass or plain mapping as one JSON document: secrets hidden, null for numbers that are not finite."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    # Escaped where standard output could not hold it, so that programs read the names as they are.
    is_unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    return json.dumps(json_values(plain), indent=1, ensure_ascii=not is_unicode)


@contextmanager
def progress_bar(
    what: str, *, unit: str, show: Callable[[int], str], enabled: bool = True, leave: bool = False
) -> Iterator[Callable[[int, int | None], None]]:
    """Within, the given function shows how much is done, and of how much (None: unknown): as a bar on a terminal, elsewhere as
    log lines whose numbers ``show`` formats. ``leave`` the bar when all is done."""
    is_terminal = sys.stderr.isatty()
    last_s = time.monotonic()
    hidden = not (enabled and is_terminal)
    with tqdm(desc=what, unit=unit, unit_scale=True, leave=leave, disable=hidden) as bar:

        def update(done: int, total: int | None) -> None:
            nonlocal last_s
            bar.total = total
            bar.update(done - bar.n)
            if enabled and not is_terminal and time.monotonic() - last_s >= _LOG_EVERY_S:
                last_s = time.monotonic()
                logger.info("%s: %s of %s", what, show(done), "?" if total is None else show(total))

        yield update


def facts_table() -> Table:
    """Two columns without a heading: what, and its value."""
    table = Table(show_edge=False, pad_edge=False, box=None, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    return table


def headed_table(
    *names: str,
    numbers: Sequence[int] = (),
    unwrapped: Sequence[int] = (),
    title: str | None = None,
) -> Table:
    """Named columns. Those with an index in ``numbers`` are flush right; those in ``unwrapped`` are never wrapped."""
    table = Table(
        show_edge=False,
        pad_edge=False,
        box=None,
        title=title,
        title_justify="left",
        title_style="bold",
    )
    for index, name in enumerate(names):
        table.add_column(
            name,
            justify="right" if index in numbers else "left",
            overflow="fold",
            no_wrap=index in unwrapped,
            header_style="bold",
        )
    return table


def stacked(*parts: RenderableType) -> Group:
    """The parts one below the other, with an empty line between them."""
    # Not as padding, which fills lines with spaces: after a backslash they would end a command that is copied.
    spaced = [shown for part in parts for shown in (part, Text())]
    return Group(*spaced[:-1])


def utc_text(moment: str) -> str:
    """An ISO 8601 time in UTC, as markers have it, for reading."""
    return moment.partition("+")[0].replace("T", " ")


class ExplainedTable:
    """A table whose last column is prose, which stands below each row where the terminal is too narrow for it."""

    def __init__(self, *names: str, numbers: Sequence[int] = (), title: str) -> None:
        self._names = names
        self._options: dict[str, Any] = {
            "numbers": numbers,
            "unwrapped": range(len(names) - 1),
            "title": title,
        }
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """A cell for each name, with Rich's markup."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table(len(self._names) - 1)
        if options.max_width - console.measure(table, options=options).maximum >= _PROSE_WIDTH:
            yield self._table(len(self._names))
            return
        # Title and names come first, then a line for each row.
        lines = console.render_lines(table, options, pad=False, new_lines=True)
        above = len(lines) - len(self._rows)
        for index, line in enumerate(lines):
            yield from line
            if index >= above:
                prose = Text.from_markup(self._rows[index - above][-1], style="dim")
                yield Padding(prose, (0, 0, 0, 4), expand=False)

    def _table(self, num_columns: int) -> Table:
        table = headed_table(*self._names[:num_columns], **self._options)
        for row in self._rows:
            table.add_row(*row[:num_columns])
        return table


@dataclass(frozen=True, kw_only=True, slots=True)
class ShellCommand:
    """A command to copy: what the terminal is too narrow for goes on in the next line, after a backslash."""

    words: Sequence[str]
    """The command and its arguments, not quoted."""

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - len(_CONTINUED)
        lines: list[str] = []
        for word in map(shlex.quote, self.words):
            if lines and len(lines[-1]) + 1 + len(word) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(f"  {word}" if lines else word)
        yield Text(f"{_CONTINUED}\n".join(lines))
