"""What the submitter's pod of a RayJob runs: ``submitter.py ENTRYPOINT RUNTIME_ENV``, the latter as YAML.

It submits the job and shows its log until the job has ended. The operator's own command ends together with the stream of the log
(`ray job logs --follow`). Such a stream may also end, with status 0, while the job runs: when a process of the head is busy or
restarts. The operator (KubeRay 1.5 to 1.7) then takes the job for failed after 30 seconds, and deletes its cluster.

The operator tells the address and the id of the job, and gives the token. It asks the cluster itself how the job has ended. So the
exit status is 0 for every job that has ended; otherwise it is 1, and the next pod of the submitter goes on with the same job.
SIGTERM ends this program, not the job.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import yaml
from ray.job_submission import JobSubmissionClient

from moleblend_ray.errors import MoleBlendError
from moleblend_ray.orchestration.follow import Follower, SubmitError, first_line, is_unknown
from moleblend_ray.orchestration.submit import open_client

logger = logging.getLogger("submitter")

_CONNECT_S: Final = 60.0
"""Seconds during which a head node that has not answered yet is asked again: the operator has seen it ready. One that has answered
may be replaced, which takes longer."""
_PAUSE_S: Final = 5.0


def main(arguments: Sequence[str]) -> int:
    """Submit the job unless an earlier pod has, and follow it to its end; the exit status."""
    entrypoint, runtime_env = arguments
    job = os.environ["RAY_JOB_SUBMISSION_ID"]
    try:
        client = _connect()
        submit_once(client, job, entrypoint, yaml.safe_load(runtime_env) or {})
        ended = Follower(client, job, stops_job=False).run()
    except MoleBlendError as error:
        logger.error("%s", error)
        return 1
    if ended is None:
        logger.warning("%s: this pod was asked to end; the job goes on", job)
        return 1
    logger.info("%s: %s", job, ended.status)
    return 0


def _connect() -> JobSubmissionClient:
    """A client of the head node. Its dashboard may not answer yet."""
    address = os.environ["RAY_DASHBOARD_ADDRESS"]
    url = address if "://" in address else f"http://{address}"
    deadline_s = time.monotonic() + _CONNECT_S
    while True:
        try:
            return open_client(url, os.environ.get("RAY_AUTH_TOKEN"))
        except MoleBlendError as error:
            if time.monotonic() > deadline_s:
                raise
            logger.info("waiting for the head node: %s", first_line(error))
        time.sleep(_PAUSE_S)


def submit_once(
    client: JobSubmissionClient, job: str, entrypoint: str, runtime_env: dict[str, Any]
) -> None:
    """Submit the job, unless the cluster knows it."""
    try:
        try:
            client.get_job_info(job)
        except RuntimeError as error:
            if not is_unknown(error):
                raise
            client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env)
            logger.info("%s: submitted", job)
    except (OSError, RuntimeError) as error:
        raise SubmitError(f"{job}: the cluster did not accept it: {first_line(error)}") from error


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(main(sys.argv[1:]))
