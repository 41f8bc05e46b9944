"""What a start changes is told and kept, and a learning rate that jumps is warned of, with what would keep it."""

import dataclasses
import json
import math
import re

import pytest

from tvq_pod.config.run_config import to_json
from tvq_pod.config.settings import OptimizerSettings, Settings, TrainSettings
from tvq_pod.errors import UserError
from tvq_pod.run import config_history
from tvq_pod.training.optimizer import learning_rate

FIRST = Settings(train=TrainSettings(num_steps=1000))


def changed(settings, **groups):
    """settings with some values of some groups changed."""
    parts = {name: dataclasses.replace(getattr(settings, name), **values) for name, values in groups.items()}
    return dataclasses.replace(settings, **parts)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "config_history.jsonl").read_text().splitlines()]


def test_each_start_tells_and_keeps_what_it_changes(tmp_path, capsys):
    config_history.tell(tmp_path, FIRST, 0, learning_rate)
    config_history.keep(tmp_path, FIRST, 0)
    config_history.tell(tmp_path, FIRST, 300, learning_rate)
    config_history.keep(tmp_path, FIRST, 300)
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    second = changed(FIRST, optimizer=dict(clip_norm=0.5), model=dict(c_gamma=0.9), data=dict(glob="*.md"))
    config_history.tell(tmp_path, second, 400, learning_rate)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "config.data.glob=*.md: was **/* at the last start",
        "config.model.c_gamma=0.9: was 0.99 at the last start",
        "config.optimizer.clip_norm=0.5: was 1.0 at the last start",
    ]
    config_history.keep(tmp_path, second, 400)
    config_history.keep(tmp_path, dataclasses.replace(second, seed=7), 500)
    first_line, second_line = lines_of(tmp_path)
    assert first_line.pop("time") <= second_line.pop("time")
    assert first_line == dict(
        step=400,
        changed={
            "config.data.glob": ["**/*", "*.md"],
            "config.model.c_gamma": [0.99, 0.9],
            "config.optimizer.clip_norm": [1.0, 0.5],
        },
    )
    assert second_line == dict(step=500, changed={"config.seed": [0, 7]})
    assert (tmp_path / "config.json").read_text() == to_json(dataclasses.replace(second, seed=7))


def test_every_setting_is_compared(tmp_path):
    """One by one: none can change in silence."""
    config_history.keep(tmp_path, FIRST, 0)
    before = config_history.last_start(tmp_path)
    assert len(before) > 80
    for name, value in before.items():
        other = before | {name: not value if isinstance(value, bool) else f"not {value}"}
        assert list(config_history.changes(other, FIRST)) == [name]


def test_a_setting_that_one_of_two_versions_does_not_have(tmp_path, capsys):
    """One that is new has been at its default; one that is gone is told."""
    tree = json.loads(to_json(FIRST))
    del tree["train"]["microbatches"], tree["bad_steps"]
    (tmp_path / "config.json").write_text(json.dumps(tree | dict(gone=3)))
    config_history.tell(tmp_path, FIRST, 10, learning_rate)
    assert capsys.readouterr().err == "config.gone=(no such setting): was 3 at the last start\n"
    config_history.tell(tmp_path, changed(FIRST, train=dict(microbatches=2)), 10, learning_rate)
    assert "config.train.microbatches=2: was 1 at the last start" in capsys.readouterr().err


def test_damaged_files_are_told_and_lose_no_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    config_history.tell(tmp_path, FIRST, 10, learning_rate)
    assert "WARNING" in capsys.readouterr().err
    config_history.keep(tmp_path, FIRST, 10)
    (tmp_path / "config_history.jsonl").write_text('{"step": 1}\n{"st')  # the second was cut off by a kill
    config_history.keep(tmp_path, dataclasses.replace(FIRST, seed=7), 20)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 20]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config.json can't be written"):
        config_history.keep(tmp_path / "file", FIRST, 0)


def rate(settings, step):
    """The learning rate after the warm-up, written out."""
    optimizer, n_steps = settings.optimizer, settings.train.num_steps
    part = min((step - optimizer.warmup_steps) / (n_steps - optimizer.warmup_steps), 1)
    final = optimizer.final_fraction
    share = {
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * part)) / 2,
        "linear": 1 - (1 - final) * part,
        "inverse_sqrt": math.sqrt(optimizer.warmup_steps / step),
    }
    return optimizer.learning_rate * share[optimizer.schedule]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt"])
def test_a_jump_of_the_learning_rate_is_warned_of_and_its_remedy_keeps_the_rate(tmp_path, capsys, schedule):
    first = changed(FIRST, optimizer=dict(schedule=schedule, learning_rate=1e-3, warmup_steps=100))
    config_history.keep(tmp_path, first, 0)
    warned = 0
    for step in (200, 700, 1000):
        for changes in (
            dict(train=dict(num_steps=1300)),
            dict(train=dict(num_steps=4000)),
            dict(optimizer=dict(schedule="linear", final_fraction=0.5), train=dict(num_steps=1100)),
            dict(optimizer=dict(learning_rate=4e-4), train=dict(num_steps=1100)),
            dict(optimizer=dict(clip_norm=0.0), train=dict(num_steps=1001)),
        ):
            settings = changed(first, **changes)
            old, new = rate(first, step), rate(settings, step)
            config_history.tell(tmp_path, settings, step, learning_rate)
            said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
            assert len(said) == (max(old, new) > 1.5 * min(old, new)), (step, changes)
            if not said:
                continue
            warned += 1
            found = re.search(r"jumps at step (\d+) from (\S+) to ([^, ]+), (\S+) times as much", said[0])
            assert [float(number) for number in found.groups()] == pytest.approx([step, old, new, new / old], rel=0.01)
            remedy = float(re.search(r"give --config.optimizer.learning_rate=(\S+) to keep the rate", said[0])[1])
            kept = changed(settings, optimizer=dict(learning_rate=remedy))
            assert rate(kept, step) == pytest.approx(old, rel=0.01)
            config_history.tell(tmp_path, kept, step, learning_rate)
            assert "WARNING" not in capsys.readouterr().err
            # The old schedule is offered only while it has steps left.
            assert ("to keep the schedule" in said[0]) == (step < 1000)
    assert warned >= 2


def test_a_rate_that_was_or_becomes_0_is_a_jump_without_a_number(tmp_path, capsys):
    first = changed(FIRST, optimizer=dict(schedule="linear", final_fraction=0.0))
    config_history.keep(tmp_path, first, 0)
    config_history.tell(tmp_path, changed(first, train=dict(num_steps=2000)), 1000, learning_rate)
    assert "jumps at step 1000 from 0 to 0.000526; give another schedule" in capsys.readouterr().err
    config_history.tell(tmp_path, changed(first, optimizer=dict(learning_rate=0.0)), 500, learning_rate)
    assert "to 0, 0 times as much; give --config.optimizer.learning_rate=0.001 to keep" in capsys.readouterr().err


def test_a_run_that_is_extended_within_its_decay_is_told_where_it_could_start_again(tmp_path, capsys):
    """The decay of wsd is the last 200 of 1000 steps; extended to 2000, it comes 1000 steps later."""
    first = changed(FIRST, optimizer=dict(schedule="wsd", decay_steps=200, final_fraction=0.0))
    config_history.keep(tmp_path, first, 0)
    extended = changed(first, train=dict(num_steps=2000))

    def warnings(settings, step):
        config_history.tell(tmp_path, settings, step, learning_rate)
        return [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]

    assert warnings(extended, 800) == []
    (line,) = warnings(extended, 900)
    assert line.endswith(
        "the learning rate jumps at step 900 from 0.0005 to 0.001, 2 times as much; give "
        "--config.optimizer.learning_rate=0.0005 to keep the rate, or --config.train.num_steps=1000 to keep the "
        "schedule, or a start from step 800 or before, where the decay began"
    )
    (line,) = warnings(extended, 1000)
    assert "from 0 to 0.001; give a start from step 800 or before" in line
    # a schedule of its own goes on as it was
    assert warnings(changed(extended, optimizer=dict(schedule_steps=1000)), 900) == []


def test_nothing_jumps_where_nothing_is_trained(tmp_path, capsys):
    config_history.keep(tmp_path, FIRST, 0)
    settings = changed(FIRST, optimizer=dict(learning_rate=1.0))
    for step in (0, 1000):
        config_history.tell(tmp_path, settings, step, learning_rate)
        assert capsys.readouterr().err == "config.optimizer.learning_rate=1.0: was 0.001 at the last start\n"


def test_settings_of_the_schedule_are_all_that_it_depends_on():
    """With another one that the learning rate follows from, a jump would not be seen."""
    names = {name.rpartition(".")[2] for name in config_history.OF_SCHEDULE}
    known = names | {"name", "b1", "b2", "eps", "momentum", "weight_decay", "clip_norm", "multiply_by_parameter_scale"}
    assert {field.name for field in dataclasses.fields(OptimizerSettings)} <= known
