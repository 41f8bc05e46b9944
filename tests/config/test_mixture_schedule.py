"""config.data.mixture_schedule: what it says, and what is no schedule."""

import dataclasses

import pytest

from tvq_pod.config.mixture_schedule import check_mixture_schedule, in_words, weights_of
from tvq_pod.config.resolve import config_of, resolve
from tvq_pod.config.settings import DataSettings, Settings, TrainSettings
from tvq_pod.errors import UserError

DATA = DataSettings(mixture="a=9,b=1", mixture_schedule="100:1/1, 200:0/3")


def test_weights_add_up_to_one_and_hold_from_their_step_on():
    assert weights_of(DATA.mixture_schedule, 2) == ((100, (0.5, 0.5)), (200, (0.0, 1.0)))
    assert weights_of("", 2) == ()


def test_a_start_says_what_is_still_to_come():
    assert in_words(DATA, 0) == (
        "mixture: weights 0.5/0.5 from step 100 on, 0/1 from step 200 on (config.data.mixture_schedule)"
    )
    assert in_words(DATA, 100) == "mixture: weights 0/1 from step 200 on (config.data.mixture_schedule)"
    assert in_words(DATA, 200) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("100", "100 is not STEP:WEIGHT/WEIGHT; give changes like"),
        ("x:1/1", "x:1/1 is not STEP"),
        ("100:1/1,", "nothing is not STEP"),
        ("100:1", "100:1 has 1 weights, but config.data.mixture has 2 stores"),
        ("100:1/1/1", "100:1/1/1 has 3 weights"),
        ("100:0/0", "100:0/0 must have weights from 0 to 1e+06, at least one of them above 0"),
        ("100:1/-1", "100:1/-1 must have weights from 0"),
        ("100:1/nan", "100:1/nan must have weights from 0"),
        ("100:1/x", "100:1/x must have weights from 0"),
        ("0:1/1", "0:1/1 must come at step 1 or later"),
        ("100:1/1,100:0/1", "100:0/1 must come at step 101 or later, after the previous change"),
    ],
)
def test_what_is_no_schedule_is_named(text, problem):
    settings = Settings(data=dataclasses.replace(DATA, mixture_schedule=text))
    with pytest.raises(UserError) as raised:
        resolve(config_of(settings))
    assert str(raised.value).startswith(f"config.data.mixture_schedule={text}: {problem}")


def test_a_schedule_without_a_mixture_or_beyond_the_end_is_refused():
    with pytest.raises(UserError, match=r"is for config\.data\.mixture, which is empty"):
        resolve(config_of(Settings(data=DataSettings(mixture_schedule="100:1/1"))))
    check_mixture_schedule(DATA, TrainSettings(num_steps=201))
    with pytest.raises(UserError, match=r"a change comes at step 200, and training ends at config.*=200"):
        check_mixture_schedule(DATA, TrainSettings(num_steps=200))
