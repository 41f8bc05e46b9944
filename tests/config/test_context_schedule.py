"""A context schedule: what it says, and what is refused."""

import pytest

from tvq_pod.config.context_schedule import check_context_schedule, in_words, stage_at, stages_of
from tvq_pod.config.settings import TrainSettings
from tvq_pod.errors import UserError

TEXT = "0:1024, 500:4096,1000:0"


def test_a_stage_holds_from_its_step_to_the_next():
    assert stages_of(TEXT) == ((0, 1024), (500, 4096), (1000, 0))
    lengths = {step: stage_at(TEXT, step).length for step in (0, 499, 500, 999, 1000, 10**9)}
    assert lengths == {0: 1024, 499: 1024, 500: 4096, 999: 4096, 1000: 0, 10**9: 0}
    assert stages_of("") == ((0, 0),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1024", "'1024' is not STEP:LENGTH; give stages like 0:1024,"),
        ("0:1024,", "'' is not STEP:LENGTH"),
        ("0:-5", "'0:-5' is not STEP:LENGTH"),
        ("0:1e3", "'0:1e3' is not STEP:LENGTH"),
        ("0:1:2", "'0:1:2' is not STEP:LENGTH"),
        ("5:1024", "the first stage begins at step 5; let it begin at step 0"),
        ("0:1024,0:2048", "a stage at step 0 is followed by one at step 0; give each stage a later step"),
        ("0:1024,9:0,8:512", "a stage at step 9 is followed by one at step 8; give"),
    ],
)
def test_what_is_not_a_schedule_is_refused(text, problem):
    with pytest.raises(UserError) as error:
        stages_of(text)
    assert str(error.value).startswith(f"config.train.context_schedule={text}: {problem}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0:1000", "a context of 1000 tokens is not a multiple of config.train.update_len=512; give 512 or 1024, or 0"),
        ("0:100", "a context of 100 tokens is not a multiple of config.train.update_len=512; give 512, or 0 for no"),
        ("0:512,1000:0", "a stage begins at step 1000, and training ends at config.train.num_steps=1000; leave it out"),
    ],
)
def test_what_training_could_not_keep_or_reach_is_refused(text, problem):
    with pytest.raises(UserError) as error:
        check_context_schedule(TrainSettings(update_len=512, num_steps=1000, context_schedule=text))
    assert str(error.value).startswith(f"config.train.context_schedule={text}: {problem}")


def test_what_it_can_keep_is_not():
    for text in ("", "0:0", "0:512", "0:1024,999:512"):
        check_context_schedule(TrainSettings(update_len=512, num_steps=1000, context_schedule=text))


def test_a_start_is_told_the_stage_and_the_next_one():
    setting = "(config.train.context_schedule)"
    assert in_words(TEXT, 20) == (
        f"contexts: at most 1,024 tokens from step 20 on; at most 4,096 tokens from step 500 on {setting}"
    )
    assert in_words(TEXT, 500) == (
        f"contexts: at most 4,096 tokens from step 500 on; no limit from step 1000 on {setting}"
    )
    assert in_words(TEXT, 1000) == f"contexts: no limit from step 1000 on; no later stage {setting}"
    assert in_words("", 7) == ""
