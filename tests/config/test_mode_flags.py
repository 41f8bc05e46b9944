"""A flag that a mode would not look at is refused."""

import re

import pytest
from absl import flags

from tvq_pod import main
from tvq_pod.config.mode_flags import MODES_OF, check_flags, illegal_value, unknown_flag
from tvq_pod.errors import UserError


def test_flags_are_refused_by_the_modes_that_do_not_look_at_them():
    for name, modes in MODES_OF.items():
        for mode in main.MODES:
            if mode in modes:
                check_flags(mode, ["workdir", name])
            else:
                with pytest.raises(UserError, match=f"--{name}"):
                    check_flags(mode, ["workdir", name])


def test_every_flag_whose_help_names_modes_is_listed_with_them():
    """The help of a flag that is not for all modes begins with theirs: "eval, sample: which checkpoint"."""
    named = {}
    for flag in flags.FLAGS.get_flags_for_module(main.__name__):
        if found := re.match(r"(?:<.*>: )?([a-z_, ]+): ", flag.help):
            modes = found[1].split(", ")
            if set(modes) <= set(main.MODES):
                named[flag.name] = tuple(modes)
    assert named == MODES_OF


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model.d_model", "did you mean --config.model.d_model?"),
        ("learning_rate", "did you mean --config.optimizer.learning_rate?"),
        ("batch_size", "did you mean --config.train.batch_size or --config.eval.batch_size?"),
        ("stepp", "did you mean --step?"),
        ("xyzzy", "docs/using.md lists all flags, docs/settings.md all settings"),
    ],
)
def test_a_flag_that_does_not_exist_is_told_with_what_may_be_meant(name, meant):
    assert unknown_flag(name, MODES_OF) == f"--{name}: is not a flag; {meant}"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--mode=trian", "--mode=trian: must be one of train, eval, lm_eval, "),
        ("--step=abc", "--step=abc: must be an integer"),
        ("--step=-1", "--step=-1: must be a non-negative integer"),
        ("--tokens=many", "--tokens=many: must be a number"),
        ("--multihost=maybe", "--multihost=maybe: must be true or false"),
    ],
)
def test_a_value_that_a_flag_does_not_take_is_told_with_what_it_must_be(argument, line):
    name, _, value = argument.removeprefix("--").partition("=")
    with pytest.raises(flags.IllegalFlagValueError) as refused:
        flags.FLAGS[name].parse(value)
    assert illegal_value(str(refused.value)).startswith(line)
