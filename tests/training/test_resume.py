"""A run that is killed and resumed equals the run that was never stopped, bit for bit."""

import multiprocessing

import pytest
from kill_resume import (
    MICRO_BATCHES,
    PLACES,
    KillPoint,
    differences,
    draw_pairs,
    draw_points,
    run_kills,
)


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no SIGKILL here"
)
def test_killed_and_resumed_runs_end_like_the_uninterrupted_one(tmp_path):
    """Between two micro-batches in an interval and again while retraining; in a file's writing."""
    twice = [KillPoint(33, "gradients"), KillPoint(107, "step")]
    outcomes = list(run_kills([twice, [KillPoint(62, "write")]], tmp_path, start="forkserver"))
    assert [outcome.differences for outcome in outcomes] == [[], []]
    # 20 steps take 39 micro-batches, an epoch; the checkpoints are of even steps.
    (first, second), (third,) = (outcome.kills for outcome in outcomes)
    assert (first.micro_batch, first.step, first.resumed_from) == (33, 16, 16)
    assert (second.micro_batch, second.step, second.resumed_from) == (108, 54, 54)
    assert (third.micro_batch, third.step, third.resumed_from) == (63, 32, 30)
    assert [k.phase for k in (first, second, third)] == ["pruning", "retraining", "pruning"]


def test_the_second_kill_comes_later():
    pairs = draw_pairs(5, seed=0)
    assert len(pairs) == 5
    assert all(first.micro_batch < second.micro_batch for first, second in pairs)


def test_points_are_spread_over_the_run():
    points = draw_points(20, seed=0)
    assert points == draw_points(20, seed=0) != draw_points(20, seed=1)
    assert {point.place for point in points} == set(PLACES)
    numbers = [point.micro_batch for point in points]
    assert numbers == sorted(numbers)
    assert numbers[0] >= 1 and MICRO_BATCHES / 2 < numbers[-1] < MICRO_BATCHES


def test_differences_are_named():
    one = {"a": {"x": 1.0, "y": [1, 2]}, "b": 3}
    assert differences(one, {"a": {"x": 1.0, "y": [1, 2]}, "b": 3}) == []
    assert differences(one, {"a": {"x": 2.0, "y": [1, 2]}, "b": 4}) == ["a.x", "b"]
    assert differences(one, {"a": {"x": 1.0}, "b": 3}) == ["a (other keys)"]
