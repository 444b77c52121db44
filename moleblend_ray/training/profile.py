"""A profiler trace of a few steps, written beside the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch.profiler import ProfilerActivity

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import StorageError

logger = logging.getLogger(__name__)

PROFILE_DIR: Final = "profile"
SKIPPED_STEPS: Final = 3
"""Steps before the trace: the first ones allocate memory and choose kernels; the last of them warms the profiler up."""
TRACED_STEPS: Final = 3
_TABLE_ROWS: Final = 40


@contextlib.contextmanager
def trace_steps(
    run_uri: str, start_step: int, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Within, the given function, called after each step, makes a trace of steps SKIPPED_STEPS to
    SKIPPED_STEPS + TRACED_STEPS from ``start_step`` on.

    It becomes ``profile/step-NNNNNNNN.json.gz`` under ``run_uri`` (Chrome's trace format; Perfetto and
    chrome://tracing open it), with a table of the longest operators as ``.txt``. A run that ends earlier leaves none.
    """
    first = start_step + SKIPPED_STEPS
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(
            wait=SKIPPED_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1
        ),
        on_trace_ready=lambda profile: _write(profile, run_uri, first, device),
    ) as profile:
        yield profile.step


def _write(
    profile: torch.profiler.profile, run_uri: str, first_step: int, device: torch.device
) -> None:
    uri = storage.join(run_uri, PROFILE_DIR, f"step-{first_step:08d}")
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
    try:
        with scratch_folder("profile") as folder:
            trace = folder / "trace.json.gz"
            profile.export_chrome_trace(str(trace))
            storage.upload(trace, f"{uri}.json.gz")
        storage.write_bytes(f"{uri}.txt", table.encode())
    except StorageError as error:
        # The run is worth more than its trace.
        logger.warning("the profile could not be written: %s", error)
        return
    logger.info(
        "profile of steps %d to %d: %s.json.gz (open it in Perfetto) and .txt",
        first_step,
        first_step + TRACED_STEPS - 1,
        uri,
    )
