"""The leaderboard of finished results, written again, or of several directories side by side. Runs in this process."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import LeaderboardConfig
from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.reports.leaderboard import (
    compare,
    read_leaderboard,
    seen_from_elsewhere,
)
from moleblend_ray.evaluation.reports.leaderboard_page import write_leaderboard


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaderboardSummary:
    """What the leaderboard shows, and where it is."""

    leaderboard: str
    """URI of ``leaderboard.html``."""
    tasks: int
    """Rows of the leaderboard; a task that was split in two ways has two."""
    tasks_finished: int
    """Tasks with results."""
    wins: dict[str, int]
    """Model -> tasks on which it has the best mean test score."""
    mean_rank: dict[str, float]
    """Model -> its mean rank over the tasks; 1 is the best."""


def leaderboard(config: LeaderboardConfig) -> LeaderboardSummary:
    """Read the results below ``config.run`` (and ``against``) and write their leaderboard; no result is changed."""
    config = accepted(config, LeaderboardConfig)
    uris = (config.run, *config.against)
    boards = [read_leaderboard(uri) for uri in uris]
    out = config.out or config.run
    if out != config.run:
        boards = [seen_from_elsewhere(one, uri) for one, uri in zip(boards, uris, strict=True)]
    labels = _labels(uris)
    board = boards[0] if len(boards) == 1 else compare(dict(zip(labels, boards, strict=True)))
    page = write_leaderboard(out, board)
    standings = board.standings()
    return LeaderboardSummary(
        leaderboard=page,
        tasks=len(board.rows),
        tasks_finished=len(board.finished),
        wins={item.name: item.wins for item in standings},
        mean_rank={item.name: item.mean_rank for item in standings},
    )


def _labels(uris: tuple[str, ...]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    paths = [storage.absolute(uri).rstrip("/").split("/") for uri in uris]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(path[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return list(uris)
