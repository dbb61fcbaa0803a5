"""``--settings FILE``: a command's settings from a file and from its options, where the option wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer

from ..settings.config import DEFAULT_BUDGET, PopConfig
from ..settings.keywords import flat, nested, with_amount


def explicit(context: typer.Context, names: Mapping[str, str]) -> dict[str, Any]:
    """Values of the options that the user gave.

    Parameters
    ----------
    names : mapping of str to str
        Option, by its parameter's name -> setting.
    """
    found = {}
    for option, setting in names.items():
        source = context.get_parameter_source(option)
        if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
            found[setting] = context.params[option]
    return found


def merged(file: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file (those that it leaves out are missing) under those that the user gave, by bare names.

    A ratio or budget that is given replaces either of them in the file, and with it the file's method if that does not take it.

    Raises
    ------
    ConfigError
        As :meth:`PopConfig.load`.
    """
    settings = with_amount({} if file is None else flat(PopConfig.load(file).changes()), given)
    return {**settings, **{name: value for name, value in given.items() if name not in ("ratio", "budget")}}


def config_of(context: typer.Context, file: str | None, *options: str) -> PopConfig:
    """The config of a command whose options have the names of settings.

    Raises
    ------
    ConfigError
        A setting that is wrong, or settings that contradict each other.
    """
    return PopConfig.from_dict(nested(merged(file, explicit(context, {name: name for name in options}))))


@dataclass(frozen=True)
class Grid:
    """What a command that compares settings is asked for.

    Attributes
    ----------
    budgets, ratios : list of float
        At least one in both together.
    methods : list of str
        Empty: the command's own.
    settings : dict
        Everything else, by bare names.
    """

    budgets: list[float]
    ratios: list[float]
    methods: list[str]
    settings: dict[str, Any]


def grid_of(context: typer.Context, file: str | None, **options: str) -> Grid:
    """The settings of a command that compares several: with neither budgets nor ratios, one budget, the default.

    Parameters
    ----------
    options : str
        Option, by its parameter's name -> setting. Those of "budget", "ratio" and "method" are lists.

    Raises
    ------
    ConfigError
        As :meth:`PopConfig.load`.
    """
    given = explicit(context, {"budget": "budget", "ratio": "ratio", "method": "method", **options})
    amounts = {name: given.pop(name, None) or [] for name in ("budget", "ratio")}
    methods = given.pop("method", None) or []
    stored = {} if file is None else flat(PopConfig.load(file).changes())
    of_file = {name: [stored.pop(name)] if name in stored else [] for name in ("budget", "ratio", "method")}
    if not any(amounts.values()):
        amounts = {"budget": of_file["budget"], "ratio": of_file["ratio"]}
        methods = methods or of_file["method"]
    if not any(amounts.values()):
        amounts["budget"] = [DEFAULT_BUDGET]
    return Grid(amounts["budget"], amounts["ratio"], methods, {**stored, **given})


__all__ = ["Grid", "config_of", "explicit", "grid_of", "merged"]
