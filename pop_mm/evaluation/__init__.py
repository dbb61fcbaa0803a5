"""What pruning costs in quality: fidelity to the dense model on text, by method, ratio and gamma, beside the real cost."""

from .cost import Cost, cost_of, dense_cost
from .fidelity import Score, first_differences, greedy, score_texts, step_logits
from .methods import METHODS, Calibration, calibrate, config_for

__all__ = [
    "METHODS",
    "Calibration",
    "Cost",
    "Score",
    "calibrate",
    "config_for",
    "cost_of",
    "dense_cost",
    "first_differences",
    "greedy",
    "score_texts",
    "step_logits",
]
