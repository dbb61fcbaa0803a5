"""What the server counts, in the text format of Prometheus."""

from __future__ import annotations

import threading

_ABOUT = {
    "pop_mm_requests_total": ("counter", "Chat requests that were answered, by HTTP status; 499: the client had gone."),
    "pop_mm_cancelled_total": ("counter", "Answers that were stopped: their clients had gone, or the server ended."),
    "pop_mm_prompt_tokens_total": ("counter", "Prompt tokens of answers."),
    "pop_mm_completion_tokens_total": ("counter", "Tokens of answers, cancelled ones included."),
    "pop_mm_generation_seconds_total": ("counter", "Seconds in which answers were generated."),
    "pop_mm_kept_share_sum": (
        "counter",
        "Sum over answers of the share of the weights' bytes that a decode step read.",
    ),
    "pop_mm_kept_share_count": ("counter", "Answers in that sum."),
    "pop_mm_session_changes_total": ("counter", "Times that a request had other settings than the one before."),
    "pop_mm_masked_parts": ("gauge", "Parts of the model that run masked: right, and not faster."),
    "pop_mm_pruned_parts": ("gauge", "Parts of the model that are pruned, masked ones included; 0 while it is dense."),
    "pop_mm_requests_waiting": ("gauge", "Requests that wait."),
    "pop_mm_requests_running": ("gauge", "Requests that are being answered, 0 or 1."),
}


class Metrics:
    """Counts of one server, safe to write from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        """Count something."""
        with self._lock:
            key = _key(name, labels)
            self._values[key] = self._values.get(key, 0) + value

    def set(self, name: str, value: float) -> None:
        """State something."""
        with self._lock:
            self._values[name] = value

    def text(self, **now: float) -> str:
        """All of them; ``now`` has values of this moment."""
        with self._lock:
            values = dict(self._values)
        lines = []
        for name, (kind, about) in _ABOUT.items():
            mine = {key: value for key, value in values.items() if key.partition("{")[0] == name}
            mine = mine or {name: now.get(name, 0)}
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            lines += [f"{key} {value:.10g}" for key, value in sorted(mine.items())]
        return "\n".join(lines) + "\n"


def _key(name: str, labels: dict[str, object]) -> str:
    shown = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{shown}}}" if shown else name


__all__ = ["Metrics"]
