"""PopConfig: every setting of a session, validated when it is made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from ..checks import check_budget, check_choice, check_share, is_number, is_whole
from ..errors import ConfigError
from ..methods import ChannelMethod, Method, chosen_method, get_method
from ..methods.scoring import get_scorer
from ..modality import MODALITIES
from .deprecated import OLD_NAMES, accepts_old_names, moved, old_values
from .expert_policy import ExpertPolicy, check_policy

_CHOICES = {
    "scope": ("overall", "ffn"),
    "batch": ("shared", "per_sequence"),
    "backend": ("auto", "masked", "inplace"),
    "kernels": ("auto", "stock", "compiled", "triton"),
}
DEFAULT_BUDGET = 0.65
_OF_POP = ("layer_ratios", "modality_weights")  # not "batch": each sequence has its own thresholds either way


@accepts_old_names
@dataclass(frozen=True)
class PopConfig:
    """Settings of one pruning session.

    Give ``ratio`` (the paper's POP) or ``budget``, not both; with neither the budget is 0.65.

    Parameters
    ----------
    ratio : float, optional
        Share to leave out while decoding, in [0, 1). 0 is the dense model.
    scope : {"overall", "ffn"}
        What ``ratio`` is a share of: the attention and FFN weights of all blocks (as the paper quotes it; the FFN ratio
        is raised so that the total matches, since attention stays), or each FFN's channels. Of a ``budget``: the bytes of
        the decoder layers' attention and FFNs, or of the FFNs alone (attention then stays dense).
    batch : {"shared", "per_sequence"}
        One partition and step mask for the whole batch (the paper), or one for each row.
    backend : {"auto", "masked", "inplace"}
        ``inplace`` is fast; ``masked`` is the reference, works on any module and saves no time; ``auto`` chooses for
        each FFN. Thresholds are masked or, with ``auto``, read by rows.
    layer_ratios : mapping of int to float
        FFN ratio of single layers, e.g. ``{0: 0.0}`` keeps layer 0 dense. With ``scope="overall"`` the other layers make
        up for it, so that the overall ratio still holds.
    modality_weights : mapping of str to float
        How much a modality ("text", "image", "video") counts in the prompt's scores of a vision-language model: the
        squared activations of its tokens are multiplied by this. 1 for those that are not named, which is the paper's
        plain norm over all prompt tokens. Experts learn from decoded tokens as text.
    kernels : {"auto", "stock", "compiled", "triton"}
        How one token of each of up to 32 sequences is decoded on a CPU where FFNs are in place: by torch's kernels, or by
        faster ones that the machine's C compiler makes on first use, which then serve attention (its linear modules, and
        of one sequence in bfloat16 attention itself), norms and the lm_head too; ``auto`` takes those where they can be had.
        Sums are rounded differently. Routed experts take them for one sequence alone.
        Asked for by name, ``compiled`` serves FFNs that leave nothing out as well: ``ratio=0, kernels="compiled"`` is the
        dense model on those kernels. What is not a layer's arithmetic (the prompt's statistics, moving channels, the
        choice among candidates) uses the compiled library on any CPU that has a compiler. ``triton`` is for CUDA devices
        (on a CPU only where TRITON_INTERPRET=1 is set, for tests): kernels for one token of each of up to 8 sequences,
        which also let each have its own channels with ``batch="per_sequence"``; of thresholds, for one sequence.
    budget : float, optional
        Share of the weight bytes in ``scope`` that a decoded token reads, in (0, 1]; of routed experts, those that a token
        uses. 1 is the dense model, bit for bit. POP reads R and C of gate, up and down.
    method : str or Method
        What a decode step leaves out: ``"auto"``, the name of a registered :class:`~pop_mm.methods.Method`, or an instance with
        settings of its own: ``Pop(gamma=0.2)``, ``Thresholds(head_budget=0.7)``. It is an instance, or ``"auto"``, afterwards.
        ``thresholds``: the entries of each matrix's input that are below a threshold from the prompt, for each sequence by
        itself; it takes a budget alone, and is fast for one sequence on a CPU with a C compiler. ``pop``: the paper. Its
        ablations, for comparison: ``static`` keeps the prompt's best channels for every step (no candidates), ``full`` chooses
        among all channels at every step (best quality, computes everything, saves nothing). ``auto``: ``pop`` if a ratio is
        given, else ``thresholds``.
    experts : ExpertPolicy
        How experts are pruned.

    Raises
    ------
    ConfigError
        A value of the wrong type, out of range, or unknown.
    """

    ratio: float | None = None
    scope: Literal["overall", "ffn"] = "overall"
    _: KW_ONLY
    batch: Literal["shared", "per_sequence"] = "shared"
    backend: Literal["auto", "masked", "inplace"] = "auto"
    layer_ratios: Mapping[int, float] = field(default_factory=dict)
    modality_weights: Mapping[str, float] = field(default_factory=dict)
    kernels: Literal["auto", "stock", "compiled", "triton"] = "auto"
    budget: float | None = None
    method: str | Method = "auto"
    experts: ExpertPolicy = field(default_factory=ExpertPolicy)

    def __post_init__(self) -> None:
        self._settle_amount()
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_policy(self.experts)
        if not isinstance(self.layer_ratios, Mapping):
            raise ConfigError(f"layer_ratios must map layer numbers to FFN ratios; got {self.layer_ratios!r}.")
        for layer, ratio in self.layer_ratios.items():
            if not is_whole(layer) or layer < 0:
                raise ConfigError(f"layer_ratios: a layer is an integer from 0; got {layer!r}.")
            check_share(f"layer_ratios[{layer}]", ratio, upper_open=True)
        object.__setattr__(self, "layer_ratios", dict(self.layer_ratios))
        _check_modality_weights(self.modality_weights)
        object.__setattr__(self, "modality_weights", dict(self.modality_weights))
        if self.backend == "inplace" and self.batch == "per_sequence":
            raise ConfigError(
                "backend='inplace' holds one partition in the weights, so it cannot serve batch='per_sequence'. "
                "Use backend='auto' or 'masked' (no speed-up), or batch='shared'."
            )
        self._settle_method()

    def _settle_amount(self) -> None:
        """One of ratio and budget."""
        if self.ratio is not None:
            check_share("ratio", self.ratio, upper_open=True)
        elif self.budget is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        if self.budget is None:
            return
        if self.ratio is not None:
            raise ConfigError(
                f"ratio={self.ratio!r} and budget={self.budget!r} were both given. Give one: a ratio is the share that POP "
                "leaves out, a budget the share of bytes that is read."
            )
        check_budget("budget", self.budget)

    def _settle_method(self) -> None:
        """An instance, and nothing is set that the method does not have."""
        if isinstance(self.method, Method):
            self.method.check()
        elif self.method != "auto":
            object.__setattr__(self, "method", get_method(self.method))
        if self.chosen_method != "thresholds":
            return
        if self.ratio is not None:
            raise ConfigError(
                f"method='thresholds' takes a budget, the share of bytes that is read, not ratio={self.ratio!r}. Give budget=, "
                "or method='pop'."
            )
        experts = {name: value for name, value in self.experts.changes().items() if name != "prune_shared"}
        for name, value in {**{name: getattr(self, name) for name in _OF_POP}, **experts}.items():
            if value:
                raise ConfigError(
                    f"{name}={value!r} is a setting of POP, and has no meaning for method='thresholds'. Leave it out, or "
                    "set method='pop'."
                )
        if self.backend == "inplace" or self.kernels == "compiled":
            asked = "backend='inplace'" if self.backend == "inplace" else f"kernels={self.kernels!r}"
            raise ConfigError(
                f"{asked} cannot serve method='thresholds', which has kernels of its own. Leave it out, or set method='pop'."
            )

    @property
    def chosen_method(self) -> str:
        """Name of the method, what ``auto`` stands for included."""
        return self.chosen.name

    @property
    def chosen(self) -> Method:
        """The method, what ``auto`` stands for included."""
        return chosen_method(self.method, self.ratio)

    @property
    def channel_method(self) -> ChannelMethod:
        """The method itself, which leaves out channels."""
        method = self.chosen
        if not isinstance(method, ChannelMethod):
            raise ConfigError(f"method={method.name!r} leaves out no channels.")
        return method

    @property
    def label(self) -> str:
        """What was asked for, in words: ``"ratio 0.4"``, ``"budget 0.65, thresholds"``."""
        return f"ratio {self.ratio:g}" if self.ratio is not None else f"budget {self.budget:g}, {self.chosen_method}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them. An own scorer or method appears by its name.

        Settings of the method are in ``"method_settings"``, and with those of experts there by their old names too, which go in
        the next version.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["method"] = self.method.name if isinstance(self.method, Method) else self.method
        values["method_settings"] = self.chosen.to_dict()
        values["experts"] = self.experts.to_dict()
        values["modality_weights"] = dict(self.modality_weights)
        values["layer_ratios"] = {str(layer): ratio for layer, ratio in self.layer_ratios.items()}
        return {**values, **old_values(self.method, self.ratio, self.experts)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PopConfig:
        """A config from plain values; unknown keys are an error."""
        known = [*(f.name for f in fields(cls)), "method_settings"]
        for key in values:
            if key not in (*known, *OLD_NAMES):
                close = get_close_matches(key, (*known, *OLD_NAMES), 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"Unknown setting {key!r}; known: {', '.join(known)}.{hint}")
        values = dict(values)
        if isinstance(values.get("experts"), Mapping):
            values["experts"] = ExpertPolicy.from_dict(values["experts"])
        copies = "method_settings" in values
        settings = values.pop("method_settings", {})
        if not isinstance(settings, Mapping):
            raise ConfigError(f"method_settings must map settings of the method to their values; got {settings!r}.")
        method = chosen_method(values.get("method", "auto"), values.get("ratio"))
        if changed := {name: value for name, value in settings.items() if value != method.to_dict().get(name, MISSING)}:
            values["method"] = method.replace(**changed)
        values = moved(values, copies)
        layers = values.get("layer_ratios")
        if isinstance(layers, Mapping):
            try:
                numbers = [int(layer) if isinstance(layer, str) else layer for layer in layers]
            except ValueError:
                raise ConfigError(f"layer_ratios: a layer is an integer from 0; got {layers!r}.") from None
            if twice := [layer for layer, count in Counter(numbers).items() if count > 1]:
                raise ConfigError(f"layer_ratios names layer {twice[0]} more than once: {layers!r}.")
            values["layer_ratios"] = dict(zip(numbers, layers.values(), strict=True))
        return cls(**values)

    def to_json(self) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PopConfig:
        """The config that :meth:`to_json` wrote. A key that is given twice is an error."""
        try:
            values = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Not a JSON config: {error}.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"A JSON config is an object; got {type(values).__name__}.")
        return cls.from_dict(values)

    def changes(self) -> dict[str, Any]:
        """Plain values of what differs from the defaults, and the method that ``auto`` stands for, for :meth:`from_dict`."""
        plain = {f.name: f.default for f in fields(self)}
        values = {name: value for name, value in self.to_dict().items() if name in plain and value != plain[name]}
        values |= {
            "method": self.chosen_method,
            "method_settings": self.chosen.changes(),
            "experts": self.experts.changes(),
        }
        return {name: value for name, value in values.items() if value != {}}

    def save(self, path: str | Path) -> Path:
        """Write a settings file: JSON of :meth:`changes`.

        Raises
        ------
        ConfigError
            The file cannot be written, or an own scorer or method is not registered, so that no file can name it.
        """
        values = self.changes()
        get_scorer(values.get("method_settings", {}).get("scorer", "wanda"))
        get_method(values["method"])
        target = Path(path).expanduser()
        try:
            target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"The settings file {target} cannot be written: {error.strerror or error}.") from None
        return target

    @classmethod
    def load(cls, path: str | Path) -> PopConfig:
        """The config of a settings file: JSON with some of the settings, as :meth:`save` and ``pop-mm tune`` write it.

        Raises
        ------
        ConfigError
            The file cannot be read, is no JSON object, or has a setting that is unknown (the nearest name is given) or wrong.
        """
        target = Path(path).expanduser()
        try:
            text = target.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise ConfigError(f"The settings file {target} cannot be read: {said}.") from None
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"The settings file {target}: {error}") from None


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` of a JSON reader: an object as a dict; a key that it has twice raises ``ValueError``."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} is given more than once; keep one")
    return found


def _check_modality_weights(weights: object) -> None:
    if not isinstance(weights, Mapping):
        raise ConfigError(f"modality_weights must map modalities to numbers; got {weights!r}.")
    for name, weight in weights.items():
        if name not in MODALITIES:
            raise ConfigError(f"modality_weights: a modality is one of {', '.join(MODALITIES)}; got {name!r}.")
        if not is_number(weight) or weight < 0:
            raise ConfigError(f"modality_weights[{name!r}] must be a number from 0; got {weight!r}.")
    if all(weights.get(name, 1) == 0 for name in MODALITIES):
        raise ConfigError("modality_weights are all 0, so nothing would count.")


def as_config(config: PopConfig | float | None, settings: Mapping[str, Any]) -> PopConfig:
    """A config from a config, from a bare ratio, or from keyword settings."""
    if isinstance(config, PopConfig):
        if settings:
            raise ConfigError(f"Give a PopConfig or single settings, not both (got {', '.join(settings)}).")
        return config
    if config is not None:
        if "ratio" in settings:
            raise ConfigError("The ratio was given twice.")
        settings = {"ratio": config, **settings}
    return PopConfig.from_dict(settings)


__all__ = ["PopConfig", "as_config", "unique_keys"]
