"""One thread that does jobs in the order of arrival; one that waits or runs can be cancelled."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from ...errors import one_line
from .errors import RequestError


class Job:
    """A request on its way through the line. Subclasses say what is done.

    Attributes
    ----------
    stop : Event
        Set when nobody wants the answer any more, or the server ends.
    ready : Future
        Done when the answer begins; raises what refused it before.
    error : RequestError or None
        Why the answer is not complete.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.ready: Future[None] = Future()
        self.ready.set_running_or_notify_cancel()  # whoever awaits it cannot cancel it
        self.error: RequestError | None = None

    def run(self) -> None:
        """Do it, in the line's thread. Must resolve ``ready``."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """It was cancelled before its turn, or ``run`` raised."""
        if not isinstance(error, RequestError):
            error = RequestError(500, f"The answer could not be generated: {one_line(error)}.", "generation_failed")
        self.error = self.error or error
        if not self.ready.done():
            self.ready.set_exception(self.error)


class Line:
    """The thread, and the jobs in front of it.

    Parameters
    ----------
    most : int
        How many may wait behind the one that runs.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="pop-mm-serve", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._jobs)

    @property
    def running(self) -> bool:
        """Whether a job runs."""
        return self._running is not None

    @property
    def alive(self) -> bool:
        """Whether jobs are done at all."""
        return self._thread.is_alive() and not self._closed

    def join(self, job: Job) -> None:
        """Add a job at the end.

        Raises
        ------
        RequestError
            503: too many wait, or the server ends.
        """
        with self._changed:
            if self._closed:
                raise _ending()
            busy = self._running is not None
            if len(self._jobs) + busy > self._most:
                raise RequestError(503, f"{self._most} requests wait already: ask again in a while.", "queue_full")
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Take a job out of the line, or let it end after the token that is being computed. Harmless when it is done."""
        job.stop.set()
        with self._changed:
            waits = job in self._jobs
            if waits:
                self._jobs.remove(job)
        if waits:
            job.fail(RequestError(499, "The client has gone."))

    def end(self) -> None:
        """Take no more jobs, drop those that wait, and stop the one that runs; does not wait for it."""
        with self._changed:
            self._closed = True
            left, running = list(self._jobs), self._running
            self._jobs.clear()
            self._changed.notify_all()
        if running is not None:
            running.error = running.error or _ending()
            running.stop.set()
        for job in left:
            job.stop.set()
            job.fail(_ending())

    def close(self) -> None:
        """:meth:`end`, and wait until the thread is done."""
        self.end()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._jobs.popleft()
            try:
                job.run()
            except BaseException as error:  # the next one has its turn all the same
                job.fail(error)
            self._running = None
            del job  # and what it holds, while nothing is asked


def _ending() -> RequestError:
    return RequestError(503, "The server is shutting down.", "shutting_down")


__all__ = ["Job", "Line"]
