"""Settings that were renamed: old runs are read, and an old name in a config file or flag is told the current one."""

import json

import pytest
from etils import epath

from tests.command import finish, start
from tvq_pod.config import resolve
from tvq_pod.config.names import GROUPS, RENAMED, check_name
from tvq_pod.config.run_config import read_run_config, to_json
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.run.config_history import changes, last_start

OLD = {"sanity": {"bad_steps": 7, "max_rollbacks": 3, "spike_deviations": 5.0}, "sample": {"nucleus_p": 0.5}}


def old_run(workdir, **groups):
    """The config.json of a version before the names changed, with some groups replaced."""
    tree = json.loads(to_json(Settings()))
    sanity = tree.pop("bad_steps")
    del sanity["rollback_after"], tree["sample"]["top_p"]
    tree["sanity"] = sanity | OLD["sanity"]
    tree["sample"] |= OLD["sample"]
    (workdir / "config.json").write_text(json.dumps(tree | groups))
    return epath.Path(workdir)


def test_an_old_run_is_read_under_the_current_names(tmp_path):
    settings = resolve(read_run_config(old_run(tmp_path)))
    bad_steps = settings.bad_steps
    assert (bad_steps.rollback_after, bad_steps.max_rollbacks, bad_steps.spike_deviations) == (7, 3, 5.0)
    assert settings.sample.top_p == 0.5
    start_before = last_start(epath.Path(tmp_path))
    assert start_before is not None
    assert start_before["config.bad_steps.rollback_after"] == 7
    assert start_before["config.bad_steps.max_rollbacks"] == 3
    assert start_before["config.sample.top_p"] == 0.5
    assert not [name for name in start_before if "sanity" in name or "nucleus" in name]
    assert changes(start_before, settings) == {}


def test_an_old_run_that_set_only_some_of_a_group_has_the_defaults_of_the_others(tmp_path):
    settings = resolve(read_run_config(old_run(tmp_path, sanity={"bad_steps": 7}, sample={})))
    assert settings.bad_steps.rollback_after == 7
    assert settings.bad_steps.max_rollbacks == Settings().bad_steps.max_rollbacks
    assert settings.sample == Settings().sample
    assert resolve(read_run_config(old_run(tmp_path, sanity={}))).bad_steps == Settings().bad_steps


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"sample": {"nucleus_p": 0.5, "top_p": 0.9}}, "config.sample.nucleus_p: is called config.sample.top_p now"),
        (
            {"bad_steps": {"max_rollbacks": 1, "forget_state": True}},
            "config.sanity: is called config.bad_steps now; config.sanity.bad_steps is called config.bad_steps."
            "rollback_after now",
        ),
        ({"sanity": 4}, "config.sanity: is called config.bad_steps now; config.sanity.bad_steps is called"),
        ({"bad_steps": 4}, "config.sanity: is called config.bad_steps now; config.sanity.bad_steps is called"),
        ({"sanity": {"max_rolls": 4}}, "config.bad_steps.max_rolls: is not a setting; did you mean config.bad"),
    ],
)  # fmt: skip
def test_an_old_run_that_says_a_thing_twice_or_wrongly_is_refused(tmp_path, groups, message):
    """Nothing chooses in silence between an old name's value and the current one's."""
    workdir = old_run(tmp_path, **groups)
    with pytest.raises(UserError) as error:
        read_run_config(workdir)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(f" (in {workdir / 'config.json'})")
    start_before = last_start(workdir)
    assert start_before is not None
    assert changes(start_before, Settings())  # told by --mode=train, which can have a config file of its own


def test_each_old_name_leads_to_a_setting_or_group_that_there_is():
    for old, new in RENAMED.items():
        check_name(new)
        with pytest.raises(UserError, match=f"{old}=3: is called {new} now"):
            check_name(old, "3")
    for name in GROUPS["config.bad_steps"]:
        if name != "rollback_after":
            with pytest.raises(UserError, match=f"config.sanity.{name}: is called config.bad_steps.{name} now$"):
                check_name(f"config.sanity.{name}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("config.sanity.max_rolbacks", "is not a setting; did you mean config.bad_steps.max_rollbacks?"),
        ("config.sanity.zzz", "is not a setting; config.bad_steps has spike_deviations, "),
        ("config.sample.nucleus_p.x", "is not a setting; did you mean config.sample.top_p?"),
    ],
)
def test_a_misspelled_name_in_a_renamed_group_is_told_the_nearest_one_of_the_group(path, message):
    with pytest.raises(UserError) as error:
        check_name(path, "3")
    assert str(error.value).startswith(f"{path}=3: {message}")


def test_an_old_name_on_the_command_line_or_in_a_config_file_is_told_the_current_one(tmp_path):
    text = "from tvq_pod import config as c\ndef get_config():\n  config = c.default_config()\n  {}\n"
    files = {}
    for name, line in [("top_p", "config.sample.nucleus_p = 0.5"), ("bad_steps", "config.sanity.max_rollbacks = 3")]:
        files[name] = tmp_path / f"{name}.py"
        files[name].write_text(text.format(line))
    said = {
        ("--config=configs/stdlib.py", "--config.sample.nucleus_p=0.5"): (
            "config.sample.nucleus_p=0.5: is called config.sample.top_p now"
        ),
        ("--config=configs/stdlib.py", "--config.sanity.max_rollbacks=3"): (
            "config.sanity.max_rollbacks=3: is called config.bad_steps.max_rollbacks now"
        ),
        (f"--config={files['top_p']}",): (
            f"config.sample.nucleus_p: is called config.sample.top_p now ({files['top_p']}, line 4)"
        ),
        (f"--config={files['bad_steps']}",): (
            "config.sanity: is called config.bad_steps now; config.sanity.bad_steps is called "
            f"config.bad_steps.rollback_after now ({files['bad_steps']}, line 4)"
        ),
    }
    started = {flags: start(f"--workdir={tmp_path}/run", *flags) for flags in said}
    for flags, line in said.items():
        assert finish(started[flags]) == (1, "", f"error: {line}\n")
