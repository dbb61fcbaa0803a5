"""The server's process: a socket, uvicorn, and the model as it was when it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ...errors import PopError
from .asked import check
from .limits import Limits
from .line import Line
from .model import Generation, ServedModel
from .prompt import prepare
from .web import build_app, is_loopback

_SPARE = 256  # connections beside those that wait
_PATIENCE = 5  # seconds that answers have to be sent when the server ends
_GREETING = "Hello, and welcome. " * 8  # thresholds need some tokens


class ServeError(PopError):
    """The server cannot be started."""


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Ends answers after the token that is being computed when it is told to end."""

    def __init__(self, config: uvicorn.Config, line: Line) -> None:
        super().__init__(config)
        self._line = line

    async def shutdown(self, sockets: Any = None) -> None:
        """End."""
        self._line.end()
        await super().shutdown(sockets)


class Serving:
    """A server that is about to run.

    Attributes
    ----------
    url : str
        Where it answers, without ``/v1``.
    served : ServedModel
    line : Line
    """

    def __init__(self, served: ServedModel, line: Line, limits: Limits, host: str, port: int) -> None:
        self.served, self.line = served, line
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=_SPARE)
        except OSError as error:
            raise ServeError(
                f"Port {port} of {host} cannot be used: {error.strerror or error}. Give another one."
            ) from error
        named = f"[{host}]" if ":" in host else host
        self.url = f"http://{named}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            build_app(served, line, limits, is_loopback(host)),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.waiting + _SPARE,
            timeout_graceful_shutdown=_PATIENCE,
        )
        self._server = _Server(config, line)

    def run(self) -> None:
        """Answer until Ctrl-C, SIGTERM or :meth:`stop`."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._server.should_exit = True


@contextmanager
def prepared(
    served: ServedModel, *, host: str = "127.0.0.1", port: int = 8000, limits: Limits | None = None
) -> Iterator[Serving]:
    """A server with its model ready; afterwards the model is bit for bit what it was.

    Raises
    ------
    ServeError
        A port that cannot be used.
    RequestError
        The settings do not fit the model.
    """
    limits = limits or Limits()
    line = Line(limits.waiting)
    try:
        _warm_up(served, line, limits)
        yield Serving(served, line, limits, host, port)
    finally:
        line.close()
        served.close()


@contextmanager
def serve(
    served: ServedModel, *, host: str = "127.0.0.1", port: int = 0, limits: Limits | None = None
) -> Iterator[Serving]:
    """Answer in a thread while the block runs. Port 0 is a free one. Raises as :func:`prepared`."""
    with prepared(served, host=host, port=port, limits=limits) as serving:
        thread = threading.Thread(target=serving.run, name="pop-mm-http")
        thread.start()
        try:
            yield serving
        finally:
            serving.stop()
            thread.join()


def _warm_up(served: ServedModel, line: Line, limits: Limits) -> None:
    """Answer in a few tokens: the settings fit, the template works, and weights are where the first request needs them."""
    message = {"role": "user", "content": _GREETING}
    asked = check({"messages": [message], "max_tokens": 1}, served.name, served.config, served.takes_images, limits)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 3}
    job = Generation(served, served.config, 0, prepare(served, asked, limits), settings)
    line.join(job)
    job.done.result()


__all__ = ["Limits", "ServeError", "ServedModel", "Serving", "is_loopback", "prepared", "serve"]
