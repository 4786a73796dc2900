"""How far a long run is, and how long the rest of it takes."""

import re

import pytest

from flowtracer_plugin.evaluation.progress import Progress, inner_bar


@pytest.fixture
def clock():
    """A clock that a test moves on."""
    times = [100.0]
    return times, lambda: times[-1]


def test_each_step_is_a_line_that_says_how_long_the_rest_takes(clock):
    (times, now), lines = clock, []
    with Progress("example", 50, done=10, say=lines.append, clock=now) as shown:
        times.append(130.0)
        shown.step("row 10 measured")
        times.append(140.0)
        shown.step("row 11 left out, too short")
    # 39 others at 30 s each, then 38 at the mean of 30 and 10 s
    assert lines == [
        "example 11 of 50: row 10 measured; 0:00:30 so far, about 0:19:30 left",
        "example 12 of 50: row 11 left out, too short; 0:00:40 so far, about 0:12:40 left",
    ]


def test_a_terminal_gets_a_bar_and_one_line_after_the_first_step(clock, capfd):
    times, now = clock
    with Progress("example", 3, progress=True, say=pytest.fail, clock=now) as shown:
        with shown.inner("set", 7) as tick:
            tick(2)
        times.append(105.0)
        shown.step("row 0 measured")
        shown.step("row 1 measured")
    said = capfd.readouterr().err
    assert "example 1 of 3: row 0 measured; 0:00:05 so far, about 0:00:10 left\n" in said
    assert "row 1" not in said
    assert "0/7" in said
    assert re.search(r"2/3 .*example", said)


def test_nothing_is_shown_that_was_not_asked_for(capfd):
    with Progress("example", 2) as shown, shown.inner("set", 3) as tick:
        tick(1)
        shown.step("row 0 measured")
    with inner_bar("set", 3, shown=False) as tick:
        tick(3)
    assert capfd.readouterr().err == ""
