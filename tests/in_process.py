"""Jobs in this process, without Ray: what those on a cluster must give."""

from __future__ import annotations

from dataclasses import replace

from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.batches.builder import local_step_batches
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.exchange import plan_exchange, staged_chunk
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.preparation.shuffle import run_unit
from moleblend_ray.data.sources import find_sources, inspect_sources, read_chunks
from moleblend_ray.training.learner import build_learner
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.ranks import Ranks


def prepare_in_process(
    source: str, out: str, options: ConvertOptions, *, num_chunks: int | None = None
) -> None:
    """Prepare ``source``; with ``num_chunks`` leave it as a kill after as many chunks does."""
    sources = inspect_sources(find_sources(source), options.columns)
    claim_output(out, sources, options)
    chunks = [
        (chunk, layout)
        for index, layout in enumerate(sources.layouts)
        for chunk in read_chunks(layout, index, options.rows_per_chunk)
    ]
    receipts = [
        convert_chunk(chunk, layout, sources.labels, options, out)
        for chunk, layout in chunks[:num_chunks]
    ]
    if num_chunks is not None:
        return
    placed = []
    if options.needs_exchange:
        exchange, ((unit,),) = plan_exchange(
            out,
            [layout.file.uri for layout in sources.layouts],
            sources.labels,
            map(staged_chunk, receipts),
            options,
            memory_bytes=1 << 30,
        )
        placed.append(run_unit(exchange, unit))
    write_manifest(out, sources, options, receipts, placed)


def pretrain_in_process(config: PretrainConfig) -> list[Record]:
    """The records of all steps on one rank, without validations and checkpoints."""
    learner = build_learner(
        config.model,
        train=replace(config.train, validate_every=0),
        optim=config.optim,
        blend=config.blend,
        loss=config.loss,
        seed=config.seed,
        ranks=Ranks(),
    )
    steps = local_step_batches(
        config.data, config.order, config.stream, first_step=0, num_steps=config.train.num_steps
    )
    records: list[Record] = []
    fit(learner, iter(steps), hooks=Hooks(report=records.append))
    return records
