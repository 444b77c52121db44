"""Follow a submitted job until it ends: show its log as it is written, and survive broken connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, cast

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from moleblend_ray.errors import MoleBlendError, without_credentials

logger = logging.getLogger(__name__)

T = TypeVar("T")

RUNNING: Final = (JobStatus.PENDING, JobStatus.RUNNING)

PATIENCE_S: Final = 600.0
"""Seconds during which a cluster that does not answer is asked again."""

_LOOK_S: Final = 5.0
_SILENT_LOOKS: Final = 3
_PAUSE_S: Final = 1.0
_LAST_WORDS_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 15.0


class SubmitError(MoleBlendError):
    """The cluster did not accept a job, or no longer answers."""


class Follower:
    """Shows the log of a job until the job ends. If the connection breaks, the log continues where it was. SIGINT and
    SIGTERM stop the job, or only end the following."""

    def __init__(
        self,
        client: JobSubmissionClient,
        submission_id: str,
        *,
        write: Callable[[str], Any] | None = None,
        skip_log: bool = False,
        stops_job: bool = True,
        patience_s: float = PATIENCE_S,
        look_s: float = _LOOK_S,
        pause_s: float = _PAUSE_S,
    ) -> None:
        """``write``: receives the text of the log, by default for standard output; ``skip_log``: show only new text;
        ``stops_job``: whether the first signal stops the job, and only a second SIGINT ends the following alone;
        ``patience_s``: how long the cluster may be out of reach; ``look_s``: interval between looks at the job's status;
        ``pause_s``: pause before connecting again, doubled after each failure."""
        self._client = client
        self._id = submission_id
        self._write = write or _write_out
        self._skip_log = skip_log
        self._stops_job = stops_job
        self._patience_s = patience_s
        self._look_s = look_s
        self._pause_s = pause_s
        self._shown = 0
        self._is_told = False
        self._is_stopping = False
        self._left = asyncio.Event()

    def run(self) -> JobDetails | None:
        """Follow the job to its end; None if a signal has ended the following before, and not the job.

        Raises SubmitError if the cluster is out of reach for longer than ``patience_s``, or another one answers in its place.
        """
        return asyncio.run(self._run())

    async def _run(self) -> JobDetails | None:
        with self._signals():
            if self._skip_log:
                with contextlib.suppress(RuntimeError, OSError):
                    self._shown = len(await _in_thread(self._client.get_job_logs, self._id))
            details = await self._until_ended()
        if details is None:
            return None
        await self._show_the_rest()
        if details.status == JobStatus.FAILED and details.driver_exit_code is None:
            # It never had a process, so there is no log that says why.
            logger.error("%s: %s", self._id, without_credentials(details.message or ""))
        return details

    async def _until_ended(self) -> JobDetails | None:
        lost_s: float | None = None
        pause_s = self._pause_s
        while True:
            before = self._shown
            details, problem = await self._until_break()
            if self._left.is_set():
                return None
            if details is not None and details.status not in RUNNING:
                return details
            if details is None:
                now_s = time.monotonic()
                if lost_s is None or self._shown > before:
                    lost_s, pause_s = now_s, self._pause_s
                    logger.warning(
                        "%s: the connection is lost (%s); trying again", self._id, problem
                    )
                if now_s - lost_s > self._patience_s:
                    raise SubmitError(
                        f"{self._id}: the cluster has not answered for {self._patience_s:.0f} s ({problem}). The job "
                        "may still be running: moleblend submit --follow with its id shows it again"
                    )
            else:  # Only the stream broke.
                lost_s, pause_s = None, self._pause_s
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _until_break(self) -> tuple[JobDetails | None, str]:
        """Show the log until the job ends, the user leaves or the connection breaks; returns the job's details if
        known."""
        stream = asyncio.create_task(self._stream())
        watch = asyncio.create_task(self._watch())
        left: asyncio.Task[bool] = asyncio.create_task(self._left.wait())
        await asyncio.wait({stream, watch, left}, return_when=asyncio.FIRST_COMPLETED)
        if watch.done() and watch.exception() is None:
            await asyncio.wait({stream}, timeout=_LAST_WORDS_S)
        problem = ""
        for task in (stream, watch):
            if task.done() and (error := task.exception()) is not None:
                problem = first_line(error)
            task.cancel()
        left.cancel()
        await asyncio.gather(stream, watch, left, return_exceptions=True)
        if self._left.is_set():
            return None, problem  # The cluster may not answer, which would take a minute.
        try:
            return await self._details(), problem
        except (RuntimeError, OSError) as error:
            return None, first_line(error)

    async def _stream(self) -> None:
        """Show the log from where it stopped; the server always sends it from the beginning."""
        skip = self._shown
        try:
            async for text in self._client.tail_job_logs(self._id):
                new = text[skip:]
                skip = max(0, skip - len(text))
                if new:
                    self._write(new)
                    self._shown += len(new)
        except aiohttp.ClientError as error:
            raise ConnectionError(first_line(error)) from error

    async def _watch(self) -> None:
        """Return when the job has ended. If the connection is dead without an error, looks at the job fail as well."""
        failed = 0
        while True:
            await asyncio.sleep(self._look_s)
            try:
                details = await self._details()
            except (RuntimeError, OSError):
                failed += 1
                if failed >= _SILENT_LOOKS:
                    raise
                continue
            failed = 0
            if details.status not in RUNNING:
                return
            if details.status == JobStatus.PENDING and not self._is_told:
                self._is_told = True
                logger.info("%s: %s", self._id, details.message or "not started yet")

    async def _details(self) -> JobDetails:
        """What the cluster says about the job. SubmitError where a new head node answers, which waiting would not change."""
        try:
            return await _in_thread(self._client.get_job_info, self._id)
        except AuthenticationError as error:
            raise SubmitError(
                f"{self._id}: the cluster refuses the token that it took before: another one answers at this address now. "
                "A job ends with its head node; what it has committed is kept, and the same command continues it"
            ) from error
        except RuntimeError as error:
            if not is_unknown(error):
                raise
            raise SubmitError(
                f"{self._id}: the cluster no longer knows this job: its head node was started anew, and a job ends with its "
                "head node. What it has committed is kept, and the same command continues it"
            ) from error

    async def _show_the_rest(self) -> None:
        """Show the part of the log that the stream did not bring: the head ends the stream together with the job."""
        try:
            log = await _in_thread(self._client.get_job_logs, self._id)
        except (RuntimeError, OSError) as error:
            logger.warning("%s: the end of its log cannot be read: %s", self._id, first_line(error))
            return
        if rest := log[self._shown :]:
            self._write(rest)
            self._shown += len(rest)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While the body runs, SIGINT and SIGTERM ask the job to stop (if they are to); a second SIGINT leaves the job alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if not self._stops_job:
            self._left.set()
        elif not self._is_stopping:
            self._is_stopping = True
            logger.warning(
                "%s: asked to commit its step and stop; Ctrl-C again ends this command, not the job",
                self._id,
            )
            self._stopping = asyncio.ensure_future(self._stop())
        elif number == signal.SIGINT:
            self._left.set()

    async def _stop(self) -> None:
        try:
            await _in_thread(self._client.stop_job, self._id)
        except (RuntimeError, OSError, AuthenticationError) as error:
            self._is_stopping = False
            logger.error("%s: could not be asked to stop: %s", self._id, first_line(error))


async def _in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """As `asyncio.to_thread`, but a call that does not return keeps nobody from ending the command."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: Exception | None) -> None:
        if result.cancelled():
            return
        if error is None:
            result.set_result(cast("T", value))
        else:
            result.set_exception(error)

    def run() -> None:
        value, failure = None, None
        try:
            value = call(*arguments)
        except Exception as error:  # whatever it is, the one who waits gets it
            failure = error
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any longer.
            loop.call_soon_threadsafe(tell, value, failure)

    threading.Thread(target=run, name="request", daemon=True).start()
    return await result


def _write_out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def is_unknown(error: RuntimeError) -> bool:
    """Whether the head node itself says that there is no such job; a proxy before it may answer 404 for a while."""
    return "404" in str(error) and "does not exist" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
