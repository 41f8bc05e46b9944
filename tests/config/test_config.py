"""Settings: one definition, checked before anything else happens."""

import copy
import dataclasses
import json
import pathlib
import pickle
import runpy

import ml_collections
import pytest

from tvq_pod.config import model as model_config
from tvq_pod.config.context_schedule import check_context_schedule
from tvq_pod.config.names import GROUPS, check_name
from tvq_pod.config.resolve import default_config, resolve
from tvq_pod.config.run_config import read_run_config, to_json
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.nn import types

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def test_defaults_are_the_dataclasses():
    assert resolve(default_config()) == Settings()


def test_a_run_folder_gives_its_settings_back(tmp_path):
    config = default_config()
    config.model.d_model, config.optimizer.learning_rate, config.data.source = 64, 0.5, "stdlib"
    settings = resolve(config)
    (tmp_path / "config.json").write_text(to_json(settings))
    assert resolve(read_run_config(tmp_path)) == settings
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        read_run_config(tmp_path)
    with pytest.raises(UserError, match=r"has no config.json"):
        read_run_config(tmp_path / "nowhere")


def test_settings_that_an_older_version_did_not_write_have_their_defaults(tmp_path):
    tree = json.loads(to_json(Settings()))
    del tree["data"]["mixture"], tree["bad_steps"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert resolve(read_run_config(tmp_path)) == Settings()
    tree["data"]["sauce"] = "unknown"
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"config.data.sauce: is not a setting"):
        resolve(read_run_config(tmp_path))


def test_a_whole_number_in_a_run_folder_stands_for_a_float_and_can_be_overridden_by_one(tmp_path):
    tree = json.loads(to_json(Settings()))
    tree["optimizer"]["learning_rate"] = 1
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = read_run_config(tmp_path)
    assert resolve(config).optimizer.learning_rate == 1.0
    config.optimizer.learning_rate = 0.5
    assert resolve(config).optimizer.learning_rate == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_sets_everything_and_is_valid(path):
    scope = runpy.run_path(str(path))
    check_context_schedule(resolve(scope["get_config"]()).train)
    assert f"--config=configs/{path.name}" in scope["__doc__"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.block_len", 100, "config.model.block_len=100: must divide config.train.update_len=512, as 128 does"),
        ("model.dtype", "float16", "config.model.dtype=float16: must be one of float32, bfloat16"),
        ("model.d_k", 0, "config.model.d_k=0: must be at least 1"),
        ("model.p_dropres", 1.0, "config.model.p_dropres=1.0: must be below 1"),
        ("train.num_steps", -5, "config.train.num_steps=-5: must be at least 1"),
        ("optimizer.name", "adam", "config.optimizer.name=adam: must be one of adamw, lion, adafactor"),
        ("optimizer.schedule", "step", "config.optimizer.schedule=step: must be one of cosine, linear, inv"),
        ("optimizer.schedule", "wsd", "config.optimizer.decay_steps=0: must be at least 1 with config.optimizer.sched"),
        ("optimizer.schedule_steps", 99, "config.optimizer.schedule_steps=99: must be at least config.opt"),
        ("train.ema_decay", 1.0, "config.train.ema_decay=1.0: must be below 1"),
        ("train.z_loss", -1e-4, "config.train.z_loss=-0.0001: must be at least 0"),
        ("eval.weights", "averaged", "config.eval.weights=averaged: must be one of ema, raw"),
        ("optimizer.learning_rate", -1.0, "config.optimizer.learning_rate=-1.0: must be at least 0"),
        ("mesh.model", 3, "config.mesh.model=3: must divide config.model.d_v=256"),
        ("mesh.data", 0, "config.mesh.data=0: must be a number of devices, or -1 for all"),
        ("data.test_share", 0.99, "config.data.validation_share=0.02: with config.data.test_share=0.99 nothing"),
        ("sample.top_p", 0.0, "config.sample.top_p=0.0: must be above 0 and at most 1"),
        ("sample.stop", "a\\,", "config.sample.stop=a\\,: has an empty stop string; leave out the \\, next to it"),
        ("train.context_schedule", "1024", "config.train.context_schedule=1024: '1024' is not STEP:LENGTH"),
        ("data.format", "csv", "config.data.format=csv: must be one of"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_what_would_be_right(name, value, message):
    config = default_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.sequence": 8}, "config.train.update_len=512: must be a multiple of 1024, .* for example 1024"),
        (
            {"mesh.sequence": 4, "model.mem_len": 256},
            "config.mesh.sequence=4: each part of .* config.model.mem_len=256; give at most 2",
        ),
        (
            {"mesh.sequence": 8, "train.update_len": 1024, "eval.update_len": 1152},
            "config.eval.update_len=1152: must be a multiple of 1024, .* for example 2048",
        ),
        ({"eval.update_len": 200}, "config.eval.update_len=200: must be a multiple of .*=128, for example 256"),
        ({"mesh.sequence": 4, "model.n_code": 126}, "config.mesh.sequence=4: must divide config.model.n_code=126"),
        ({"mesh.sequence": 2, "model.attn_type": "full"}, "config.mesh.sequence=2: must be 1 with"),
        ({"mesh.model": 3, "model.n_head": 4}, "config.mesh.model=3: must divide config.model.n_head=4"),
        (
            {"mesh.model": 3, "model.n_head": 3, "model.head_type": "mqa", "model.d_ff": 64},
            "config.mesh.model=3: must divide the MLP's width, 64",
        ),
        ({"train.microbatches": 3}, "config.train.microbatches=3: must divide config.train.batch_size=8"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_named(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_an_unknown_or_missing_name_is_an_error():
    tree = json.loads(to_json(Settings()))
    tree["model"]["d_modell"] = 3
    with pytest.raises(
        UserError, match=r"config.model.d_modell: is not a setting; did you mean config.model.d_model\?"
    ):
        resolve(ml_collections.ConfigDict(tree))
    del tree["model"]["d_modell"]
    for name, value, message in (
        ("d_model", "16", r"config.model.d_model='16': must be an integer"),
        ("e_tie", 1, r"config.model.e_tie=1: must be True or False"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(ml_collections.ConfigDict(tree | dict(model=tree["model"] | {name: value})))
    del tree["train"]["num_steps"]
    with pytest.raises(UserError, match=r"config.train.num_steps: is missing"):
        resolve(ml_collections.ConfigDict(tree))


@pytest.mark.parametrize("name", ["num_steps", "numsteps"])
def test_settings_are_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Settings().train, name, 3)


SETTINGS = [f"{group}.{name}" for group, names in GROUPS.items() for name in names if f"{group}.{name}" not in GROUPS]


def misspelled(name):
    """Without a letter, with two swapped, with one twice, in capitals."""
    middle = len(name) // 2
    yield name[:middle] + name[middle + 1 :]
    yield name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    yield name[:middle] + name[middle] + name[middle:]
    yield name.upper()


def suggested(path):
    with pytest.raises(UserError) as error:
        check_name(path)
    assert str(error.value).startswith(f"{path}: is not a setting; ")
    return str(error.value).partition("did you mean ")[2].rstrip("?").split(" or ")


@pytest.mark.slow(1)
@pytest.mark.parametrize("path", SETTINGS)
def test_a_misspelled_setting_or_group_finds_its_own_name_back(path):
    check_name(path)
    root, *groups, name = path.split(".")
    if len(name) > 3:  # b1 and b2 are as near to 1b
        for wrong in misspelled(name):
            if ".".join([root, *groups, wrong]) not in SETTINGS:
                assert path in suggested(".".join([root, *groups, wrong]))
    for group in groups:
        check_name(f"{root}.{group}")
        for wrong in misspelled(group):
            assert path in suggested(f"{root}.{wrong}.{name}")
            assert f"{root}.{group}" in suggested(f"{root}.{wrong}")
    if groups and f"{root}.{name}" not in GROUPS and sum(known.endswith(f".{name}") for known in SETTINGS) == 1:
        assert path in suggested(f"{root}.{name}")  # no group at all
        other = "sample" if groups != ["sample"] else "metrics"
        assert path in suggested(f"{root}.{other}.{name}")
    assert suggested(f"{path}.more") == [path]


def test_a_name_that_is_near_to_nothing_gets_the_list():
    with pytest.raises(
        UserError, match=r"config.train.zzz: is not a setting; config.train has batch_size, update_len,"
    ):
        check_name("config.train.zzz")
    with pytest.raises(UserError, match=r"config.zzz.y=3: is not a setting; config has seed, .*, model, data, "):
        check_name("config.zzz.y", "3")
    with pytest.raises(UserError, match=r"config.model.is_train: is not a setting"):  # the mode decides
        check_name("config.model.is_train")


def test_groups_are_told_apart_by_their_names():
    """Config._path relies on it."""
    assert len({frozenset(names) for names in GROUPS.values()}) == len(GROUPS)


@pytest.mark.parametrize("copied", [lambda config: config, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.optim, "learning_rate", 4), "config.optim: is not a setting; did you mean config.opt"),
        (lambda c: setattr(c, "optim", 4), "config.optim: is not a setting; did you mean config.optimizer?"),
        (lambda c: setattr(c.model, "d_modle", 4), "config.model.d_modle: is not a setting; did you mean config."),
        (lambda c: c.model.d_modle + 1, "config.model.d_modle: is not a setting; did you mean config.model.d_model?"),
        (lambda c: c.update({"modle": {"d_model": 3}}), "config.modle: is not a setting; did you mean config.model?"),
        (lambda c: c.update({"model": {"d_modle": 3}}), "config.model.d_modle: is not a setting; did you mean config"),
        (lambda c: setattr(c.train, "num_steps", 2.5), "config.train.num_steps=2.5: must be an integer"),
        (lambda c: setattr(c, "train", 3), "config.train=3: must be a group of settings"),
    ],
)  # fmt: skip
def test_a_config_file_that_sets_what_is_not_there_is_told_the_full_name(change, message, copied):
    with pytest.raises((UserError, AttributeError)) as error:
        change(copied(default_config()))
    assert str(error.value).startswith(message)
    assert not hasattr(default_config(), "optim")
    assert default_config().get("optim", 7) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"learning_rate": 4}}, "config.optim: is not a setting; did you mean config.optimizer? (in "),
        ({"model": {"d_modle": 4}}, "config.model.d_modle: is not a setting; did you mean config.model.d_model? (in "),
        ({"train": 4}, "config.train=4: must be a group of settings (in "),
        ({"train": {"num_steps": "many"}}, "config.train.num_steps='many': must be an integer (in "),
    ],
)
def test_a_runs_own_config_is_looked_at_as_a_whole(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(to_json(Settings())) | change))
    with pytest.raises(UserError) as error:
        read_run_config(tmp_path)
    assert str(error.value) == f"{message}{tmp_path}/config.json)"


def test_the_model_s_settings_are_the_same_from_both_places():
    assert types.TransformerConfig is model_config.TransformerConfig
    config = Settings().model
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config.replace()) != hash(config.replace(d_model=64))
