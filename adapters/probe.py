"""The contract of an adapter, tried on numbers: every channel is computed alone, and the projections are really called.

A dense FFN or shared expert is run with stand-ins for its projections. Gate and up give random numbers, on some of the
channels the same as on all; the down projection writes down what enters it. What is made of a channel must not depend on
which others are there, or where. Neither the weights nor their format matter, so quantised and wrapped projections are
probed alike. Routed experts are run on random tokens, by their own code and from their record's views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop_mm.errors import AdapterError, one_line
from pop_mm.patching import Patches
from pop_mm.weights.experts import Experts
from pop_mm.weights.layout import FFN, Projection

Call = Callable[[], Any]

_TOKENS = 6
_RANK = 8  # of the stand-in for a down projection: as good as a whole matrix
_SAME = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
}  # how far what is made of equal numbers may differ
_PRODUCT = {torch.float64: 1e-8, torch.float32: 3e-4, torch.bfloat16: 1e-1}  # and two ways to compute one product


class CannotProbe(AdapterError):
    """The FFN does not run on what the probe can give it, so nothing is known about its channels."""


def without_weights(module: nn.Module) -> bool:
    """Whether the module is on the meta device; offloaded weights are only elsewhere."""
    return any(
        tensor.device.type == "meta" and not hasattr(owner, "_hf_hook")
        for owner in module.modules()
        for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False))
    )


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), "cpu"))


# dense FFNs and shared experts --------------------------------------------------------------------------------------


def probe_ffn(ffn: FFN, home: nn.Module, feed: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None) -> None:
    """Check that channels are independent of each other, and that the projections are called.

    Parameters
    ----------
    home : nn.Module
        Module whose forward runs the FFN: its holder, or the decoder layer.
    feed : callable or None
        Arguments for ``home``, for one that does not run on ``[1, T, H]`` alone.

    Raises
    ------
    CannotProbe
        There are no weights, or ``home`` does not run as a whole.
    AdapterError
        The contract is broken; the message names the FFN and says how.
    """
    if without_weights(home):
        raise CannotProbe(f"{ffn.name} cannot be probed: it is on the meta device, without weights. Load the model.")
    trial = _Trial(ffn, device_of(home))
    call, h, dense = _whole(trial, home, feed)
    if missing := [p.name for p in ffn.projections if not trial.calls[p]]:
        raise AdapterError(
            f"{ffn.name} gives the same result whatever {', '.join(missing)} would compute: not called by its forward, but "
            "at most read past it."
        )
    for channels in _subsets(h):
        narrow_h, narrow = trial.run(call, channels)
        where = f"{ffn.name} gives another result on {len(channels)} of its {ffn.size} channels"
        expected = h[:, channels]
        if narrow_h.shape != expected.shape:
            raise AdapterError(f"{where} than with the others zeroed, so its channels are not independent.")
        if (apart := _apart(narrow_h, expected, _SAME)) is not None:
            token, place = apart
            raise AdapterError(
                f"{where}, in another order, than among all (channel {int(channels[place])} has "
                f"{float(narrow_h[token, place]):.4g} in front of {ffn.down.name}, and {float(expected[token, place]):.4g} "
                "among all), so its channels are not independent."
            )
        keep = torch.zeros(ffn.size, dtype=torch.bool, device="cpu").index_fill_(0, channels, True)
        masked = trial.run(call, torch.arange(ffn.size, device="cpu"), keep)[1]
        if len(channels) < ffn.size and _apart(dense, masked, _PRODUCT) is None:
            raise AdapterError(
                f"{ffn.name} gives the same result without {ffn.size - len(channels)} of its {ffn.size} channels: its "
                "projections are not called for what it returns."
            )
        if narrow.shape != masked.shape or _apart(narrow, masked, _PRODUCT) is not None:
            raise AdapterError(
                f"{where} than with the others zeroed in front of {ffn.down.name}, so its channels are not independent: "
                "something else takes them too."
            )
    for p in ffn.projections:
        _probe_plain(p)


def _whole(
    trial: _Trial, home: nn.Module, feed: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None
) -> tuple[Call, Tensor, Tensor]:
    """How to run the FFN, what enters its down projection (``[N, D]``) and its result, on all channels."""
    ffn = trial.ffn
    everything = torch.arange(ffn.size, device="cpu")
    failed: AdapterError | None = None
    if ffn.holder is not None:
        x = trial.tokens()
        for dtype in dict.fromkeys((trial.dtype, ffn_dtype(ffn))):  # the wider one first: it hides nothing
            call = partial(_call, home, x.to(dtype))
            try:
                return call, *trial.run(call, everything)
            except AdapterError as error:
                failed = failed or error
    if feed is not None:
        args, kwargs = feed()
        call = partial(home.forward, *args, **kwargs)
        try:
            return call, *trial.run(call, everything)
        except AdapterError as error:
            failed = failed or error
    raise CannotProbe(str(failed or f"{ffn.name} cannot be probed: it has no module of its own."))


def _call(home: nn.Module, x: Tensor) -> Any:
    return home.forward(x.clone())


def ffn_dtype(ffn: FFN) -> torch.dtype:
    """Dtype that the FFN computes in, also where nobody can read its weights."""
    weight = getattr(ffn.down.module, "weight", None)
    known = isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float64)
    return weight.dtype if known else torch.float32  # type: ignore[union-attr]


class _Trial:
    """Runs of one FFN on stand-ins for its projections.

    Attributes
    ----------
    calls : Counter
        How often the latest run called each projection.
    """

    def __init__(self, ffn: FFN, device: torch.device) -> None:
        self.ffn = ffn
        self.device = device
        self.dtype = torch.promote_types(ffn_dtype(ffn), torch.float32)
        self.calls: Counter[Projection] = Counter()
        self._generator = torch.Generator(device="cpu").manual_seed(0)
        self._outputs: dict[tuple[Projection, int], Tensor] = {}
        self._left = self._random(ffn.size, _RANK) / ffn.size**0.5
        self._right = self._random(_RANK, ffn.hidden_size)
        self._entered: list[Tensor] = []

    def tokens(self) -> Tensor:
        """``[1, T, H]``, random."""
        return self._random(1, _TOKENS, self.ffn.hidden_size).to(self.device, self.dtype)

    def _random(self, *shape: int) -> Tensor:
        """The next numbers of a normal distribution: on the CPU in float64, free of any product's noise."""
        return torch.randn(*shape, generator=self._generator, device="cpu", dtype=torch.float64)

    def run(self, call: Call, channels: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What enters the down projection, ``[N, n]``, and what comes out of the FFN.

        Parameters
        ----------
        channels : Tensor
            ``[n]``: the channels that there are, in this order.
        keep : Tensor or None
            ``[n]``, boolean: the others are zeroed in front of the down projection.
        """
        ffn, patches = self.ffn, Patches()
        self.calls, self._entered = Counter(), []
        try:
            for p in ffn.inputs:
                patches.replace(p.module, "forward", partial(self._give, p, channels))
            patches.replace(ffn.down.module, "forward", partial(self._take, channels, keep))
            output = call()
        except Exception as error:
            raise AdapterError(
                f"{ffn.name} does not run on {len(channels)} of its {ffn.size} channels alone "
                f"({type(error).__name__}: {one_line(error)})."
            ) from error
        finally:
            patches.undo()
        output = output[0] if isinstance(output, tuple) else output
        h = torch.cat(self._entered) if self._entered else torch.empty(0, len(channels), device="cpu")
        return h, output.reshape(-1, output.shape[-1]).cpu()

    def _give(self, p: Projection, channels: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Instead of gate or up: numbers with a heavy tail, small and large ones by token."""
        number = self.calls[p]
        self.calls[p] += 1
        rows = x.shape[:-1].numel()
        if (p, number) not in self._outputs:
            shape = rows, p.blocks, self.ffn.size
            values = self._random(*shape) * self._random(*shape).exp()
            sizes = torch.logspace(-1, 1, _TOKENS, dtype=torch.float64, device="cpu")
            self._outputs[p, number] = values * sizes.repeat(-(-rows // _TOKENS))[:rows, None, None]
        values = self._outputs[p, number][..., channels]
        return values.reshape(*x.shape[:-1], -1).to(x.device, x.dtype)

    def _take(self, channels: Tensor, keep: Tensor | None, h: Tensor, *_: Any, **__: Any) -> Tensor:
        """Instead of the down projection: another matrix."""
        self.calls[self.ffn.down] += 1
        if h.shape[-1] != len(channels):
            raise ValueError(f"{self.ffn.down.name} is given {h.shape[-1]} channels")
        self._entered.append(h.detach().reshape(-1, h.shape[-1]).cpu().clone())
        wide = h.detach().to("cpu", torch.float64)
        wide = wide if keep is None else wide.where(keep, 0)
        return (wide @ self._left[channels] @ self._right).to(h.device, h.dtype)


def _subsets(h: Tensor) -> Iterator[Tensor]:
    """Channels to be computed without the others, in random order: halves by chance and by size, then all of them."""
    size = h.shape[1]
    order = torch.randperm(size, generator=torch.Generator(device="cpu").manual_seed(1), device="cpu")
    half = (size + 1) // 2
    by_size = torch.nan_to_num(h.float()).abs().sum(0).argsort().cpu()
    small = order[torch.isin(order, by_size[:half])]
    large = order[torch.isin(order, by_size[half:])]
    yield from (subset for subset in (order[:half], order[half:], small, large, order) if len(subset))


def _apart(found: Tensor, expected: Tensor, noise: dict[torch.dtype, float]) -> tuple[int, int] | None:
    """Where two matrices of one shape differ by more than their dtype's noise: row and column, or None.

    The noise of a number is relative to itself and, a tenth of that, to the largest of its row.
    """
    share = noise[found.dtype if found.dtype in noise and found.is_cpu else torch.bfloat16]  # a GPU may use TF32
    found, expected = found.double().cpu(), expected.double().cpu()
    finite = expected.where(expected.isfinite(), 0).abs()
    allowed = share * (finite + 0.1 * finite.amax(1, keepdim=True))
    same = (found == expected) | (found.isnan() & expected.isnan()) | ((found - expected).abs() <= allowed)
    if bool(same.all()):
        return None
    row, column = (~same).nonzero()[0].tolist()
    return row, column


@torch.no_grad()
def _probe_plain(p: Projection) -> None:
    """A module that is taken for ``x @ W.T + b`` must compute that."""
    if p.why_not_plain() is not None or p.weight.device.type == "meta":
        return
    weight = p.linear_weight()
    x = torch.randn(2, weight.shape[1], generator=torch.Generator(device="cpu").manual_seed(2), device="cpu")
    x = x.to(weight.device, weight.dtype)
    found, expected = p.module.forward(x), F.linear(x, weight, p.bias)
    if found.shape != expected.shape or _apart(found, expected, _PRODUCT) is not None:
        raise AdapterError(
            f"{p.name} is a {type(p.module).__name__}, which the adapter takes for a plain linear module, but its output is "
            "not x @ W.T + b. Leave its class out of the adapter's plain_types."
        )


# routed experts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe_experts(record: Experts) -> None:
    """Check that channels are independent, and that the experts compute what the record says.

    Raises
    ------
    CannotProbe
        There are no weights here.
    AdapterError
        The contract is broken.
    """
    if without_weights(record.module):
        raise CannotProbe(f"{record.name} cannot be probed: it is on the meta device, without weights. Load the model.")
    _probe_activation(record)
    if not any(parameter.device.type == "meta" for parameter in record.module.parameters()):  # else they are offloaded
        _probe_views(record)


def _probe_activation(record: Experts) -> None:
    """What is between the projections, on some of the channels."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    (first, second), axis = record._blocks
    shape = (_TOKENS, first, second)
    values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
    values = values * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64).exp()
    device = device_of(record.module)
    dtype = torch.promote_types(record.float_dtype, torch.float32)
    module: Any = record.module
    activate, channel_axis = module._apply_gate if module.has_gate else module.act_fn, 2 - axis
    everything = torch.arange(record.size, device="cpu")

    def run(channels: Tensor) -> Tensor:
        try:
            h = activate(values.index_select(channel_axis, channels).flatten(1).to(device, dtype))
        except Exception as error:
            raise AdapterError(
                f"{record.name} does not run on {len(channels)} of its {record.size} channels alone "
                f"({type(error).__name__}: {one_line(error)})."
            ) from error
        if h.shape != (_TOKENS, len(channels)):
            raise AdapterError(
                f"{record.name} makes {tuple(h.shape)} of {_TOKENS} tokens and {len(channels)} channels, so a channel of its "
                "down projection is not one of gate and up."
            )
        return h.cpu()

    try:
        whole = run(everything)
    except AdapterError:
        dtype = record.float_dtype
        whole = run(everything)
    for channels in _subsets(whole):
        narrow = run(channels)
        if (apart := _apart(narrow, whole[:, channels], _SAME)) is not None:
            token, place = apart
            raise AdapterError(
                f"{record.name} gives another result on {len(channels)} of its {record.size} channels, in another order, than "
                f"among all (channel {int(channels[place])} has {float(narrow[token, place]):.4g} in front of the down "
                f"projection, and {float(whole[token, channels[place]]):.4g} among all), so its channels are not independent."
            )


def _probe_views(record: Experts) -> None:
    """The module's own forward against the record's views, and narrow views against channels that are zeroed."""
    from pop_mm.executors.run_experts import run_experts

    module: Any = record.module
    eager = getattr(type(module).forward, "__wrapped__", None)
    if eager is None:
        raise AdapterError(
            f"{record.name} is a {type(module).__name__}, whose forward is not dispatched through transformers' "
            "ExpertsInterface."
        )
    generator = torch.Generator(device="cpu").manual_seed(3)
    top_k = min(record.top_k, record.count)
    hidden = torch.randn(_TOKENS, record.hidden_size, generator=generator, device="cpu")
    weights = torch.rand(_TOKENS, top_k, generator=generator, device="cpu") + 0.5
    hidden, weights = (tensor.to(record.device, record.float_dtype) for tensor in (hidden, weights))
    ids = torch.arange(_TOKENS * top_k, device=record.device).view(_TOKENS, top_k) % record.count
    size, half = record.size, (record.size + 1) // 2

    def run(width: int, kept: int) -> Tensor:
        """On the first channels, of which some are zeroed in front of the down projections."""

        def zeroed(_: Tensor | None, h: Tensor) -> Tensor:
            return F.pad(h[:, :kept], (0, h.shape[1] - kept))

        return run_experts(record, hidden, ids, weights, lambda expert: record.views(expert, width), zeroed)

    try:
        expected = eager(module, hidden, ids, weights)
    except Exception as error:
        raise CannotProbe(
            f"{record.name} does not run on {_TOKENS} random tokens ({type(error).__name__}: {one_line(error)})."
        ) from error
    found = run(size, size)
    if found.shape != expected.shape or _apart(found, expected, _PRODUCT) is not None:
        raise AdapterError(
            f"{record.name} gives another result by its own forward than by its weights and {_between(module)} alone, so "
            "its channels are not independent, or something else is computed in its forward."
        )
    if _apart(run(half, half), run(size, half), _PRODUCT) is not None:
        raise AdapterError(
            f"{record.name} gives another result on {half} of its {size} channels than with the others zeroed in front of "
            f"the down projections, so its channels are not where is_concatenated={module.is_concatenated} says."
        )


def _between(module: Any) -> str:
    return "_apply_gate" if module.has_gate else "act_fn"
