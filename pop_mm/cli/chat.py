"""``pop-mm chat``: a conversation in the terminal, pruned or dense, whose cache is kept from turn to turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from ..inputs import check_tokens, context_of
from ..samples.quantise import check_weights
from ..session.session import Session, prune
from ..settings.config import PopConfig
from ..tracking.caches import cache_name, cache_of
from . import loudness
from .generate import Clock, Sampling, check_words, find_device, is_unicode, load_model
from .terminal import CommandError, quiet, warn

HELP = """\
/dense    answer with the whole model from now on
/pruned   answer with the pruned model from now on
/reset    forget the conversation
/help     show this
/quit     leave (Ctrl-D does too); Ctrl-C stops an answer"""


class Streamer(Clock):
    """Prints an answer as its tokens come; half a character waits for its other half."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__()
        self.text = ""
        self._tokenizer, self._write, self._ids = tokenizer, write, list[int]()

    def put(self, value: Tensor) -> None:
        """A token, or at first the prompt."""
        super().put(value)
        if len(self.times) == 1:
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """The answer is complete."""
        self._show(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        more, self.text = text[len(self.text) :], text
        self._write(more)


class Conversation:
    """Turns with one model; what the cache holds of them is not computed again.

    Parameters
    ----------
    model, tokenizer
    config : PopConfig
        Of the pruned answers.
    sampling : Sampling
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PopConfig, sampling: Sampling
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._session: Session = prune(model, config).attach()
        self.turns: list[dict[str, str]] = []
        self.prefilled = 0
        self.stopped = False
        self._ids = torch.zeros(1, 0, dtype=torch.long)
        self._cache: Any = None

    @property
    def pruned(self) -> bool:
        """Whether the next answer is pruned."""
        return self._session.attached

    @pruned.setter
    def pruned(self, wanted: bool) -> None:
        if wanted != self.pruned:
            self._cache = None  # a session knows nothing of a prompt that was prefilled without it
            if wanted:
                self._session.attach()
            else:
                self._session.detach()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self._cache = [], None
        self._ids = self._ids[:, :0]

    def close(self) -> None:
        """Leave the model as it was."""
        self._session.detach()

    def ask(self, text: str, streamer: Streamer) -> str:
        """Answer one more turn and return what was said of it: tokens, speed and the share that was read.

        Raises
        ------
        CommandError
            The tokenizer or the model's context does not take it; the turn is forgotten.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._encode(text)
        except BaseException:
            self.turns.pop()
            raise
        held = self._held(ids)
        self.prefilled = ids.shape[1] - held
        self.stopped = False
        torch.manual_seed(self._sampling.seed + len(self.turns))
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{cache_name(type(self._model).forward): self._cache if held else None},
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([self._stop]),
            return_dict_in_generate=True,
            **self._sampling.settings(),
        )
        self._ids, self._cache = output.sequences, cache_of(output)
        self.turns.append({"role": "assistant", "content": streamer.text})
        return self._said(output.sequences.shape[1] - ids.shape[1], streamer)

    def _encode(self, text: str) -> Tensor:
        """Ids of the whole conversation, ``[1, tokens]``."""
        if not is_unicode(text):
            raise CommandError("That is not valid UTF-8: check the encoding of the terminal.")
        if self._sampling.chat and self._tokenizer.chat_template:
            try:
                ids = self._tokenizer.apply_chat_template(
                    self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )["input_ids"]
            except Exception as error:  # templates raise whatever they stumble over
                raise CommandError(
                    f"The chat template does not take this: {error} (--no-chat leaves it out)."
                ) from error
        else:
            first = not self._ids.shape[1]
            more = self._tokenizer(text, return_tensors="pt", add_special_tokens=first)["input_ids"]
            ids = torch.cat([self._ids.cpu(), more.long()], 1)
        check_tokens(self._model, ids, self._tokenizer)
        context, needed = context_of(self._model), ids.shape[1] + self._sampling.max_new_tokens
        if context is not None and needed > context.tokens:
            found = f"The conversation would have {needed} tokens, and the model's context is {context.tokens}"
            if context.fixed:
                raise CommandError(f"{found}: /reset begins a new one.")
            warn(f"{found}: answers get worse; /reset begins a new one.")
        return ids.to(self._model.device)

    def _held(self, ids: Tensor) -> int:
        """Tokens of the conversation that the cache holds; 0 where it holds something else, as after another template."""
        if self._cache is None:
            return 0
        held = int(self._cache.get_seq_length())
        same = held < ids.shape[1] and torch.equal(ids[:, :held].cpu(), self._ids[:, :held].cpu())
        return held if same else 0

    def _stop(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    def _said(self, tokens: int, clock: Clock) -> str:
        parts = [f"{tokens} tokens"]
        if speed := clock.decode_tokens_per_s:
            parts.append(f"{speed:.1f} tokens/s")
        if not self.pruned:
            parts.append("dense")
        elif (left_out := self._session.report.left_out_share) is not None:
            parts.append(f"read {1 - left_out:.0%} of the weights")
        return ", ".join([*parts, *(["stopped"] if self.stopped else [])])


def run(name: str, config: PopConfig, sampling: Sampling, dtype: str, device: str, weights: str = "auto") -> None:
    """The command: read lines until the end of the input or ``/quit``."""
    check_words("question", "-", sampling)
    check_weights(weights)
    where = find_device(device)
    notes = Console(stderr=True, highlight=False)
    say = (lambda _: None) if loudness.silent() else (lambda text: notes.print(text, style="dim", markup=False))
    with quiet():
        model, tokenizer = load_model(name, dtype, where, weights)
        conversation = Conversation(model, tokenizer, config, sampling)
        try:
            say(f"{name}, pruned ({config.label}). /help lists what else can be typed.")
            for line in _lines():
                if line.startswith("/"):
                    if line == "/quit":
                        break
                    say(_obey(conversation, line))
                elif line:
                    say(_answer(conversation, tokenizer, line))
        finally:
            conversation.close()


def _obey(conversation: Conversation, line: str) -> str:
    """Do what a line with a slash says, and return what is to be said of it."""
    if line in ("/dense", "/pruned"):
        conversation.pruned = line == "/pruned"
        return f"Answers are {line[1:]} from now on."
    if line == "/reset":
        conversation.reset()
        return "The conversation is forgotten."
    return HELP if line == "/help" else f"There is no {line.split()[0]}.\n{HELP}"


def _answer(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, line: str) -> str:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        with _interrupts_stop(conversation):
            said = conversation.ask(line, Streamer(tokenizer, write))
    except CommandError as error:
        return str(error)
    write("\n")
    return f"[{said}]"


@contextmanager
def _interrupts_stop(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C stops the answer after the token that is computed; a second one ends the program."""

    def stop(*arguments: Any) -> None:
        if conversation.stopped:
            signal.default_int_handler(*arguments)
        conversation.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user types, line by line, until the end of the input."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # lets the user edit lines and get earlier ones back
    while True:
        try:
            yield input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(/quit or Ctrl-D leaves)")


__all__ = ["Conversation", "Streamer", "run"]
