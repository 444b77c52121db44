"""Batch embedding on a Ray cluster: every shard of molecules becomes one Parquet part, in the source's order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import EmbedConfig
from moleblend_ray.evaluation.prediction.embedding import Embedder
from moleblend_ray.evaluation.prediction.encoders import load_encoder
from moleblend_ray.evaluation.prediction.ensemble import property_fingerprint
from moleblend_ray.evaluation.results.result_files import EMBED
from moleblend_ray.orchestration.library.part_writer import PartsJob
from moleblend_ray.orchestration.library.parts import run_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSummary:
    """What became of the molecules, and where the vectors are."""

    out: str
    """Directory of the embeddings."""
    embeddings: int
    """Molecules with a vector."""
    rejected: int
    """Source rows without a vector; each is in ``rejected.parquet`` with its reason."""
    rejected_by_reason: dict[str, int]
    """Number of these rows by the reason."""
    dim: int
    """Length of a vector."""
    parts: int
    """Number of Parquet files."""
    parts_reused: int
    """Parts that an earlier, interrupted command had made."""
    molecules_per_s: float | None
    """Molecules per second that the command embedded, including the start of its actors; None if all parts were
    there."""
    seconds: float
    """Wall time of the command that finished the work."""
    already_finished: bool
    """True if an earlier command had finished the work and this one did nothing."""


def embed(config: EmbedConfig) -> EmbedSummary:
    """Write one vector per molecule to ``<out>/parts/part-NNNNN.parquet``, rows in the order of the source.

    Repeating a finished command does nothing; repeating an interrupted one makes the parts that are missing.
    """
    config = accepted(config, EmbedConfig)
    outcome = run_parts(embed_job(config))
    summary = outcome.summary
    return EmbedSummary(
        out=config.out,
        embeddings=summary["embeddings"],
        rejected=summary["rejected"],
        # Summaries of earlier versions do not tell.
        rejected_by_reason=dict(summary.get("rejected_by_reason", {})),
        dim=summary["dim"],
        parts=len(summary["parts"]),
        parts_reused=summary["parts_reused"],
        molecules_per_s=summary.get("molecules_per_s"),
        seconds=summary["seconds"],
        already_finished=outcome.already_finished,
    )


def embed_job(config: EmbedConfig) -> PartsJob:
    """The job with which :func:`embed` makes vectors from shards."""
    return PartsJob(
        kind=EMBED,
        config=config,
        model=config.checkpoint,
        load=partial(load_embedder, config),
    )


def load_embedder(config: EmbedConfig, device: torch.device) -> Embedder:
    """The checkpoint's encoder on ``device``, and the whole model if it is fine-tuned."""
    start, fine_tuned = load_encoder(config.checkpoint)
    # Two heads may have been trained on the same frozen encoder.
    fingerprint = (
        property_fingerprint(config.checkpoint, fine_tuned) if fine_tuned else start.fingerprint
    )
    tuned_flat = fine_tuned is not None and fine_tuned.conformers == 0
    embedder = Embedder.build(
        start,
        fine_tuned,
        uri=config.checkpoint,
        fingerprint=fingerprint or "",
        batch_size=config.batch_size,
        device=device,
        coordinates=config.conformers is not None or not tuned_flat,
    )
    embedder.require_coordinates(config.conformers is not False)
    return embedder
