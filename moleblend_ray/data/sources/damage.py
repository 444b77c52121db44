"""Damage of files: what readers raise where a file cannot be read on, and what the user is told."""

from __future__ import annotations

from moleblend_ray.errors import DataError


class DamageError(Exception):
    """The rest of a text file cannot be read; the caller knows from which record on."""


def unreadable(uri: str, record: int, error: Exception) -> DataError:
    """The error for a file that is damaged after ``record`` records."""
    reason = " ".join(str(error).split())
    return DataError(
        f"{uri} is damaged after record {record} (counted from 0, the header aside): {reason}. "
        "Replace the file and run the same command again; chunks converted so far are kept."
    )
