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
        study.Run(arm, seed, {name: 0.5 + seed / 10 for name in made.columns.values()}, minutes=20.0)
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
    made.plot(made, runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_arms_of_one_corpus_share_its_store():
    made = study.STUDIES["recall_recipe"]
    names = {arm: study._store_name(made, arm) for arm in made.arms}
    assert names["all"] == names["c_revive=0"] != names["recall_smaller=0"]
