"""Figures stand in docs/figures.json; README, docs and configs quote them, and nothing else."""

import ast
import json
import math
import re
import shlex

import jax
import pytest

from tests import figures
from tvq_pod.config.resolve import resolve
from tvq_pod.training.step import initial_params

FIGURES = figures.load()
UNITS = r"(?:(?:ms|s|seconds?|minutes?|hours?|days?|[KMGTk]i?B|[MB]|tokens/s|tokens a second|million|billion)\b|%)"
COUNTED = r"(?:bits per byte|parameters|documents)\b"
WORDS = r"(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty)"
TIMES = r"(?:ms|seconds?|minutes?|hours?)\b"
# A measure: a number with a unit, or one with a fraction. Versions and papers (2309.16354, 0.10.2) are none.
MEASURE = re.compile(
    rf"(?<![\w.\-/`:=])(?:{figures.NUMBER}\s?(?:{UNITS}|{COUNTED})|{WORDS}\s{TIMES}|\d+\.\d{{1,3}}(?!\d|\.\d))"
)
NO_FIGURES = {"3.11", "2.0"}  # Python, and Apache's license


def config_docstrings():
    for path in sorted((figures.ROOT / "configs").glob("*.py")):
        yield f"configs/{path.name}", ast.get_docstring(ast.parse(path.read_text()), clean=False)


def config_of(path):
    scope = {}
    exec(path.read_text(), scope)
    return scope["get_config"]()


def measures_not_quoted(file, text):
    """Measures in a text that no entry's sentence accounts for. Code, and commands, are left out."""
    for quoting, sentence, _ in figures.quotes(FIGURES):
        if quoting == file:
            text = figures.pattern(sentence).sub(" ", text)
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    return [found for found in MEASURE.findall(text) if found not in NO_FIGURES]


def test_every_quote_has_the_figures():
    assert figures.wrong(FIGURES) == []


@pytest.mark.parametrize(
    ("file", "text"), [("README.md", (figures.ROOT / "README.md").read_text()), *config_docstrings()]
)
def test_no_figure_stands_only_in_a_text(file, text):
    found = measures_not_quoted(file, text)
    assert found == [], f"{file}: give these an entry in docs/figures.json whose sentences quote them"


@pytest.mark.parametrize(
    "text",
    [
        "It says 8.90 ms a step",
        "1,840,000 tokens/s",
        "in about five minutes",
        "by 31%",
        "a loss of 2.053.",
        "12 to 14 MB",
    ],
)
def test_a_figure_in_a_text_is_seen(text):
    assert measures_not_quoted("README.md", text)


def test_a_wrong_figure_is_told_and_written_right(tmp_path, monkeypatch):
    text = "A step takes\n8.90 ms, it says.  And 7 GiB.\n"
    (tmp_path / "a.md").write_text(text)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    entry = dict(values=dict(ms=9.032, gib=7), quoted={"a.md": ["step takes {ms:.2f} ms,", "And {gib} GiB."]})
    (line,) = figures.wrong({"x": entry})
    assert line == "a.md: has 'step takes 8.90 ms,', and not 9.03"
    figures.write({"x": entry})
    assert (tmp_path / "a.md").read_text() == text.replace("8.90", "9.03")
    assert figures.wrong({"x": entry}) == []
    entry["quoted"]["a.md"].append("one more of {gib}")
    assert figures.wrong({"x": entry}) == ["a.md: has no sentence 'one more of {gib}'"]


def given_in(command):
    """A command's flags, and the settings that it overrides and chooses."""
    given = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command) if word.startswith("--"))
    config = config_of(figures.ROOT / given["config"])
    for flag, value in given.items():
        if flag.startswith("config."):
            *groups, setting = flag.split(".")[1:]
            group = config[groups[0]]
            group[setting] = value if isinstance(group[setting], str) else json.loads(value.lower())
    return given, resolve(config)


def n_parameters(settings):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: initial_params(settings))))


@pytest.mark.parametrize("name", [name for name, entry in FIGURES.items() if "tokens_per_step" in entry["values"]])
def test_a_plans_tokens_and_steps_are_those_of_its_config(name):
    values = FIGURES[name]["values"]
    given, settings = given_in(FIGURES[name]["command"])
    assert values["tokens_per_step"] == settings.train.batch_size * settings.train.update_len
    assert values.get("num_steps", settings.train.num_steps) == settings.train.num_steps
    assert values.get("checkpoint_steps", settings.checkpoint.every_steps) == settings.checkpoint.every_steps
    assert values["chips"] == math.prod(map(int, given["topology"].split(":")[1].split("x")))


@pytest.mark.slow(2)
@pytest.mark.parametrize("path", sorted((figures.ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_parameters_are_as_many_as_the_config_has(path):
    told = [
        entry["values"]["parameters"]
        for entry in FIGURES.values()
        if f"--config=configs/{path.name} " in entry["command"]
        and "parameters" in entry["values"]
        and "--config.model.d_model" not in entry["command"]
    ]
    assert told
    assert set(told) == {n_parameters(resolve(config_of(path)))}


def test_parameters_of_other_sizes_are_as_many_as_the_command_says():
    resized = [entry for entry in FIGURES.values() if "--config.model.d_model" in entry["command"]]
    assert resized
    for entry in resized:
        assert entry["values"]["parameters"] == n_parameters(given_in(entry["command"])[1])
