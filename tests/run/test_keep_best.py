"""Which checkpoint is the best is decided by what the run itself evaluates: runs whose steps and losses are made up."""

import dataclasses
import json
import types

import numpy as np
import pytest
from etils import epath

from tests.common import small_config, store_of
from tests.made_up import first_state
from tvq_pod.config.settings import (
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    MetricsSettings,
    SampleSettings,
    Settings,
    TrainSettings,
)
from tvq_pod.data.streams import PackedDocuments
from tvq_pod.inference.by_position import Positions
from tvq_pod.inference.evaluation_lines import own_losses
from tvq_pod.inference.evaluator import Evaluator, Result
from tvq_pod.modes import evaluate as evaluate_module
from tvq_pod.modes import train as train_module
from tvq_pod.modes.evaluate import evaluate
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.training import restore

TEXTS = [f"document {n} says {n * n}, and no more than that. ".encode() * 8 for n in range(20)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("keep_best") / "store", TEXTS, validation_share=0.4)


class Step:
    """Stands for the compiled step: counts."""

    def __call__(self, state, batch):
        return state.replace(step=state.step + 1), dict(loss=1.0, n_bad=0, digest=np.zeros(2, np.uint32))


@pytest.fixture
def losses(monkeypatch):
    """What evaluations come to: "own", those of the run, one after the other; "next", all while it is there."""
    losses = {}
    monkeypatch.setattr(train_module, "compiled_train_step", lambda *args: Step())
    monkeypatch.setattr(restore, "create_train_state", first_state)

    def made_up(self, params, told_to_stop=lambda: False):
        loss = losses["next"] if "next" in losses else losses["own"].pop(0)
        positions = Positions(np.ones(1), np.ones(1, int), 1.0)
        return Result(loss, 1.0, None, self.n_tokens, 3, 0.0, 0.1, positions)

    monkeypatch.setattr(Evaluator, "evaluate", made_up)
    return losses


def data_of(store) -> DataSettings:
    return DataSettings(store=str(store.path), source="stdlib", validation_share=0.4, test_share=0.0)


def settings_for(store, num_steps, **eval_settings) -> Settings:
    return Settings(
        model=small_config(n_layer=1, n_vocab=260, head_type="mqa", dtype="float32", param_dtype="float32"),
        data=data_of(store),
        train=TrainSettings(batch_size=8, update_len=8, num_steps=num_steps, log_every_steps=4),
        checkpoint=CheckpointSettings(every_steps=4, keep=1, keep_best=1),
        eval=EvalSettings(**(dict(every_steps=4) | eval_settings)),
        sample=SampleSettings(length=0),
        metrics=MetricsSettings(tensorboard=False),
    )


def run(settings, workdir):
    train_module.train(
        settings, epath.Path(workdir), types.SimpleNamespace(requested=False, can_save=False, take_save=lambda: False)
    )
    checkpoints = CheckpointReader(epath.Path(workdir))
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def lines_at(workdir, step):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"].startswith("validation") and line["step"] == step]


def test_a_line_counts_only_if_all_it_is_about_is_the_runs_own(tmp_path, store):
    settings, n_tokens = settings_for(store, 12), int(store.split("validation").starts[-1])
    own = dict(step=4, split="validation", loss=2.0, tokens=n_tokens, checkpoint="4-aa",
               fingerprint=store.fingerprint, dtype="float32")  # fmt: skip
    foreign = [own | dict([change], loss=1.0) for change in (
        ("split", "test"), ("split", "validation_cache_off"), ("tokens", n_tokens - 1), ("checkpoint", "4-bb"),
        ("fingerprint", "of another"), ("dtype", "bfloat16"), ("step", 8), ("weights", "ema"),
    )]  # fmt: skip
    foreign += [
        {name: value for name, value in dict(own, loss=1.0).items() if name != left_out}
        for left_out in set(own) - {"loss"}
    ]
    path = epath.Path(tmp_path)

    def found(*lines, settings=settings):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return own_losses(path, settings, store, lambda step: f"{step}-aa")

    nan = dict(own, step=8, checkpoint="8-aa", loss=None)
    assert found(own, *foreign, nan) == {4: 2.0, 8: None}
    assert found(own, dict(own, weights="raw", loss=1.5)) == {4: 1.5}  # older lines do not say which weights
    # A run that keeps an average of its weights evaluates that.
    averaged = dataclasses.replace(settings, train=dataclasses.replace(settings.train, ema_decay=0.9))
    assert found(own, dict(own, weights="ema", loss=1.5), own, settings=averaged) == {4: 1.5}
    # A run that evaluates a part of the split compares what it evaluates.
    part = settings_for(store, 12, max_tokens=100)
    some = PackedDocuments(store.split("validation").starts, 8, 100).n_tokens
    assert 100 <= some < n_tokens
    assert found(own, own | dict(tokens=some, loss=3.0), own, settings=part) == {4: 3.0}


@pytest.mark.slow
def test_only_complete_evaluations_of_its_own_split_decide_which_step_is_the_best(
    tmp_path, store, losses, monkeypatch, capsys
):
    workdir, settings = tmp_path / "run", settings_for(store, 12)
    losses["own"] = [1.0, 2.0, 3.0]
    assert run(settings, workdir) == [4, 12]
    # All of these are better, and about something else.
    monkeypatch.setattr(evaluate_module, "write_positions", lambda *args: None)
    other = store_of(tmp_path / "other", [text + b"?" for text in TEXTS], validation_share=0.4)
    for changes in (
        dict(data=data_of(other)),
        dict(eval=EvalSettings(max_tokens=100)),
        dict(eval=EvalSettings(cache="off")),
    ):
        losses["next"] = 0.1
        evaluate(dataclasses.replace(settings, **changes), epath.Path(workdir), "validation", 12)
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("result: ")]
    assert all(json.loads(line)["checkpoint"] for line in printed)
    own, *others = lines_at(workdir, 12)
    assert own["fingerprint"] == store.fingerprint
    assert own["tokens"] == store.split("validation").starts[-1]
    assert own["dtype"] == "float32"
    assert [line["checkpoint"] for line in others] == [own["checkpoint"]] * 3
    with (workdir / "metrics.jsonl").open("a") as file:  # of an older version, which says nothing
        file.write(json.dumps(dict(step=16, split="validation", loss=0.1, tokens=own["tokens"])) + "\n")
    del losses["next"]
    losses["own"] = [4.0]
    # The run goes on: 4 is still the best, and step 16 is evaluated.
    assert run(settings_for(store, 16), workdir) == [4, 16]
    assert [line["loss"] for line in lines_at(workdir, 16)] == [0.1, 4.0]
    # Once more, nothing is left to be evaluated; nor is it if somebody else evaluated all of the split.
    assert run(settings_for(store, 16), workdir) == [4, 16]
    losses["next"] = 0.5
    evaluate(settings, epath.Path(workdir), "validation", 16)
    del losses["next"]
    losses["own"] = [5.0]
    assert run(settings_for(store, 20), workdir) == [16, 20]


@pytest.mark.slow
def test_a_run_that_starts_over_knows_nothing_of_what_it_was(tmp_path, store, losses):
    workdir = tmp_path / "run"
    losses["own"] = [1.0, 2.0]
    assert run(settings_for(store, 8), workdir) == [4, 8]
    (workdir / "checkpoints").rename(workdir / "before")
    # The new one evaluates nothing at step 4, where the old one was best, and its last step anew.
    losses["own"] = [7.0]
    assert run(settings_for(store, 8, every_steps=8), workdir) == [8]
    assert [line["loss"] for line in lines_at(workdir, 8)] == [2.0, 7.0]
    one, another = [line["checkpoint"] for line in lines_at(workdir, 8)]
    assert one != another
    losses["own"] = [8.0, 9.0]
    assert run(settings_for(store, 16), workdir) == [8, 16]
