"""What the benchmarks share, and the comparison of two checkouts."""

import doctest
import json

import pytest
import torch
import versus
from harness import arguments, results, rounds, workloads
from harness.context import ROOT, context

from spp_lightning import native


@pytest.mark.parametrize("module", [rounds, results], ids=lambda module: module.__name__)
def test_examples(module):
    assert doctest.testmod(module) == (0, 3 if module is rounds else 2)


def test_in_turns_times_every_contender_in_every_round(monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE", 0)
    monkeypatch.setattr(rounds, "repeats_of", lambda call: 1)
    calls = []
    times = rounds.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    # In each turn a call that isn't timed and one that is; who comes first changes.
    assert "".join(calls) == "bbaa" + "bbaa" + "bbaa"


@pytest.mark.parametrize(
    ("given", "expected"), [([], 9), (["--quick"], 2), (["--quick", "--rounds", "5"], 5)]
)
def test_rounds_follow_quick(given, expected):
    assert (
        arguments.make_parser("A test.", rounds=9, quick_rounds=2).parse_args(given).rounds
        == expected
    )


def test_context_says_what_figures_depend_on():
    about = context("lightning", seed=3)
    assert list(about) == ["command", "device", "versions", "seed", "date", "commit"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["seed"] == 3


def row(name, commit, ms):
    return {"name": name, "threads": 1, "ms": ms, "context": {"commit": commit}}


def test_replaced_rows_of_other_commits_are_named(tmp_path, capsys):
    saved = results.Results("rows", lambda rows: f"{len(rows)} rows.", tmp_path)
    saved.add(row("a", "old", 1), row("b", "old", 2), row("c", "old", 3))
    saved.add(row("b", "new", 4))
    assert capsys.readouterr().out == "replaces b, measured at commit old\n"
    assert [(x["name"], x["ms"]) for x in json.loads((tmp_path / "rows.json").read_text())] == [
        ("a", 1),
        ("b", 4),
        ("c", 3),
    ]
    assert (tmp_path / "rows.md").read_text() == (
        "3 rows.\n\ncommit old.\n\nb (threads: 1): commit new.\n"
    )


@pytest.mark.parametrize("ratio", workloads.RATIOS)
def test_a_share_of_every_layers_columns_is_pruned(ratio):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 5, 5), torch.nn.Conv2d(5, 2, 2))
    pruned = workloads.prune_randomly(net, ratio)
    shares = [(x.weight.flatten(1) == 0).all(0).sum().item() for x in pruned]
    assert shares == [round(100 * ratio), round(20 * ratio)]
    assert all((x.weight != 0).all() for x in net)


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason="needs the C++ library")
def test_a_checkout_beside_itself_computes_the_same():
    with versus.Checkout(ROOT) as old, versus.Checkout(ROOT) as new:
        for kind, given in (("layer", [5, 1, 0.9]), ("pruner", ["ConvNet"])):
            row = {"kind": kind, "arguments": given, "name": "it", "threads": 1}
            found = versus.measure(row, {"old": old, "new": new}, 3)
            assert found["difference"] == 0
            low, high = found["ratio_quartiles"]
            assert 0 < low <= found["ratio"] <= high


def test_a_row_is_slower_when_it_is_over_the_limit_thrice(monkeypatch):
    options = arguments.make_parser("A test.", rounds=9).parse_args([])
    options.most = 1.05
    for ratios, found in ([1.2, 1.04], (1.04, [1.2])), ([1.3, 1.2, 1.1], (1.1, [1.3, 1.2])):
        measured = iter(ratios)
        monkeypatch.setattr(versus, "measure", lambda *_, m=measured: {"ratio": next(m)})
        row = versus.measure_up_to_thrice({}, {}, options)
        assert (row["ratio"], row["earlier_ratios"]) == found


def test_a_folder_without_a_built_library_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a checkout with its library built"):
        versus.Checkout(tmp_path)
