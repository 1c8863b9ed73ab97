"""The fuzzer: a hundred seeds of each kind, and that failures are found and made small."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fuzz
from fuzzing import graphs, layers
from torch.utils._pytree import tree_map

from spp_lightning.compaction.layers.column_conv import ColumnConv2d


@pytest.mark.parametrize("kind", fuzz.FUZZERS)
def test_a_hundred_seeds(kind):
    said, failures = fuzz.run(fuzz.FUZZERS[kind], range(100))
    assert not failures
    least = {
        "layers": {"held": 95},  # a batch of 0 has no image without a batch
        "int8": {"held": 100},
        "graphs": {"as a whole": 80},
        "quantized": {"quantised": 50},
        "files": {"refused": 50, "ran": 3, "failed when it ran": 10},
    }
    assert said.total() == 100 and all(said[word] >= n for word, n in least[kind].items()), said


def test_a_wrong_layer_is_found_and_made_small(monkeypatch, capsys):
    forward = ColumnConv2d.forward

    def wrong(layer, x, residual=None):
        y = forward(layer, x, residual)
        return y + 1 if layer.geometry.stride == (2, 2) else y

    monkeypatch.setattr(ColumnConv2d, "forward", wrong)
    drawn = ((i, layers.draw(i)) for i in range(100))
    seed = next(i for i, case in drawn if case.batch and case.geometry.stride == (2, 2))
    _, failures = fuzz.run(fuzz.FUZZERS["layers"], [seed])
    (found, message, case) = failures[0]
    assert found == seed and "numbers differ" in message
    assert case.geometry.stride == (2, 2) and not case.bias and not case.post
    assert f"seed {seed}: {message}" in capsys.readouterr().out


def test_a_wrong_network_is_found_and_made_small(monkeypatch):
    compact = graphs.compact

    def wrong(net, x):
        fast = compact(net, x)
        if any(isinstance(module, torch.nn.Linear) for module in net.modules()):
            fast.register_forward_hook(lambda *x: tree_map(lambda y: 2 * y, x[2]))
        return fast

    head = graphs.Op("head", (3, 3), (0.2, 0.0, 0.0, 0.0))
    case = graphs.draw(0)
    case = replace(case, ops=(*case.ops[:3], head))
    monkeypatch.setattr(graphs, "compact", wrong)
    fuzzer = fuzz.FUZZERS["graphs"]._replace(draw=lambda _: case)
    _, failures = fuzz.run(fuzzer, [0])
    assert [op.kind for op in failures[0][2].ops] == ["head"]


def test_the_same_seed_is_the_same_case():
    for fuzzer in fuzz.FUZZERS.values():
        assert fuzzer.draw(7) == fuzzer.draw(7) != fuzzer.draw(8)
    kinds = Counter(op.kind for seed in range(100) for op in graphs.draw(seed).ops)
    assert kinds.keys() == graphs.KINDS.keys()
