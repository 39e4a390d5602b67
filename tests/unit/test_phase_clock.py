# SPDX-License-Identifier: Apache-2.0
"""When a phase counts as unusually long, by numbers made by hand."""

from __future__ import annotations

from megatron_rl.runtime.phase_clock import PhaseClock, main_thread_is


def looks(clock: PhaseClock, num: int) -> list[str]:
    """What is told during so many looks."""
    told = []
    for _ in range(num):
        clock.look()
        told += [text] if (text := clock.overdue()) else []
    return told


def test_an_unknown_phase_may_take_the_floor_and_is_told_once() -> None:
    clock = PhaseClock(interval_s=1.0, floor_s=600.0)
    clock.enter(0, "gen")
    assert looks(clock, 600) == []
    assert looks(clock, 4000) == ["in phase 'gen' of step 0 for 10 min (for the first time)"]


def test_a_known_phase_may_take_four_times_its_longest() -> None:
    clock = PhaseClock(interval_s=1.0, floor_s=60.0)
    for step, seconds in enumerate((100, 30)):
        clock.enter(step, "gen")
        looks(clock, seconds)
    clock.enter(2, "gen")
    assert looks(clock, 400) == []
    assert looks(clock, 400) == ["in phase 'gen' of step 2 for 7 min (longest before: 100 s)"]
    clock.enter(3, "sync")
    assert looks(clock, 60) == [] and len(looks(clock, 1)) == 1
    clock.enter(4, "gen")  # took 800 s
    assert looks(clock, 3200) == []


def test_where_this_thread_is() -> None:
    found = main_thread_is()
    assert "in test_where_this_thread_is\n" in found.stack and found.collective == ""
