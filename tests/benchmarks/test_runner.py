"""Timings are fair, and the suite's result lines hold what they claim."""

from __future__ import annotations

import time

import pytest

from benchmarks import runner
from benchmarks.cost import Cost
from benchmarks.machine import Peak


def test_interleaving_sees_a_slowdown_and_no_difference_where_there_is_none() -> None:
    timings = runner.interleave(
        {"one": lambda: time.sleep(0.01), "two": lambda: time.sleep(0.02)}, rounds=9, subject="sleep"
    )
    ratios = {t.name: t.ratio_p50 for t in timings}
    assert ratios["one"] == 1
    assert ratios["two"] == pytest.approx(2, rel=0.3)
    assert ratios[runner.CONTROL] == pytest.approx(1, rel=0.3)


def test_the_roofline_is_the_larger_of_two_bounds() -> None:
    peak = Peak(flops=100.0, bandwidth=10.0)
    assert peak.bound(Cost(200.0, 10.0)) == 2.0
    assert peak.bound(Cost(100.0, 50.0)) == 5.0
    timing = runner.Timing("a", "b", 1, *[4.0] * 3, *[1.0] * 3, flop=200.0, bytes=10.0)
    assert runner.achieved(timing, peak)["of_roofline"] == 0.5
    assert runner.achieved(runner.Timing("a", "b", 1, *[4.0] * 3, *[1.0] * 3), peak) == {}
