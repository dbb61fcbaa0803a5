"""Old names of settings, which work until the next version.

Then this file goes, with what is imported from it in ``config.py`` and ``evaluation/harness_model.py``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from ..checks import is_whole
from ..classes import is_own
from ..errors import ConfigError
from ..methods import Method, Pop, Thresholds, chosen_method
from .expert_policy import ExpertPolicy, check_policy
from .keywords import OF_EXPERTS, OF_METHODS

if TYPE_CHECKING:
    from .config import PopConfig

C = TypeVar("C")
GONE = ("round_to", "variant")
OLD_NAMES = (*OF_METHODS, *OF_EXPERTS, *GONE)


def accepts_old_names(cls: type[C]) -> type[C]:
    """Class decorator of :class:`PopConfig`: it takes the old names as keywords, and has them as attributes."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def accepting(self: C, *args: Any, **settings: Any) -> None:
        if not any(name in OLD_NAMES for name in settings):
            return init(self, *args, **settings)
        named = dict(zip(("ratio", "scope"), args, strict=False))
        return init(self, *args[2:], **moved(dict(**named, **settings)))

    cls.__init__ = accepting  # type: ignore[assignment]
    for name in OLD_NAMES:
        setattr(cls, name, property(_reader(name)))
    return cls


def _reader(name: str) -> Callable[[Any], Any]:
    def read(config: PopConfig) -> Any:
        home = "experts" if name in OF_EXPERTS else "chosen"
        own = {"round_to": "it has no effect", "variant": "read config.chosen_method"}
        use = own.get(name, f"read config.{home}.{OF_EXPERTS.get(name, name)}")
        _warn(f"Old name of a setting: config.{name} goes in the next version; {use}.")
        return old_values(config.method, config.ratio, config.experts)[name]

    return read


def old_values(method: str | Method, ratio: float | None, experts: ExpertPolicy) -> dict[str, Any]:
    """All settings that have moved or gone, by their old names."""
    chosen = chosen_method(method, ratio)
    own = {**Pop().to_dict(), **Thresholds().to_dict(), **chosen.to_dict()}
    return {
        **{name: own[name] for name in OF_METHODS},
        **{name: getattr(experts, its) for name, its in OF_EXPERTS.items()},
        "round_to": 1,
        "variant": chosen.name if chosen.name in ("static", "full") else "pop",
    }


def moved(values: Mapping[str, Any], copies: bool = False) -> dict[str, Any]:
    """Settings without old names: what they said is in ``method`` and ``experts``. One warning says what to write instead.

    Parameters
    ----------
    values : mapping
        Arguments of :class:`PopConfig`.
    copies : bool
        Whether old names that say the same as the new ones are passed over, since ``to_dict`` writes both.

    Raises
    ------
    ConfigError
        The method has no such setting, or an old name contradicts a new one.
    """
    found = dict(values)
    old = {name: found.pop(name) for name in OLD_NAMES if name in found}
    if not old:
        return found
    experts, method, ratio = found.get("experts", ExpertPolicy()), found.get("method", "auto"), found.get("ratio")
    check_policy(experts)
    if (variant := old.get("variant", "pop")) != "pop":
        if variant not in ("static", "full"):
            raise ConfigError(f"variant must be one of 'pop', 'static', 'full'; got {variant!r}.")
        if method != "auto" and chosen_method(method, ratio).name != variant:
            raise ConfigError(f"variant={variant!r} contradicts method={method!r}. Leave variant out.")
        method = found["method"] = variant if method == "auto" else method
    now = old_values(method, ratio, experts)
    said = {name: value for name, value in old.items() if value != now[name]}
    if copies and not said:
        return found
    if copies:
        name, value = next(iter(said.items()))
        raise ConfigError(
            f"{name}={value!r} contradicts {now[name]!r} in method_settings or experts. {name!r} is the old name: leave it out."
        )
    _check_round_to(old.get("round_to", 1))
    advice = []
    if own := {name: value for name, value in said.items() if name in OF_METHODS}:
        found["method"] = chosen_method(method, ratio).replace(**own)
    if own or variant != "pop":
        chosen = found["method"]
        advice.append(f"method={chosen!r} ({_in_json(chosen)})")
    if own := {its: said[name] for name, its in OF_EXPERTS.items() if name in said}:
        found["experts"] = ExpertPolicy(**{**experts.to_dict(), **own})
        changes = found["experts"].changes()
        arguments = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        advice.append(f'experts=ExpertPolicy({arguments}) (in JSON: "experts": {json.dumps(changes)})')
    use = f"use {' and '.join(advice)}" if advice else "leave out what is the default or has no effect"
    _warn(f"Old names of settings: {', '.join(old)}. They go in the next version; {use}.")
    return found


def _in_json(method: str | Method) -> str:
    if isinstance(method, str):
        return f'in JSON: "method": "{method}"'
    return f'in JSON: "method": "{method.name}", "method_settings": {json.dumps(method.changes())}'


def _check_round_to(value: object) -> None:
    """``round_to`` has no effect: what a product needs to be aligned to, the library knows."""
    if not is_whole(value) or value < 1:
        raise ConfigError(f"round_to must be a positive integer; got {value!r}.")


def _warn(message: str) -> None:
    """Warn where the user's own code is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _passes_on(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def _passes_on(module: str) -> bool:
    """Whether code of this module hands on what somebody else wrote."""
    return module == "dataclasses" or is_own(module)


__all__ = ["GONE", "OLD_NAMES", "accepts_old_names", "moved", "old_values"]
