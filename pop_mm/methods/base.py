"""What a method is, its settings, and which there are by name."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor
from typing_extensions import Self

from ..checks import check_choice, check_share, is_whole
from ..errors import ConfigError
from ..partition import Sizes
from .registry import Registry
from .scoring import Scorer, get_scorer

M = TypeVar("M", bound="type[Method]")


class Method(ABC):
    """One way to decide what a decode step leaves out. Two of a class with the same settings are equal.

    Attributes
    ----------
    name : str
    about : str
        What it does, in one line.
    session : str
        ``"module:class"`` of the session that runs it, imported when it is first needed.
    saves_time : bool
        Whether fewer bytes are read; what only serves comparisons is not offered by ``pop-mm bench``.
    prefill : {"dense", "partition"}
        ``dense`` but for methods that leave out channels.
    settings : tuple of str
        Attributes that are settings; the class has their defaults. Change none of a method that is in use: see :meth:`replace`.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    session: ClassVar[str] = "pop_mm.session.session:Session"
    saves_time: ClassVar[bool] = True
    prefill: Literal["dense", "partition"] = "dense"
    settings: ClassVar[tuple[str, ...]] = ()

    def replace(self, **settings: Any) -> Self:
        """The same method with other settings.

        Raises
        ------
        ConfigError
            A setting that the method does not have, or a wrong value.
        """
        changed = copy.copy(self)
        for name, value in settings.items():
            if name not in self.settings:
                raise ConfigError(_not_its_own(self, name, value))
            vars(changed)[name] = value  # of a frozen class too
        changed.check()
        return changed

    def check(self) -> None:  # noqa: B027
        """Raise :class:`ConfigError` for a setting of the wrong type, out of range, or unknown."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values. An own scorer appears by its name."""
        return {name: _plain(getattr(self, name)) for name in self.settings}

    def changes(self) -> dict[str, Any]:
        """Plain values of the settings that differ from the class's."""
        return {name: value for name, value in self.to_dict().items() if value != _plain(getattr(type(self), name))}

    def __repr__(self) -> str:
        own = {name: getattr(self, name) for name in self.changes()}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in own.items())})"

    def _state(self) -> tuple[Any, ...]:
        """Settings by value, whatever else an instance has by identity."""
        others = sorted((name, id(value)) for name, value in vars(self).items() if name not in self.settings)
        return type(self), tuple(getattr(self, name) for name in self.settings), tuple(others)

    def __eq__(self, other: object) -> bool:
        return self._state() == other._state() if isinstance(other, Method) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._state())


class ChannelMethod(Method):
    """A method that leaves out channels: the prompt cuts those of every FFN into R, C and P, a step keeps R and some of C.

    A subclass says how many channels are in each part, and may say by what they are ranked. Register it with
    :func:`register_method`, or pass an instance as ``method=``. What is not given is as the class has it.

    Parameters
    ----------
    gamma : float
        Share of an FFN's channels that are candidates, in [0, 1] (paper: partition fraction), 0.1. One that does not fit
        the ratio is clamped, and the report says so. Of no effect where the method has no candidates to choose the size of.
    prefill : {"dense", "partition"}
        Whether the prompt runs on the whole FFN (``dense``), or (as in the paper) is completed on R and C only.
    probe_tokens : int
        With ``prefill="partition"``: how many tokens of each sequence's prompt, evenly spaced, each FFN ranks its channels by
        before it runs all of them on R and C only, gate and up too. 0: all tokens rank, and only down is narrow. Not
        for mixtures of experts.
    scorer : str or Scorer
        What ranks channels: ``"wanda"`` (the paper's score), ``"activation"``, or an own :class:`~pop_mm.methods.scoring.Scorer`.
    tp_partition : {"shard", "global"}
        On a model that is spread over processes (``tp_plan="auto"``): each chooses among its own channels, as many in each,
        and sends nothing for it (``shard``); or all choose together, as one process would, and send the candidates'
        activations at each step.

    Raises
    ------
    ConfigError
        A value of the wrong type, out of range, or unknown.
    """

    settings: ClassVar[tuple[str, ...]] = ("gamma", "prefill", "probe_tokens", "scorer", "tp_partition")
    gamma: float = 0.1
    prefill: Literal["dense", "partition"] = "dense"
    probe_tokens: int = 0
    scorer: str | Scorer | None = "wanda"
    tp_partition: Literal["shard", "global"] = "shard"

    def __init__(
        self,
        *,
        gamma: float | None = None,
        prefill: Literal["dense", "partition"] | None = None,
        probe_tokens: int | None = None,
        scorer: str | Scorer | None = None,
        tp_partition: Literal["shard", "global"] | None = None,
    ) -> None:
        given = dict(gamma=gamma, prefill=prefill, probe_tokens=probe_tokens, scorer=scorer, tp_partition=tp_partition)
        vars(self).update(vars(self.replace(**{name: value for name, value in given.items() if value is not None})))

    def check(self) -> None:
        """Raise :class:`ConfigError` for a setting of the wrong type, out of range, or unknown."""
        check_share("gamma", self.gamma)
        check_choice("prefill", self.prefill, ("dense", "partition"))
        if not is_whole(self.probe_tokens) or self.probe_tokens < 0:
            raise ConfigError(f"probe_tokens must be an integer from 0; got {self.probe_tokens!r}.")
        if self.probe_tokens and self.prefill != "partition":
            raise ConfigError(
                f"probe_tokens={self.probe_tokens} is for prefill='partition', where the prompt is completed on the channels "
                f"that these tokens choose; got prefill={self.prefill!r}."
            )
        check_choice("tp_partition", self.tp_partition, ("shard", "global"))
        self.ranks_by()

    def ranks_by(self) -> Scorer:
        """What ranks channels: the scorer, by default ``wanda``."""
        return get_scorer("wanda" if self.scorer is None else self.scorer)

    @abstractmethod
    def sizes(self, channels: int, ratio: float, gamma: float, round_to: int = 1) -> Sizes:
        """How many of an FFN's (or expert's) channels are in R, C and P.

        Parameters
        ----------
        channels : int
            D, the intermediate size.
        ratio : float
            Share of the channels to leave out at each step, in [0, 1).
        gamma : float
            Wanted |C| / D: the setting.
        round_to : int
            |R| + |C| is a multiple of this, or D.
        """

    def step_scores(self, hidden: Tensor, weight: Tensor, channels: Tensor, position: Tensor) -> Tensor:
        """Scores of a step's candidates, of which the highest are kept; tokens that share a choice add up their squares.

        Parameters
        ----------
        hidden : Tensor
            ``[N, |C|]``: activations of each token's candidates, in any order.
        weight : Tensor
            ``[|C|]`` or ``[N, |C|]``: the scorer's weight of each.
        channels : Tensor
            ``[N, |C|]``: their original numbers.
        position : Tensor
            ``[N]``: the token's place in its sequence.

        Returns
        -------
        Tensor
            ``[N, |C|]``, not negative.
        """
        return (hidden * weight).abs()

    @property
    def chooses_by_itself(self) -> bool:
        """Whether steps score candidates in a way that no kernel knows."""
        return type(self).step_scores is not ChannelMethod.step_scores


_METHODS: Registry[Method] = Registry("method", Method, ("auto",))


def register_method(cls: M) -> M:
    """Class decorator: make a method available by its ``name``. A name that is taken is an error."""
    _METHODS.register(cls)
    return cls


def unregister_method(name: str) -> None:
    """Forget a method that :func:`register_method` made known."""
    _METHODS.unregister(name)


def get_method(method: str | Method) -> Method:
    """The method of that name, or the instance itself.

    Raises
    ------
    ConfigError
        There is none; a misspelt name is put right.
    """
    return _METHODS.get_instance(method)


def chosen_method(method: str | Method, ratio: float | None) -> Method:
    """The method itself; ``"auto"`` stands for ``pop`` if a ratio is given, else for ``thresholds``."""
    if method == "auto":
        return get_method("thresholds" if ratio is None else "pop")
    return get_method(method)


def _not_its_own(method: Method, name: str, value: object) -> str:
    """What to say of a setting that a method does not have."""
    owners = [other for other, cls in _METHODS.items() if name in cls.settings]
    if not owners:
        close = get_close_matches(name, method.settings, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(method.settings) or "none"
        return f"Unknown setting {name!r} of method={method.name!r}; known: {known}.{hint}"
    owner = "pop" if name in ChannelMethod.settings else owners[0]
    get_method(owner).replace(**{name: value})  # a value that is wrong anyway is said to be that
    return (
        f"{name}={_plain(value)!r} is a setting of {'POP' if owner == 'pop' else f'method={owner!r}'}, and has no meaning for "
        f"method={method.name!r}. Leave it out, or set method={owner!r}."
    )


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Scorer) else value


class Abouts(Mapping[str, str]):
    """Name -> what it does, of every method that is registered."""

    def __getitem__(self, name: str) -> str:
        return _METHODS[name].about

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


__all__ = ["Abouts", "ChannelMethod", "Method", "chosen_method", "get_method", "register_method", "unregister_method"]
