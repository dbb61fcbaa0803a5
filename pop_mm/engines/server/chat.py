"""transformers' handler of chat completions, for one request to a pruned model."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import DirectStreamer, GenerationState, _StreamError

from .asked import Asked
from .limits import Limits
from .line import Line
from .model import Generation, ServedModel
from .prompt import longest

_PARSES_BY_TOOLS = "tools" in inspect.signature(ChatCompletionHandler._streaming).parameters  # not in transformers 5.20


class Streamer(DirectStreamer):  # type: ignore[misc]
    """transformers' streamer, which ends when the job does: what the answer says of itself is known only then."""

    def end(self) -> None:
        """Nothing, when ``generate`` says so."""

    def finish(self, done: Any) -> None:
        """The end, with the error if there is one."""
        error = done.exception()
        if error is None:
            super().end()
        else:
            self._enqueue(_StreamError("failed"))


class Answer(ChatCompletionHandler):  # type: ignore[misc]
    """The answer to one request: its place in the line, and its response.

    Parameters
    ----------
    served : ServedModel
    line : Line
    asked : Asked
    inputs : mapping
        From :func:`~.prompt.prepare`.
    limits : Limits
    request_id : str

    Raises
    ------
    RequestError
        As :func:`~.prompt.longest`.
    """

    def __init__(
        self, served: ServedModel, line: Line, asked: Asked, inputs: Any, limits: Limits, request_id: str
    ) -> None:
        super().__init__(model_manager=None, generation_state=GenerationState())
        self._served, self._line, self._asked, self._inputs, self._id = served, line, asked, inputs, request_id
        self._longest = longest(served, asked, limits, inputs["input_ids"].shape[1])
        self._job: Generation | None = None

    async def respond(self) -> Response:
        """Wait for the turn, and answer; a stream begins when it is its turn.

        Raises
        ------
        RequestError
            What :meth:`Line.join` and :meth:`ServedModel.use` refuse, or an error while generating.
        """
        served = self._served
        given = (self._id, served.model, served.reader, served.name, self._inputs, self._generation_config())
        tools = {"tools": self._asked.tools} if _PARSES_BY_TOOLS else {}
        if not self._asked.stream:
            return await self._non_streaming(*given, gen_manager=self, **tools)
        response = self._streaming(*given, gen_manager=self, **tools)
        assert self._job is not None
        await asyncio.wrap_future(self._job.ready)
        return Stream(self, self._events(response.body_iterator))

    def cancel(self) -> None:
        """Nobody wants the answer any more. Harmless when it is complete."""
        if self._job is not None:
            self._line.cancel(self._job)

    # what transformers' handler asks of a manager of generations ------------------------------------------------------

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Streamer]:
        """Begin, and return the queue of what is to be sent."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        words = self._served.tokenizer._tokenizer
        streamer = Streamer(words, asyncio.get_running_loop(), queue, response_parser=response_parser)
        streamer.cancel = self.cancel
        self._begin(config, streamer=streamer).done.add_done_callback(streamer.finish)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Text, tokens of the prompt, and ids of the answer."""
        ids = (await asyncio.wrap_future(self._begin(config).done)).tolist()
        return self._served.tokenizer.decode(ids, skip_special_tokens=True), self._inputs["input_ids"].shape[1], ids

    def _begin(self, config: Any, **more: Any) -> Generation:
        asked = self._asked
        settings = {"generation_config": config, **more}
        if hasattr(self._served.model, "has_talker"):
            settings["generation_mode"] = "text"
        self._job = Generation(self._served, asked.config, asked.seed, self._inputs, settings, asked.stops)
        self._line.join(self._job)
        return self._job

    def _generation_config(self) -> Any:
        """The model's own settings, with those of the request."""
        sampling = dict(self._asked.sampling)
        temperature = sampling.pop("temperature", None)
        if temperature:
            sampling["temperature"] = temperature
        config = self._build_generation_config(sampling, self._served.model.generation_config)
        if temperature is not None:
            config.do_sample = temperature > 0
        config.max_new_tokens, config.num_beams, config.num_return_sequences = self._longest, 1, 1
        return config

    # what the answer says ---------------------------------------------------------------------------------------------

    def _build_completion(self, *arguments: Any, usage: Any = None, **named: Any) -> dict[str, Any]:
        return super()._build_completion(*arguments, usage=self._usage(usage), **named)

    def _build_chunk_sse(self, *arguments: Any, usage: Any = None, **named: Any) -> str:
        return super()._build_chunk_sse(*arguments, usage=self._usage(usage), **named)

    def _usage(self, usage: Any) -> Any:
        """Tokens, and under ``pop_mm`` what was read for them."""
        if usage is None or self._job is None:
            return usage
        return type(usage).model_validate({**usage.model_dump(), "pop_mm": self._job.said})

    async def _events(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """What transformers sends, an error in the form that OpenAI's client reads, and OpenAI's last line."""
        async with aclosing(events) as parts:  # type: ignore[type-var]
            async for part in parts:
                failed = 'data: {"error": "failed"}\n\n'
                if part.endswith(failed):
                    assert self._job is not None and self._job.error is not None
                    part = f"{part.removesuffix(failed)}data: {json.dumps(self._job.error.to_dict())}\n\n"
                yield part
        yield "data: [DONE]\n\n"


class Stream(StreamingResponse):  # type: ignore[misc]
    """Events of an answer, which is cancelled if not all of them can be sent."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


__all__ = ["Answer"]
