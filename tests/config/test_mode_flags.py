"""A flag that a mode would not look at is refused."""

import re

import pytest
from absl import flags

from tvq_pod import main
from tvq_pod.config.mode_flags import MODES_OF, check_flags
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
