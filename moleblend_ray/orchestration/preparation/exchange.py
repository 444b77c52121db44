"""The passes of a shuffle, or of a search for duplicates (:mod:`moleblend_ray.data.preparation.shuffle`), as Ray tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import ray

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.dataset.dataset_files import RECEIPTS_DIR, listed
from moleblend_ray.data.dataset.lease import Lease
from moleblend_ray.data.preparation.exchange import Exchange, Unit
from moleblend_ray.data.preparation.receipts import UnitReceipt, valid_unit_receipts
from moleblend_ray.data.preparation.shuffle import run_unit
from moleblend_ray.errors import DataError, MoleBlendError, without_credentials
from moleblend_ray.orchestration.cluster.executor import MAX_RETRIES
from moleblend_ray.orchestration.cluster.placement import placed
from moleblend_ray.orchestration.preparation.conversion import ACTOR_CPUS
from moleblend_ray.orchestration.progress.progress import Reporter

logger = logging.getLogger(__name__)


def run_exchange(
    exchange: Exchange,
    passes: Sequence[Sequence[Unit]],
    cluster: ClusterConfig,
    report: Reporter,
    lease: Lease,
) -> list[UnitReceipt]:
    """Run the passes of ``exchange``, as many units at a time as ``cluster`` has data actors; receipts of the last pass,
    in order.

    Units that have a valid receipt are not run again. InUseError if the ``lease`` is lost.
    """
    done = _done(exchange, passes)
    shared = ray.put(exchange)
    options = {"num_cpus": ACTOR_CPUS, "max_retries": MAX_RETRIES, **placed(cluster.data_labels)}
    task = ray.remote(**options)(_run_unit)
    for units in passes:
        missing = [unit for unit in units if unit.name not in done]
        logger.info(
            "%s: %s, %d of %d pieces to do",
            without_credentials(exchange.out),
            units[0].kind,
            len(missing),
            len(units),
        )
        finished = len(units) - len(missing)
        for receipt in _run_tasks(task, shared, missing, cluster.num_data_actors, exchange.out):
            lease.require()
            done[receipt.name] = receipt
            finished += 1
            report({"pass": units[0].kind, "pieces": f"{finished}/{len(units)}"})
    return [done[unit.name] for unit in passes[-1]]


def _done(exchange: Exchange, passes: Sequence[Sequence[Unit]]) -> dict[str, UnitReceipt]:
    """Receipts of an earlier run that are valid for this exchange, by name."""
    kinds = [f"{RECEIPTS_DIR}/{units[0].kind}" for units in passes]
    if not listed(exchange.out, *kinds):
        return {}
    found = valid_unit_receipts(exchange.out, listed(exchange.out))
    kinds_digests = {units[0].kind: exchange.digest(units[0]) for units in passes}
    wanted = {unit.name: kinds_digests[unit.kind] for units in passes for unit in units}
    return {name: receipt for name, receipt in found.items() if wanted.get(name) == receipt.digest}


def _run_unit(exchange: Exchange, unit: Unit) -> UnitReceipt | MoleBlendError:
    # Ray would wrap an error that is raised.
    try:
        return run_unit(exchange, unit)
    except MoleBlendError as error:
        return error


def _run_tasks(
    task: Any, exchange: Any, units: Sequence[Unit], num_tasks: int, out: str
) -> Iterator[UnitReceipt]:
    """The receipts of ``units`` as they arrive, with at most ``num_tasks`` units at work, which end where this ends."""
    waiting = iter(units)
    running = [task.remote(exchange, unit) for unit in islice(waiting, num_tasks)]
    try:
        while running:
            ready, running = ray.wait(running, num_returns=1)
            yield _outcome(ready[0], out)
            running += [task.remote(exchange, unit) for unit in islice(waiting, 1)]
    finally:
        # Whatever ended this: what comes next needs their CPUs, and may make something else of the output.
        for reference in running:
            ray.cancel(reference, force=True)


def _outcome(reference: Any, out: str) -> UnitReceipt:
    """The receipt of a unit that is over, or its error raised."""
    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayTaskError:
        # An error of this program: its traceback is needed.
        raise
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Placing molecules in {out} ended its process {MAX_RETRIES + 1} times: it was killed for lack of "
            f"memory, or its machine was lost. ({error}) What is done is kept: run the same command again, "
            "with a smaller shuffle_memory_gib or fewer cluster.num_data_actors if memory is short."
        ) from error
    if isinstance(outcome, MoleBlendError):
        raise outcome
    receipt: UnitReceipt = outcome
    return receipt
