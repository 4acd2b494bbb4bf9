"""When refused callers are told to come back: by the rate at which requests end, each at another moment."""

import pytest

from server.statistics import DrainRate


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rate(clock: Clock) -> DrainRate:
    rate = DrainRate(clock)
    rate.busy()
    return rate


def end(rate: DrainRate, clock: Clock, count: int, every_s: float, at_once: int = 1) -> None:
    for _ in range(count // at_once):
        clock.now_s += every_s * at_once
        for _ in range(at_once):
            rate.count()


@pytest.mark.parametrize("at_once", [1, 8, 32])
@pytest.mark.parametrize("every_s", [0.01, 0.5, 7.0])
def test_it_is_what_was_measured(rate: DrainRate, clock: Clock, every_s: float, at_once: int) -> None:
    """Also when requests of one step end together."""
    for _ in range(40):
        end(rate, clock, 32, every_s, at_once)
        assert rate.seconds_per_request == pytest.approx(every_s, rel=0.15)


def test_before_anything_ended_nothing_is_known(rate: DrainRate) -> None:
    assert rate.seconds_per_request == 1.0


def test_a_rate_that_changes_is_followed(rate: DrainRate, clock: Clock) -> None:
    end(rate, clock, 600, 0.1)
    end(rate, clock, 600, 2.0)
    assert rate.seconds_per_request == pytest.approx(2.0)


def test_requests_that_end_no_more_are_slow_ones(rate: DrainRate, clock: Clock) -> None:
    end(rate, clock, 10, 0.1)
    clock.now_s += 99
    assert rate.seconds_per_request == pytest.approx(10.0)


def test_idle_time_says_nothing(rate: DrainRate, clock: Clock) -> None:
    end(rate, clock, 20, 0.1)
    rate.idle()
    clock.now_s += 3600
    rate.busy()
    end(rate, clock, 20, 0.1)
    assert rate.seconds_per_request == pytest.approx(0.1)


def test_those_who_are_refused_come_back_one_after_the_other(rate: DrainRate, clock: Clock) -> None:
    end(rate, clock, 40, 0.25)
    told = [rate.refuse(waiting=8) for _ in range(12)]
    assert told[:8] == pytest.approx([0.25 * n for n in range(1, 9)])
    assert told[8:] == pytest.approx([2.0] * 4)  # by then all that waits now is gone
    clock.now_s += 60
    rate.count()
    assert rate.refuse(waiting=8) < 3  # nobody else was refused meanwhile
