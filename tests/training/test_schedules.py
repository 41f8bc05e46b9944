"""Learning-rate schedules, against the formulas of docs/optimizer.md written out; and schedules that are refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvq_pod.config.relations import check_relations, unfinished_warmup
from tvq_pod.config.settings import OptimizerSettings, Settings, TrainSettings
from tvq_pod.errors import UserError
from tvq_pod.training.optimizer import schedule


def share_of(name: str, step: int, warmup: int, decay: int, end: int, final: float) -> float:
    """The learning rate at `step` over its full value."""
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    if name == "inverse_sqrt":
        return (max(warmup, 1) / (max(warmup, 1) + step - warmup)) ** 0.5
    if name == "wsd":
        if step <= end - decay:
            return 1.0
        return 1.0 - (1.0 - final) * min(step - (end - decay), decay) / decay
    left = 1.0 if end <= warmup and step == warmup else max(0.0, (end - step) / max(end - warmup, 1))
    if name == "linear":
        return final + (1.0 - final) * left
    return final + (1.0 - final) * (1.0 + np.cos(np.pi * (1.0 - left))) / 2


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "inverse_sqrt", "wsd", "constant"]),
    warmup=st.integers(0, 20),
    decay=st.integers(1, 20),
    stable=st.integers(0, 20),
    final=st.sampled_from([0.0, 0.1, 1.0]),
    num_steps=st.integers(1, 80),
    is_separate=st.booleans(),
)
def test_schedules_are_the_formulas_whatever_their_lengths(name, warmup, decay, stable, final, num_steps, is_separate):
    """Within the schedule, at its borders, and beyond its end. is_separate: whether schedule_steps says where that is,
    and num_steps, which is then any number, does not matter."""
    end = warmup + stable + decay
    given = OptimizerSettings(
        schedule=name, warmup_steps=warmup, decay_steps=decay, final_fraction=final,
        schedule_steps=end if is_separate else 0,
    )  # fmt: skip
    check_relations(Settings(optimizer=given, train=TrainSettings(num_steps=num_steps if is_separate else end)))
    share = schedule(given, num_steps if is_separate else end)
    steps = np.arange(75)  # of one shape for all, so that little is compiled
    expected = [share_of(name, int(step), warmup, decay, end, final) for step in steps]
    np.testing.assert_allclose(np.broadcast_to(share(steps), steps.shape), expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_extended_begins_its_decay_later():
    given = OptimizerSettings(schedule="wsd", warmup_steps=10, decay_steps=20, final_fraction=0.0)
    before, after = (np.asarray(schedule(given, num_steps)(np.arange(201))) for num_steps in (100, 200))
    np.testing.assert_array_equal(before[:81], after[:81])  # the part that both have is the same
    assert (before[81:101] < 1.0).all()
    assert (after[81:181] == 1.0).all()
    assert after[200] == before[100] == 0.0


def refusal(num_steps=1000, **changes):
    with pytest.raises(UserError) as error:
        check_relations(Settings(optimizer=OptimizerSettings(**changes), train=TrainSettings(num_steps=num_steps)))
    return str(error.value)


def test_a_schedule_whose_parts_are_longer_than_the_run_is_refused_in_one_line():
    wsd = dict(schedule="wsd", warmup_steps=600)
    assert refusal(**wsd) == (
        "config.optimizer.decay_steps=0: must be at least 1 with config.optimizer.schedule=wsd, for example 100; a "
        "schedule that does not decay is config.optimizer.schedule=constant"
    )
    assert refusal(**wsd, decay_steps=401) == (
        "config.optimizer.decay_steps=401: with config.optimizer.warmup_steps=600 the schedule's parts have 1001 "
        "steps, and config.train.num_steps=1000; give fewer of these, or more steps"
    )
    assert "1001 steps, and config.optimizer.schedule_steps=1000" in refusal(
        **wsd, num_steps=5000, decay_steps=401, schedule_steps=1000
    )
    assert refusal(schedule_steps=99) == (
        "config.optimizer.schedule_steps=99: must be at least config.optimizer.warmup_steps=100"
    )


def test_a_trial_that_is_shorter_than_the_warm_up_is_warned_of():
    """A config for a long run may be tried for a few steps, as the README does."""
    short = Settings(train=TrainSettings(num_steps=100))
    check_relations(short)
    assert unfinished_warmup(short).startswith("config.optimizer.warmup_steps=100: config.train.num_steps=100 ends")
    assert unfinished_warmup(dataclasses.replace(short, train=TrainSettings(num_steps=101))) == ""
