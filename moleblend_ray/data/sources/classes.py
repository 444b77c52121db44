"""Classes that label columns write as words: the labels that a column of them becomes.

Two classes are one label, and more are one for each class, of which a molecule has one. So all that is there for several label
columns serves them, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from moleblend_ray.checks import Check

FEWEST_CLASSES: Final = 2
"""Of so many one label tells."""

Exclusive = Sequence[Sequence[int]]
"""Groups of label columns: of a molecule, one label of each group is 1, as they are the classes of one question."""


class ClassLabel(NamedTuple):
    """A label that is 0 or 1 by the class in a cell."""

    name: str
    column: str
    """Column of the cell."""
    values: Mapping[str | float, float]
    """The label for each class, by ``class_key``."""


class Alternatives(NamedTuple):
    """The classes of one column, of which a molecule has one."""

    column: str
    labels: tuple[str, ...]
    """What the column becomes: one label, which is 1 for the second of two classes, or a label for each class."""
    words: tuple[str, ...]
    """The classes."""

    @property
    def is_exclusive(self) -> bool:
        """Whether there is a label for each class, of which one is 1."""
        return len(self.labels) > 1

    def places(self, columns: Sequence[str]) -> list[int]:
        """Indices of the labels in ``columns``, which have all of them."""
        return [list(columns).index(label) for label in self.labels]

    @classmethod
    def of_words(cls, column: str, words: Sequence[str]) -> Alternatives:
        """Those of a column of these classes."""
        return cls(column, names_of_class_labels(column, words), tuple(words))

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> tuple[Alternatives, ...]:
        """Those of a prepared data set, by the ``options`` of its manifest."""
        found = options.get("columns", {})
        words, columns = found.get("classes", ()), found.get("label_columns") or ()
        if not words:
            return ()
        return tuple(cls.of_words(column, words) for column in columns)


def exclusive_places(
    alternatives: Sequence[Alternatives], columns: Sequence[str]
) -> tuple[list[int], ...]:
    """Indices in ``columns`` of the labels of each column of more than two classes (an :data:`Exclusive`)."""
    return tuple(one.places(columns) for one in alternatives if one.is_exclusive)


def in_groups(exclusive: Exclusive) -> frozenset[int]:
    """Indices of all columns that are in a group."""
    return frozenset(place for group in exclusive for place in group)


def class_checks(words: Sequence[str]) -> tuple[Check, ...]:
    """What must hold of the setting ``classes``, whose words may also be none."""
    return (
        (
            len(words) != 1,
            f"classes: expected all of them, at least {FEWEST_CLASSES}, found {list(words)}",
        ),
        (
            all(words := [word.strip() for word in words]),
            f"classes: expected a word for each, found {list(words)}",
        ),
    )


def names_of_class_labels(column: str, words: Sequence[str]) -> tuple[str, ...]:
    """Names of the labels that a column of these classes becomes: ``COLUMN=CLASS`` for each, but its own if there are two, or
    none are named and it holds labels."""
    if len(words) <= FEWEST_CLASSES:
        return (column,)
    return tuple(f"{column}={word}" for word in words)
