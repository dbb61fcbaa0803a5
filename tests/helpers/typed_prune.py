"""What mypy must say to the keywords of ``prune``: `make lint` fails where it accepts a wrong one or refuses a right one."""

from torch import nn

import pop_mm


def right(model: nn.Module) -> pop_mm.Session:
    """Keywords as they are."""
    pop_mm.prune(model, ratio=0.2, method=pop_mm.Pop(gamma=0.1), scope="ffn", layer_ratios={0: 0.0})
    return pop_mm.prune(model, budget=0.65, method="thresholds", backend="auto")


def wrong(model: nn.Module) -> None:
    """A misspelt one, a wrong type and an unknown value."""
    pop_mm.prune(model, bugdet=0.65)  # type: ignore[call-arg]
    pop_mm.prune(model, ratio="0.2")  # type: ignore[arg-type]
    pop_mm.prune(model, backend="fast")  # type: ignore[arg-type]
