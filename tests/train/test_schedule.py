"""The learning rate: its shapes, and how it follows the clock where max_minutes ends before the steps."""
import pytest

from minimath.config.schema import OptimizerOptions
from minimath.train.schedule import Schedule, lr_at


def shape(name, steps, **changes):
    options = {"lr": 1.0, "schedule": name, "warmup": 0.0} | changes
    return [lr_at(step, steps, **options) for step in range(steps)]


def test_schedules_have_the_stated_shapes():
    assert shape("constant", 4) == [1.0] * 4
    assert shape("linear", 4) == [1.0, 0.75, 0.5, 0.25]
    assert shape("cosine", 4)[::2] == pytest.approx([1.0, 0.5])
    assert lr_at(400, 4, lr=1.0, schedule="cosine", warmup=0) == pytest.approx(0.0)


def test_warmup_is_a_share_below_one_and_a_count_from_one():
    assert shape("constant", 10, warmup=0.2) == shape("constant", 10, warmup=2) == [0.5] + [1.0] * 9
    assert shape("constant", 100, warmup=0.07)[5:8] == pytest.approx([6 / 7, 1.0, 1.0])
    assert shape("cosine", 3, warmup=50) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert shape("cosine", 1, warmup=0.03) == [1.0]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_no_step_runs_at_rate_zero(name):
    for steps in (1, 2, 7, 100):
        assert min(shape(name, steps, warmup=0.1)) > 0


# ---- the clock

class Clock:
    """A run of `total` steps, of which each takes seconds(number), within `limit` seconds."""

    def __init__(self, total, limit, seconds, state=None, done=0, name="cosine"):
        self.said, self.rates, self.done = [], [], done
        schedule = self.schedule = Schedule(OptimizerOptions(lr_schedule=name), total, self.said.append)
        if state is not None:
            schedule.load_state_dict(state)
        schedule.begin(limit)
        while self.done < total and limit > 0:
            self.rates.append(lr_at(schedule.place(self.done), total, lr=1.0, schedule=name, warmup=0.03))
            self.done += 1
            limit -= seconds(self.done)
            schedule.commit(self.done, limit)


def by_steps(total, name="cosine"):
    return shape(name, total, warmup=0.03)


def falls(rates):
    return all(before > after for before, after in zip(rates, rates[1:]))


@pytest.mark.parametrize("seconds", [lambda n: 1.0, lambda n: 30.0 if n == 1 else 1.0, lambda n: 1.0 + 0.3 * (n % 2)])
def test_where_all_steps_fit_the_rate_is_the_steps_own_bit_by_bit(seconds):
    run = Clock(150, 220.0, seconds)
    assert run.rates == by_steps(150) and not run.said and run.schedule.state_dict() == {"progress": None}
    assert Clock(150, float("inf"), seconds).rates == by_steps(150)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("seconds", [lambda n: 2.0, lambda n: 20.0 if n == 1 else 2.0, lambda n: 1.5 + n / 50])
def test_where_the_clock_is_shorter_the_rate_has_come_down_at_its_end_said_once(name, seconds):
    run = Clock(150, 150.0, seconds, name=name)
    assert run.done < 100 and falls(run.rates[5:]) and run.rates[-1] < 0.04
    assert run.rates[:7] == by_steps(150, name)[:7] and run.rates[40] < by_steps(150, name)[40] - 0.1
    [text] = run.said
    assert "max_minutes ends near step" in text and text.endswith("of 150: the learning rate follows the clock")


def test_a_machine_that_becomes_busy_late_still_ends_low():
    run = Clock(150, 200.0, lambda n: 1.0 if n < 90 else 4.0)
    assert run.rates[:90] == by_steps(150)[:90] and falls(run.rates[5:]) and run.rates[-1] < 0.02 and run.done < 130


def test_a_few_slow_steps_leave_no_rate_of_zero_when_all_fit_after_all():
    run = Clock(150, 220.0, lambda n: 4.0 if n < 10 else 1.0)
    assert len(run.said) == 1 and run.done == 150 and falls(run.rates[5:])
    assert all(0 < one <= other for one, other in zip(run.rates[5:], by_steps(150)[5:]))


def test_with_steps_of_minutes_the_last_one_has_a_low_rate_too():
    run = Clock(6, 315.0, lambda n: 90.0 if n == 1 else 70.0, name="linear")
    assert run.done == 5 and run.rates[0] == 1.0 and falls(run.rates[1:]) and run.rates[-1] < 0.12
    assert len(run.said) == 1


def test_a_constant_rate_stays():
    run = Clock(150, 100.0, lambda n: 2.0, name="constant")
    assert run.rates[5:] == [1.0] * (run.done - 5) and not run.said


def test_a_run_that_goes_on_never_raises_the_rate_and_spreads_the_rest():
    first = Clock(150, 150.0, lambda n: 2.0)
    state = first.schedule.state_dict()
    unbound = Clock(150, float("inf"), lambda n: 2.0, state, first.done)
    bound = Clock(150, 60.0, lambda n: 2.0, state, first.done)
    for again in (unbound, bound):
        assert falls([first.rates[-1], *again.rates]) and again.rates[-1] > 0
        assert "it goes on with the last" in again.said[0] and len(again.said) == 1
    assert unbound.done == 150 and bound.done < 110 and bound.rates[20] < unbound.rates[20]


def test_more_steps_after_a_run_that_followed_the_clock_to_its_last_have_a_rate():
    first = Clock(150, 180.0, lambda n: 4.0 if n < 10 else 1.0)
    again = Clock(200, 1e4, lambda n: 1.0, first.schedule.state_dict(), 150)
    assert first.done == 150 and len(first.said) == 1 and 0 < again.rates[0] < 0.01 and falls(again.rates)


def test_a_run_that_goes_on_before_the_clock_was_followed_begins_by_steps():
    assert Clock(150, 1e4, lambda n: 1.0, {"progress": None}, 4).rates == by_steps(150)[4:]
