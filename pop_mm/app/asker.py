"""One loaded model that answers questions, or turns of a chat, dense and then pruned, token by token, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, StoppingCriteriaList

from ..cli.generate import Sampling, exceeded_context, is_unicode, tokenize, warm_up
from ..errors import ConfigError, PopError
from ..report.report import Report
from ..report.threshold_report import ThresholdReport
from ..samples import load, load_config, load_vision, takes_images
from ..session.plans import plans_of
from ..session.session import Session, prune
from ..settings.advice import advice
from ..settings.config import PopConfig
from ..vision import ImageSource, load_image, prepare
from .examples import examples
from .line import FullError, Line
from .progress import Answer, Progress, Turn
from .streams import Run, Stop, Stream

MAX_BYTES = 10 * 2**20  # of an image
MAX_CHARACTERS = 4000  # of a question
MAX_NEW_TOKENS = 256
MOST_WAITING = 16
_AMOUNTS = [step / 20 for step in range(1, 20)]  # 5 % to 95 %


class AskError(PopError, ValueError):
    """A question that cannot be asked."""


class Asker:
    """Answers questions with one model, one after the other.

    Parameters
    ----------
    name : str
        For display.
    model : PreTrainedModel
        In eval mode.
    reader : processor or tokenizer
        What :func:`~pop_mm.samples.load_vision` or :func:`~pop_mm.samples.load` returned beside the model.
    """

    def __init__(self, name: str, model: PreTrainedModel, reader: Any) -> None:
        self.name = name
        self.model = model
        self.takes_images = takes_images(model.config) and hasattr(reader, "tokenizer")
        self._reader = reader
        self._tokenizer = reader.tokenizer if self.takes_images else reader
        self._line = Line(MOST_WAITING)

    @classmethod
    def load(cls, name: str, *, dtype: Any = "auto", device: Any = None, weights: str = "auto") -> Asker:
        """Load a sample, a folder or a hub id, as :func:`pop_mm.samples.load` does; with images if the model takes them."""
        loader = load_vision if takes_images(load_config(name)) else load
        return cls(name, *loader(name, dtype=dtype, device=device, weights=weights))

    @property
    def busy(self) -> bool:
        """Whether a question is being answered or waits. Never while the model is pruned is this false."""
        return self._line.busy

    @property
    def chats(self) -> bool:
        """Whether the model takes earlier turns: it reads text alone, by a chat template."""
        return not self.takes_images and bool(self._tokenizer.chat_template)

    def amounts(self, config: PopConfig) -> list[float]:
        """Budgets or ratios, in steps of 5 %, that the model takes beside a config's other settings, ascending.

        Raises
        ------
        AdapterError, ConfigError
            The model cannot be pruned at all.
        """
        name = "budget" if config.ratio is None else "ratio"
        found: list[float] = []
        for amount in _AMOUNTS[::-1] if config.ratio is None else _AMOUNTS:  # the mildest first
            try:
                plans_of(self.model, replace(config, **{name: amount}))  # type: ignore[arg-type]
            except ConfigError:
                if not found:
                    raise
                break
            found.append(amount)
        return sorted(found)

    def advice(self, settings: Mapping[str, Any]) -> str | None:
        """Why such settings of :meth:`ask` are known to spoil this model's answers; None if nothing is known."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return advice(parameters, PopConfig.from_dict(settings))

    def warm_up(self, config: PopConfig) -> None:
        """Answer an example in a few tokens, dense and pruned: a first call costs more than the later ones."""
        picture, question = examples(self.takes_images)[0]
        with self._line.turn():
            inputs = self._encode(None if picture is None else load_image(picture), question, 4)
            warm_up(self.model, inputs)
            with prune(self.model, config):
                warm_up(self.model, inputs)

    def ask(
        self,
        image: ImageSource | None,
        question: str,
        *,
        max_new_tokens: int,
        earlier: Sequence[Turn] = (),
        stop: threading.Event | None = None,
        **settings: Any,
    ) -> Iterator[Progress]:
        """Answer greedily, dense and then pruned.

        The work is done in a thread of its own, which waits for its turn and leaves the session whatever happens. Closing
        the iterator stops it after the forward that is running; the model is then what it was as soon as :attr:`busy` is
        false.

        Parameters
        ----------
        image : ImageSource, optional
            Needed by, and only for, a model that takes images.
        question : str
        max_new_tokens : int
            1 to ``MAX_NEW_TOKENS``.
        earlier : sequence of Turn
            Of a chat; each answer goes on from the answers of its own kind. For a model that :attr:`chats`.
        stop : threading.Event, optional
            Ends the iterator after the token that is being computed, when set, and is set when it is closed.
        **settings
            As :meth:`~pop_mm.PopConfig.from_dict` takes them: ``budget=0.65``, or ``ratio=0.4, method_settings={"gamma": 0.1}``.

        Yields
        ------
        Progress
            After every token, and when an answer is done; the last one has the report, unless it was stopped. While other
            questions come first, whenever their number changes.

        Raises
        ------
        AskError
            No or too long a question, no image, too many tokens for the page or for the model's context; earlier turns for
            a model that has none; too many questions wait.
        InputError
            An image that cannot be used (larger than ``MAX_BYTES``, for one).
        ConfigError
            A setting that is wrong or does not fit the model.
        """
        config = PopConfig.from_dict(settings)
        _check(question, max_new_tokens)
        picture = None
        if self.takes_images:
            if image is None:
                raise AskError("There is no image: upload one, or pick an example.")
            picture = load_image(image, max_bytes=MAX_BYTES)
        if earlier and not self.chats:
            raise AskError(
                f"{self.name} takes no earlier turns (it has no chat template, or takes images): leave them out."
            )
        run = Run(stop)
        arguments = (run, picture, question, tuple(earlier), config, max_new_tokens)
        threading.Thread(target=self._work, args=arguments, name="pop-mm-app", daemon=True).start()
        try:
            yield from self._follow(run)
        finally:
            run.stop.set()

    def _follow(self, run: Run) -> Iterator[Progress]:
        progress = Progress()
        tokens: dict[str, list[int]] = {"dense": [], "pruned": []}
        while (event := run.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Report | ThresholdReport):
                progress = replace(progress, report=event)
            elif isinstance(event, int):
                progress = replace(progress, waiting=event)
            else:
                which, value = event
                done = isinstance(value, Stream)
                tokens[which] += [] if done else value
                text = self._tokenizer.decode(tokens[which], skip_special_tokens=True)
                text = text if done else text.rstrip("\ufffd")  # half a character, so far
                speed = value.decode_tokens_per_s if done else None
                answer = Answer(text, tuple(tokens[which]), speed, done)
                progress = replace(progress, dense=answer) if which == "dense" else replace(progress, pruned=answer)
            yield progress

    def _work(
        self, run: Run, picture: Any, question: str, earlier: tuple[Turn, ...], config: PopConfig, max_new_tokens: int
    ) -> None:
        try:
            with self._line.turn(run.stop.is_set, run.events.put) as mine:
                if mine:
                    self._answer(run, picture, question, earlier, config, max_new_tokens)
        except FullError:
            run.events.put(AskError(f"{MOST_WAITING} questions wait already: ask again in a while."))
        except Exception as error:
            run.events.put(error)
        finally:
            run.events.put(None)

    def _answer(
        self, run: Run, picture: Any, question: str, earlier: tuple[Turn, ...], config: PopConfig, max_new_tokens: int
    ) -> None:
        turns = {which: [(turn.question, getattr(turn, which)) for turn in earlier] for which in ("dense", "pruned")}
        inputs = self._encode(picture, question, max_new_tokens, turns["dense"])
        same = turns["dense"] == turns["pruned"]
        again = inputs if same else self._encode(picture, question, max_new_tokens, turns["pruned"])
        session = Session(self.model, config)  # first, since it checks that the settings fit the model
        self._generate(run, inputs, max_new_tokens, "dense")
        if run.stop.is_set():
            return
        with session:
            self._generate(run, again, max_new_tokens, "pruned")
            if run.stop.is_set():
                return
            report = session.report
        run.events.put(report)

    def _generate(self, run: Run, inputs: Any, max_new_tokens: int, which: str) -> None:
        stream = Stream(run, which)
        settings = Sampling(max_new_tokens, temperature=0.0, seed=0, chat=True).settings()
        criteria = StoppingCriteriaList([Stop(run)])
        self.model.generate(**inputs, **settings, streamer=stream, stopping_criteria=criteria)
        run.events.put((which, stream))

    def _encode(self, picture: Any, question: str, max_new_tokens: int, earlier: Sequence[tuple[str, str]] = ()) -> Any:
        """``input_ids [1, tokens]`` and what else ``generate`` takes."""
        if self.takes_images:
            inputs = prepare(self._reader, picture, question, model=self.model)
        else:
            try:
                inputs = tokenize(self.model, self._tokenizer, question, earlier=earlier)
            except PopError:
                raise
            except Exception as error:  # templates raise whatever they stumble over
                raise AskError(f"The tokenizer cannot encode the question: {error}.") from error
        tokens = inputs["input_ids"].shape[1]
        if not tokens:
            raise AskError("The question has no tokens for this model: write another one.")
        if (context := exceeded_context(self.model, tokens, max_new_tokens)) is not None:
            images = (" (images included)", ", give a smaller image") if self.takes_images else ("", "")
            anew = ", begin a new conversation" if earlier else ""
            raise AskError(
                f"The prompt has {tokens} tokens{images[0]} and the answer may have {max_new_tokens}, but the model's context is "
                f"{context} tokens. Ask a shorter question{images[1]}{anew} or allow a shorter answer."
            )
        return inputs


def _check(question: str, max_new_tokens: int) -> None:
    if not isinstance(question, str) or not question.strip():
        raise AskError("The question is empty: ask in at least one word.")
    if len(question) > MAX_CHARACTERS:
        raise AskError(f"The question has {len(question)} characters; {MAX_CHARACTERS} is the most. Shorten it.")
    if not is_unicode(question):
        raise AskError("The question has characters that are no Unicode text: type it anew.")
    if not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise AskError(f"The longest answer must have 1 to {MAX_NEW_TOKENS} tokens; got {max_new_tokens!r}.")
