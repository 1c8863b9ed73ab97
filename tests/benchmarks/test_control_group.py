"""The comparison with ModelPruning still runs, and finds what its table says."""

from pathlib import Path

import pytest
from control_group import PERMANENT, SPP, optimizer_is_clean, whole_after_a_fault


@pytest.mark.filterwarnings("ignore")  # what Lightning says to short fits
def test_a_row_of_each_outcome():
    for experiment in (optimizer_is_clean, whole_after_a_fault):
        assert experiment(SPP, Path()).holds
        assert not experiment(PERMANENT, Path()).holds
