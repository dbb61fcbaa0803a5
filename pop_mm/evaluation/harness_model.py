"""lm-evaluation-harness's model ``pop``: Hugging Face models that are pruned while they answer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..errors import ConfigError
from ..methods.thresholds import MIN_PROMPT_TOKENS
from ..samples import SAMPLES, resolve
from ..session.session import Session
from ..settings.config import PopConfig
from ..settings.deprecated import GONE
from ..settings.keywords import OF_EXPERTS, OF_METHODS
from .harness_tally import Counting, config_from

_SETTINGS = [*(field.name for field in fields(PopConfig)), *OF_METHODS, *OF_EXPERTS, *GONE]
_HFLM_BACKENDS = ("default", "causal", "seq2seq")  # HFLM has a setting of the same name
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """What one forward reads of a request: all tokens but the last.

    Attributes
    ----------
    tokens : tuple of int
        Context and continuation without its last token, cut on the left to what the model can read.
    context : int
        How many of them are context. The logits of the others, and of the last one of the context, are scored.
    prefill : bool
        Whether all of them are one prefill.
    """

    tokens: tuple[int, ...]
    context: int
    prefill: bool


@register_model("pop")
class PopLM(Counting, HFLM):  # type: ignore[misc]
    """A pruned Hugging Face model, for ``lm_eval --model pop --model_args pretrained=...,budget=0.65`` (or ``ratio=0.2``).

    Generation is pruned as in :func:`pop_mm.prune`. A continuation to be scored goes through the model in one forward
    with its context: as decode steps, which gives what generating it would have given, or as a part of the prefill.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        A sample's name, a folder, a hub id, or a model.
    loglikelihood : {"decode", "prefill"}
        ``"decode"``: the context is prefill and each token of the continuation a decode step. ``"prefill"``: both
        are one prefill that is completed on the retained and candidate channels (``prefill="partition"``), as the
        paper scores. Empty contexts and rolling windows are always scored so. Thresholds leave a prefill dense: those
        texts are then dense, which the tally counts, and ``"prefill"`` is refused.
    **settings
        Fields of :class:`PopConfig`, settings of the method and of experts by their names (``gamma=0.2,min_tokens=4``), and
        ``settings``, a settings file under them. ``batch`` is ``"per_sequence"`` unless given, so that answers do not depend
        on what else is in a batch. Everything else goes to lm_eval's ``HFLM``.

    Attributes
    ----------
    tallies : dict of str to Tally
        By task.

    Raises
    ------
    ConfigError
        A setting is wrong; the model has not been loaded then.
    """

    def __init__(self, pretrained: Any, loglikelihood: str = "decode", **settings: Any) -> None:
        config, others = _sort_out(settings)
        self._start_counting(config, loglikelihood)
        self._task = ""
        if isinstance(pretrained, str):
            if pretrained in SAMPLES:
                others.setdefault("dtype", SAMPLES[pretrained].dtype)
            others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
            pretrained = resolve(pretrained)
        super().__init__(pretrained, **others)
        self._session = Session(self.model, self.pop_config)
        self._partition_session = self._prefill_session(self.model)
        self.prunes = any(plan.backend != "dense" for plan in self._session.plans)

    def set_cache_hook(self, cache_hook: Any) -> NoReturn:
        """Refuse lm_eval's cache of responses."""
        raise ValueError(
            "--use_cache keeps responses by request alone, so those of the pruned and of the dense model would be mixed up. "
            "Leave it out with --model pop (--cache_requests is fine)."
        )

    # requests -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, generated inside a session."""
        with self._attached(self._session):
            return self._by_task(super().generate_until, requests, disable_tqdm, generated=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window by window, each a prefill."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def _by_task(
        self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool, generated: bool = False
    ) -> list[Any]:
        """Answer the requests of one task after the other, so that each has a tally of its own."""
        results: list[Any] = [None] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            self._task = task or "unnamed"
            places = [index for index, request in enumerate(requests) if request.task_name == task]
            answers = answer([requests[index] for index in places], disable_tqdm=disable_tqdm)
            for index, result in zip(places, answers, strict=True):
                results[index] = result
            if generated:
                for tokens in (self.tok_encode(answer, add_special_tokens=False) for answer in answers):
                    self._count_generated(self._task, len(tokens))
            if warning := self._warnings().get(self._task):
                _log.warning(warning)
        return results

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        places: dict[Text, list[int]] = {}  # requests that differ in their last token alone share a forward
        for index, request in enumerate(requests):
            places.setdefault(self._text(*request), []).append(index)
        results: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for prefill, session in ((False, self._session), (True, self._partition_session)):
            texts = sorted((text for text in places if text.prefill == prefill), key=lambda text: -len(text.tokens))
            if not texts:
                continue
            with self._attached(session):
                size = override_bs or self._rows_for(texts[0])
                for start in range(0, len(texts), size):
                    batch = texts[start : start + size]
                    for text, logits in zip(batch, self._logits(session, batch), strict=True):
                        scored = self._log_softmax(logits[text.context - 1 : len(text.tokens)])
                        for index in places[text]:
                            results[index] = _score(scored, requests[index][2])
                            self._count_scored(self._task, len(scored), text.prefill)
                        bar.update(len(places[text]))
        bar.close()
        return results

    def _text(self, key: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Text:
        context = context or [self.prefix_token_id]
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"A continuation must have 1 to {self.max_length} tokens, which the model can read at once; "
                f"{'a window' if key is None else repr(key[1])} has {len(continuation)}."
            )
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        prefill = self.mode == "prefill" or key is None or not key[0].strip()
        prefill |= self._thresholds and len(tokens) - len(continuation) + 1 < MIN_PROMPT_TOKENS  # decodes dense
        return Text(tuple(tokens), len(tokens) - len(continuation) + 1, prefill)

    def _rows_for(self, longest: Text) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        return int(self._detect_batch_size([(None, list(longest.tokens), [0])], 0))

    @torch.no_grad()
    def _logits(self, session: Session, batch: Sequence[Text]) -> Tensor:
        """Logits ``[B, q, V]`` of texts that are padded on the right."""
        shape = len(batch), max(len(text.tokens) for text in batch)
        ids, mask = torch.full(shape, self.tokenizer.pad_token_id), torch.zeros(shape, dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, : len(text.tokens)], mask[row, : len(text.tokens)] = torch.tensor(text.tokens), 1
        decode: AbstractContextManager[None] = nullcontext()
        if not self._dense and not batch[0].prefill:
            decode = session.split(torch.tensor([text.context for text in batch], device=self.device))
        dtype = self.mixed_precision_dtype
        with decode, torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1, self.softmax_dtype or torch.promote_types(logits.dtype, torch.float32))

    def _attached(self, session: Session) -> AbstractContextManager[Any]:
        return nullcontext() if self._dense else session

    # what was done --------------------------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """What ``HFLM`` says of the model, and :meth:`pop_info` under ``"pop"``."""
        return {**super().get_model_info(), "pop": self.pop_info()}


def _sort_out(settings: Mapping[str, Any]) -> tuple[PopConfig, dict[str, Any]]:
    """The session's settings, and those that are left for HFLM."""
    own: dict[str, Any] = {}
    others = dict(settings)
    file = others.pop("settings", None)
    for name in _SETTINGS:
        if name in others and not (name == "backend" and others[name] in _HFLM_BACKENDS):
            own[name] = others.pop(name)
    known = inspect.signature(HFLM.__init__).parameters
    for name in others:
        if name not in known and (close := get_close_matches(name, _SETTINGS, 1, cutoff=0.8)):
            raise ConfigError(f"Unknown setting {name!r}. Did you mean {close[0]!r}?")
    return config_from(own, file), others


def _score(scored: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Sum of log-probabilities ``[n, V]`` at the tokens ``[n]``, and whether each is the most likely one."""
    targets = torch.tensor(continuation, device=scored.device)
    total = scored.gather(-1, targets.unsqueeze(-1)).sum()
    return float(total), bool((scored.argmax(-1) == targets).all())
