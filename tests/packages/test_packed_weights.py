"""Weights as other packages pack them (the extra [packages]) give what their dequantised twins give."""

import pytest

from helpers.compatibility import PACKAGES, PROJECTIONS
from helpers.wrapped import check_packed, importable


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projections", [("gate_proj",), ("down_proj",), PROJECTIONS], ids=["gate", "down", "all"])
@pytest.mark.parametrize("row", PACKAGES, ids=lambda row: f"{row.package}, {row.name}")
def test_packed_weights_give_what_plain_ones_give(row, projections):
    importable(row)
    check_packed(row, projections)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [r for r in PACKAGES if r.package == "compressed-tensors"], ids=lambda row: row.name)
def test_a_session_before_the_first_forward_of_compressed_weights(row):
    importable(row)
    check_packed(row, unchanged=False)
