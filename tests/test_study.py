"""The studies: their arms are settings that exist, and their tables are means of what was measured."""

import statistics

import pytest

from tests import study
from tests.command import ROOT
from tests.test_figures import config_of
from tvq_pod.config.resolve import resolve


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_arm_is_a_config_with_settings_of_its_own(name):
    made = study.STUDIES[name]
    seen = []
    for arm in made.arms.values():
        config = config_of(ROOT / "configs" / f"{made.config}.py")
        config.update_from_flattened_dict(made.settings | arm)
        seen.append(resolve(config))
    assert len(set(seen)) == len(made.arms)


def test_a_table_has_means_and_their_standard_errors(tmp_path):
    made = study.STUDIES["recall"]
    runs = [
        study.Run(arm, seed, {name: 0.5 + seed / 10 for name in made.columns.values()}, minutes=20.0, curve=[])
        for arm, seeds in (("one", [0]), ("three", [0, 1, 2]))
        for seed in seeds
    ]
    heading, _, one, three = study.table(made, runs)
    assert heading.count("|") == one.count("|") == three.count("|") == len(made.columns) + 3
    assert one.startswith("| one | 0.500 |")
    error = statistics.stdev([0.5, 0.6, 0.7]) / 3**0.5
    assert three.startswith(f"| three | 0.600 ± {error:.3f} |")

    study.write(made, runs, tmp_path / "studies" / "x.tsv")
    lines = (tmp_path / "studies" / "x.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(runs)
    assert lines[-1].split("\t") == ["three", "2", *["0.70000"] * len(made.columns), "20.0"]


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_draws_its_picture(name, tmp_path):
    made = study.STUDIES[name]
    names = [*made.columns.values(), *study.DEPTHS.values()]
    curve = [(2048, 1.0, 5.0), (4096, 2.0, 4.0)]
    runs = [
        study.Run(arm, seed, {name: 0.5 + seed / 10 for name in names}, minutes=20.0, curve=curve)
        for arm in made.arms
        for seed in made.seeds
    ]
    made.plot(made, runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists() == (not name.endswith("_recipe"))


def test_losses_by_depth_are_means_over_tokens(tmp_path):
    (tmp_path / "eval").mkdir()
    rows = [(0, 100, 3.0), (2048, 50, 2.0), (3072, 150, 1.0), (16384, 10, 0.5)]
    lines = ["first_position\ttokens\tloss\tbits_per_byte", *(f"{a}\t{n}\t{loss}\t9" for a, n, loss in rows)]
    (tmp_path / "eval" / "step_7_validation.tsv").write_text("\n".join(lines) + "\n")
    assert study.losses_by_depth(tmp_path) == {"loss_at_0": 3.0, "loss_at_2048": 1.25, "loss_at_8192": 0.5}


def test_a_curve_has_the_tokens_and_the_seconds_of_training(tmp_path):
    (tmp_path / "config.json").write_text('{"train": {"batch_size": 2, "update_len": 100}}')
    lines = [
        dict(split="train", step=10, tokens_per_second=1000.0, loss=3.0),
        dict(split="validation", step=10, loss=9.0),
        dict(split="train", step=30, tokens_per_second=2000.0, loss=2.0),
    ]
    assert study.curve(tmp_path, lines) == [(2000, 2.0, 3.0), (6000, 4.0, 2.0)]


def test_arms_of_one_corpus_share_its_store():
    made = study.STUDIES["recall_recipe"]
    names = {arm: study._store_name(made, arm) for arm in made.arms}
    assert names["all"] == names["c_revive=0"] != names["recall_smaller=0"]
