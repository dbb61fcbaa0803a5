"""The application: addresses, sizes, and errors as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ...errors import one_line
from .asked import check, parse
from .chat import Answer
from .errors import RequestError
from .limits import Limits
from .line import Line
from .model import ServedModel
from .prompt import prepare

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MOST_DRAINED = 8  # times the limit of a body, so that its sender hears why it is refused


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    return host in _LOOPBACK


def build_app(served: ServedModel, line: Line, limits: Limits, loopback: bool) -> Starlette:
    """The application around one model.

    Parameters
    ----------
    loopback : bool
        Refuse requests to other host names, as a web page that a browser shows could send them.
    """
    web = _Web(served, line, limits)
    routes = [
        Route("/v1/chat/completions", web.chat, methods=["POST"]),
        Route("/v1/models", web.models),
        Route("/v1/models/{name:path}", web.model),
        Route("/health", web.health),
        Route("/metrics", web.metrics),
    ]
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK[:2]))] if loopback else []
    handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _no_such_address, Exception: _unexpected}
    return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers, lifespan=_lifespan(line))


def _lifespan(line: Line) -> Any:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(line.close)

    return lifespan


class _Web:
    def __init__(self, served: ServedModel, line: Line, limits: Limits) -> None:
        self._served, self._line, self._limits = served, line, limits
        self._since = int(time.time())

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        try:
            response = await self._chat(request)
        except RequestError as error:
            self._served.metrics.add("pop_mm_requests_total", status=error.status)
            raise
        except ClientDisconnect:
            self._served.metrics.add("pop_mm_requests_total", status=499)
            return Response(status_code=499)
        self._served.metrics.add("pop_mm_requests_total", status=response.status_code)
        return response

    async def _chat(self, request: Request) -> Response:
        served, limits = self._served, self._limits
        body = parse(await _read(request, limits))
        asked = check(body, served.name, served.config, served.takes_images, limits)
        served.check(asked.config)
        inputs = await asyncio.to_thread(prepare, served, asked, limits)
        answer = Answer(served, self._line, asked, inputs, limits, f"chatcmpl-{uuid.uuid4().hex}")
        gone, work = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(answer.respond())
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                answer.cancel()
            return await work
        except asyncio.CancelledError:
            answer.cancel()
            work.cancel()
            raise
        finally:
            gone.cancel()

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{name}``."""
        if (name := request.path_params["name"]) != self._served.name:
            said = f"This server has one model, {self._served.name!r}; {name!r:.80} was asked for."
            raise RequestError(404, said, "model_not_found", "model")
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": self._since, "owned_by": "pop_mm"}

    async def health(self, request: Request) -> Response:
        """``GET /health``."""
        if self._line.alive:
            return _json({"status": "ok"})
        return _json({"status": "ending"}, 503)

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        now = {"pop_mm_requests_waiting": self._line.waiting, "pop_mm_requests_running": int(self._line.running)}
        return Response(self._served.metrics.text(**now), media_type="text/plain; version=0.0.4")


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limits: Limits) -> bytes:
    """The body.

    Raises
    ------
    RequestError
        408: it takes too long. 413: it is too long. 415: it is not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            415, f"The body must be JSON, with content-type: application/json; got {kind or 'none'!r:.80}."
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes and "expect" in request.headers:
        raise _too_long(limits)
    try:
        return await asyncio.wait_for(_whole(request, limits), limits.body_seconds)
    except asyncio.TimeoutError:
        said = f"The body did not come within {limits.body_seconds:g} seconds."
        raise RequestError(408, said, "timeout") from None


async def _whole(request: Request, limits: Limits) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limits.body_bytes * _MOST_DRAINED:
            break
        if size > limits.body_bytes:
            parts.clear()
        else:
            parts.append(part)
    if size > limits.body_bytes:
        raise _too_long(limits)
    return b"".join(parts)


def _too_long(limits: Limits) -> RequestError:
    return RequestError(413, f"A request may have {limits.body_bytes:,} bytes. Send smaller pictures.", "too_large")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII: a text that is no Unicode, which a request may quote, is escaped."""
    return Response(json.dumps(value), status, headers, "application/json")


async def _refused(request: Request, error: Any) -> Response:
    headers = {"retry-after": "1"} if error.status == 503 else {}
    if error.status in (408, 413):
        headers["connection"] = "close"
    return _json(error.to_dict(), error.status, headers)


async def _no_such_address(request: Request, error: Any) -> Response:
    said = {
        404: f"There is no {request.url.path!r:.80} here; chats are asked at /v1/chat/completions.",
        405: f"{request.url.path!r:.80} does not take {request.method}.",
    }
    return _json(
        RequestError(error.status_code, said.get(error.status_code, str(error.detail))).to_dict(), error.status_code
    )


async def _unexpected(request: Request, error: Exception) -> Response:
    return _json(RequestError(500, f"{type(error).__name__}: {one_line(error)[:400]}.", "unexpected").to_dict(), 500)


__all__ = ["build_app", "is_loopback"]
