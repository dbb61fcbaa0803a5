"""What a method is, and which there are by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import Tensor

from ..partition import Sizes
from ..registry import Registry

if TYPE_CHECKING:
    from ..scoring import Scorer

M = TypeVar("M", bound="type[Method]")


class Method(ABC):
    """One way to decide what a decode step leaves out.

    Attributes
    ----------
    name : str
    about : str
        What it does, in one line.
    session : str
        ``"module:class"`` of the session that runs it, imported when it is first needed.
    saves_time : bool
        Whether fewer bytes are read; what only serves comparisons is not offered by ``pop-mm bench``.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    session: ClassVar[str] = "pop_mm.session:Session"
    saves_time: ClassVar[bool] = True


class ChannelMethod(Method):
    """A method that leaves out channels: the prompt cuts those of every FFN into R, C and P, a step keeps R and some of C.

    A subclass says how many channels are in each part, and may say by what they are ranked. Register it with
    :func:`register_method`, or pass an instance as ``method=``.

    Attributes
    ----------
    scorer : Scorer or None
        What ranks a prompt's channels; None: the one that the config names.
    """

    scorer: Scorer | None = None

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
            Wanted |C| / D.
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


class Abouts(Mapping[str, str]):
    """Name -> what it does, of every method that is registered."""

    def __getitem__(self, name: str) -> str:
        return _METHODS[name].about

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


__all__ = ["Abouts", "ChannelMethod", "Method", "get_method", "register_method", "unregister_method"]
