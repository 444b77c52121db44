"""How commands show what they found: tables for a terminal, or one JSON document."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from moleblend_ray.config.builder import to_dict
from moleblend_ray.config.describe import json_values


def json_text(value: Any) -> str:
    """A dataclass or plain mapping as one JSON document: secrets hidden, null for numbers that are not finite."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return json.dumps(json_values(plain), indent=1, ensure_ascii=False)


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
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts[:-1]), *parts[-1:])
