"""lmms-eval's model ``pop``: vision-language models that are pruned while they answer."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from torch import Tensor
from transformers.utils.logging import tqdm

from ..errors import ConfigError
from ..samples import load_vision
from ..session.session import Session
from ..settings.config import unique_keys
from ..vision import decode, prepare_chats
from ..vision.qwen import is_qwen
from .harness_tally import Counting, config_from
from .lmms_requests import Until, chat_of, cut, document_of, extended, generate_settings, settings_of

_log = logging.getLogger(__name__)


class PopVLM(Counting, lmms):  # type: ignore[misc]
    """A pruned vision-language model, for ``lmms_eval --model pop --model_args pretrained=...,budget=0.65`` (or ``ratio=0.2``).

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        A sample's name, a folder, a hub id, or a model (then with its ``processor``).
    processor : transformers.ProcessorMixin, optional
    device : str, optional
        A GPU if there is one.
    dtype : str
        ``"auto"`` is the checkpoint's.
    batch_size : int
        Questions that are answered at once; the paper uses 1. Continuations are scored one by one.
    loglikelihood : {"decode", "prefill"}
        ``"decode"``: image and context are prefill, each token of the continuation is a decode step, which gives what
        generating it would have given. ``"prefill"``: all is one prefill that is completed on the retained and candidate
        channels (``prefill="partition"``), as the paper scores; not for thresholds.
    max_new_tokens : int
        Of answers to tasks that do not say.
    min_pixels, max_pixels : int, optional
        Sizes to which a Qwen-VL processor brings images, instead of its own.
    **settings
        Fields of :class:`PopConfig`, mappings may be JSON; settings of the method and of experts by their names; and
        ``settings``, a settings file under them. ``batch`` is ``"per_sequence"`` unless given, so that answers do not depend
        on what else is in a batch; with ``batch_size=1``, ``"shared"`` is the same, faster.

    Attributes
    ----------
    tallies : dict of str to Tally
        By task, of what was not dense.

    Raises
    ------
    ConfigError
        A setting is wrong, or does not fit the model.
    SampleError, InputError
        As :func:`pop_mm.samples.load_vision`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any,
        processor: Any = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        loglikelihood: str = "decode",
        max_new_tokens: int = 128,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **settings: Any,
    ) -> None:
        from .lmms_results import wrap_evaluator

        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size must be a positive integer; got {batch_size!r}.")
        file = settings.pop("settings", None)
        config = config_from(_read_mappings(settings), file)
        self._start_counting(config, loglikelihood)
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        if isinstance(pretrained, str):
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            pretrained, processor = load_vision(pretrained, dtype=dtype, device=device)
        elif processor is None:
            raise ConfigError("A model that is loaded already needs its processor: PopVLM(model, processor=...).")
        self.model, self.processor, self.device = pretrained, processor, pretrained.device
        _limit_pixels(processor.image_processor, min_pixels, max_pixels)
        session = Session(self.model, self.pop_config)
        self._session: Session | None = session
        self._scoring: Session | None = session if self.mode == "decode" else self._prefill_session(self.model)
        self.prunes = any(plan.backend != "dense" for plan in session.plans)
        wrap_evaluator()

    def clean(self) -> None:
        """Drop the model, as lmms-eval asks when all requests are answered."""
        if not self._dense:
            self._session = self._scoring = None
            super().clean()

    # requests -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, generated inside a session, greedily unless the task says otherwise, and cut before ``until``."""
        answers = [""] * len(requests)
        with self._attached(self._session), self._progress(len(requests)) as bar:
            for places in self._batches(requests):
                batch = [requests[place] for place in places]
                settings = settings_of(batch[0])
                found = self._generate([chat_of(request.args, self.task_dict) for request in batch], settings)
                for place, request, answer in zip(places, batch, found, strict=True):
                    answers[place] = answer
                    tokens = self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
                    self._count_generated(request.task_name, len(tokens))
                    self.cache_hook.add_partial("generate_until", (request.args[0], settings), answer)
                bar.update(len(batch))
        for warning in self._warnings().values():
            _log.warning(warning)
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Loss of each continuation (mean of ``-log p`` over its tokens), and whether greedy decoding gives it.

        lmms-eval calls it log-likelihood, but takes the *smallest* for the best answer (``api/task.py``), and its own models
        return the loss. Only simple models are asked: ``--force_simple``.
        """
        scores = []
        with self._attached(self._scoring), self._progress(len(requests)) as bar:
            for request in requests:
                continuation = request.args[1]
                if callable(continuation):
                    continuation = continuation(document_of(request.args, self.task_dict))
                logits, targets = self._logits(chat_of(request.args, self.task_dict), continuation)
                losses = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
                self._count_scored(request.task_name, len(targets), self.mode == "prefill")
                loss = float(losses.mean()) if len(targets) else 0.0
                scores.append((loss, bool((logits.argmax(-1) == targets).all())))
                bar.update()
        for warning in self._warnings().values():
            _log.warning(warning)
        return scores

    def generate_until_multi_round(self, requests: Any) -> NoReturn:
        """Not offered."""
        raise NotImplementedError("The model `pop` answers questions of one round.")

    def _generate(self, chats: Sequence[Any], settings: Mapping[str, Any]) -> list[str]:
        inputs = prepare_chats(self.processor, chats, model=self.model)
        until = settings.get("until") or []
        until = [text for text in ([until] if isinstance(until, str) else until) if text]
        choice = generate_settings(settings, self.max_new_tokens)
        if self.model.generation_config.pad_token_id is None:
            choice["pad_token_id"] = self.processor.tokenizer.pad_token_id
        if until:
            choice["stopping_criteria"] = [Until(self.processor.tokenizer, inputs["input_ids"].shape[1], until)]
        output = self.model.generate(**inputs, **choice)
        return [cut(answer, until) for answer in decode(self.processor, output, inputs)]

    def _logits(self, chat: Sequence[Any], continuation: str) -> tuple[Tensor, Tensor]:
        """Logits ``[n, V]`` that predict a continuation's tokens ``[n]`` after a chat."""
        inputs = prepare_chats(self.processor, chat, model=self.model)
        ids = self.processor.tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids.to(device=self.model.device, dtype=torch.long)
        steps: AbstractContextManager[None] = nullcontext()
        if self.mode == "decode" and not self._dense and self._scoring is not None:
            steps = self._scoring.split(inputs["input_ids"].shape[1])
        length = max(ids.shape[1], 1)
        keep = (
            {"logits_to_keep": length} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        )
        with steps:
            logits = self.model(**extended(inputs, ids[:, :-1]), **keep, use_cache=False).logits[0, -length:]
        return logits[: ids.shape[1]].to(torch.promote_types(logits.dtype, torch.float32)), ids[0]

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Numbers of requests with the same settings."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(settings_of(request), sort_keys=True, default=str), []).append(index)
        for group in groups.values():
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))

    def _attached(self, session: Session | None) -> AbstractContextManager[Any]:
        return nullcontext() if self._dense or session is None else session

    def _progress(self, total: int) -> Any:
        name = "dense" if self._dense or not self.prunes else f"pruned, {self.pop_config.label}"
        return tqdm(total=total, disable=self.rank != 0, desc=name)


class PopVLMSimple(PopVLM):
    """The same for tasks that give images and text instead of messages (``--force_simple``)."""

    is_simple = True


def _read_mappings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a command line, where a mapping is JSON."""
    read = dict(settings)
    for name in ("modality_weights", "layer_ratios"):
        if isinstance(value := read.get(name), str):
            try:
                read[name] = json.loads(value, object_pairs_hook=unique_keys)
            except ValueError as error:
                raise ConfigError(f'{name} must be JSON such as {{"image": 0.5}}; got {value!r} ({error}).') from None
    return read


def _limit_pixels(image_processor: Any, fewest: int | None, most: int | None) -> None:
    limits = {"shortest_edge": fewest, "longest_edge": most}
    limits = {name: pixels for name, pixels in limits.items() if pixels is not None}
    if limits and not is_qwen(image_processor):
        raise ConfigError(f"min_pixels and max_pixels are for Qwen-VL; this is a {type(image_processor).__name__}.")
    if limits:
        image_processor.size = {
            **{name: image_processor.size[name] for name in ("shortest_edge", "longest_edge")},
            **limits,
        }
