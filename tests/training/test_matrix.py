"""Some rows of ``benchmarks/training_matrix.py``: ways to train, and what is promised of them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from training_matrix import CASES, TARGETS, check

ROWS = {case.name: case for case in CASES}
pytestmark = pytest.mark.filterwarnings("ignore")
BIT_FOR_BIT = [
    *("NAdam, foreach", "AdamW, fused", "EMA", "bf16-mixed", "a layer unfrozen later, by hand"),
    *("load_state_dict while pruning", "IterableDataset, max_epochs"),
]


@pytest.mark.parametrize("name", BIT_FOR_BIT)
def test_exact_plain_and_resumed_bit_for_bit(tmp_path, name):
    result = check(ROWS[name], tmp_path)
    assert result.pruned == TARGETS == {"conv1": 21, "conv2": 54}
    assert (result.steps, result.revived, result.plain) == (48, 0, True)
    assert result.resumed == "bit for bit" and result.broken == []


@pytest.mark.parametrize(
    ("name", "pruned"), [("barebones", TARGETS), ("fast_dev_run=True", dict.fromkeys(TARGETS, 0))]
)
def test_runs_without_checkpoints(tmp_path, name, pruned):
    result = check(ROWS[name], tmp_path)
    assert result.pruned == pruned and result.plain and result.broken == []


def test_revived_columns_and_other_ends_are_found(tmp_path):
    """Parameters that were loaded over the pruned ones count where the row doesn't expect it."""
    loading = ROWS["load_state_dict while retraining"]
    assert check(replace(loading, name="other"), tmp_path).revived > 100
    shuffled = check(ROWS["DataLoader, shuffled"], tmp_path / "shuffled")
    assert shuffled.resumed == "differs, as without SPP" and shuffled.pruned == TARGETS
