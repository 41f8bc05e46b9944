"""The last line of --mode=train on stdout: how the run ended, whatever way it did."""

import contextlib
import dataclasses
import json

import pytest
from etils import epath

from tests.command import finish, metrics_of, start
from tests.made_up import first_state, made_up_step
from tests.training.test_bad_steps import AskedAt, NoSignals, settings_for
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import Preempted, UserError
from tvq_pod.modes import train as train_module
from tvq_pod.modes.train import train
from tvq_pod.run.result import RunResult
from tvq_pod.run.status import Status
from tvq_pod.training import restore

FIELDS = {
    "ended", "exit_code", "exit_status", "first_step", "step", "num_steps", "loss", "bits_per_byte", "validation",
    "tokens", "wall_seconds", "workdir",
}  # fmt: skip


def result_of(out: str) -> dict:
    """What the last line says."""
    *_, last = out.splitlines()
    assert last.startswith("result: ")
    assert out.count("result: ") == 1
    result = json.loads(last.removeprefix("result: "), parse_constant=lambda name: pytest.fail(name))
    assert set(result) == FIELDS
    return result


@pytest.mark.slow(8)
def test_a_run_that_finishes_says_where_it_is_and_how_good(trained):
    workdir, out, _ = trained
    result = result_of(out)
    logged, evaluated = metrics_of(workdir, "train")[-1], metrics_of(workdir, "validation")[-1]
    assert (result["ended"], result["exit_code"], result["exit_status"]) == ("finished", 0, "done")
    assert (result["first_step"], result["step"], result["num_steps"]) == (0, 40, 40)
    assert (result["loss"], result["bits_per_byte"]) == (logged["loss"], logged["bits_per_byte"])
    assert result["validation"] == {name: value for name, value in evaluated.items() if name != "split"}
    assert result["tokens"] == 40 * 8 * 32
    assert result["wall_seconds"] > evaluated["seconds"]


@pytest.mark.slow
def test_a_run_that_has_nothing_left_says_the_same(trained):
    workdir, out, _ = trained
    code, again, _ = finish(start(f"--workdir={workdir}", "--config.metrics.tensorboard=False"))
    assert code == 0
    before, now = result_of(out), result_of(again)
    assert now.pop("first_step") == now["step"] == 40
    for result in (before, now):
        del result["wall_seconds"], result["workdir"]
    del before["first_step"]
    assert now == before


@pytest.mark.slow
def test_a_run_whose_result_nobody_reads_ends_quietly_with_all_saved(trained):
    """With the exit code that every mode has then, see docs/durability.md."""
    process = start(f"--workdir={trained[0]}", "--config.metrics.tensorboard=False", "--config.sample.length=0")
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    err = process.stderr.read()
    assert process.wait(timeout=300) == 141, err
    assert err.splitlines()[-1].startswith("done: ")


@pytest.fixture
def quick_steps(monkeypatch):
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)


@pytest.mark.slow
@pytest.mark.parametrize(("signal_name", "ended"), [("SIGTERM", "preempted"), ("SIGINT", "stopped")])
def test_a_run_that_a_signal_ends_says_so_and_the_next_start_finishes(
    tmp_path, corpus, quick_steps, capsys, signal_name, ended
):
    settings, preemption = settings_for(corpus), AskedAt(7)
    preemption.signal_name = signal_name
    with pytest.raises(Preempted, match="saved step 7"):
        train(settings, epath.Path(tmp_path), preemption)
    result = result_of(capsys.readouterr().out)
    assert (result["ended"], result["exit_code"], result["exit_status"]) == (ended, 75, "saved; run me again")
    assert (result["first_step"], result["step"], result["tokens"]) == (0, 7, 7 * 8 * 8)
    assert result["loss"] == metrics_of(tmp_path, "train")[-1]["loss"]
    assert result["validation"] is None
    train(settings, epath.Path(tmp_path), NoSignals())
    result = result_of(capsys.readouterr().out)
    assert (result["ended"], result["first_step"], result["step"]) == ("finished", 7, 24)


@pytest.mark.slow
def test_a_run_that_gives_up_says_why_and_one_that_is_refused_says_nothing(tmp_path, corpus, quick_steps, capsys):
    bad_to_the_end = dataclasses.replace(settings_for(corpus).bad_steps, spike_deviations=1e-6, spike_after_steps=2)
    settings = dataclasses.replace(
        settings_for(corpus), bad_steps=dataclasses.replace(bad_to_the_end, rollback_after=1, max_rollbacks=0)
    )
    with pytest.raises(UserError) as error:
        train(settings, epath.Path(tmp_path / "bad"), NoSignals())
    result = result_of(capsys.readouterr().out)
    assert (result["ended"], result["exit_code"]) == ("failed", 1)
    assert result["exit_status"] == " ".join(str(error.value).split())
    refused = dataclasses.replace(settings, data=dataclasses.replace(settings.data, source="nowhere"))
    with pytest.raises(UserError, match=r"config.data.source"):
        train(refused, epath.Path(tmp_path / "refused"), NoSignals())
    assert capsys.readouterr().out == ""


def of_session(workdir, capsys, error=None, enabled=True, evaluated=None, **logged) -> dict | None:
    """The result of a session of which this was logged, which began at step 4."""
    status = Status(epath.Path(workdir), 12)
    status.saved(4)
    with _swallowed(error), RunResult(epath.Path(workdir), 12, status, NoSignals(), enabled) as result:
        schedule = DataSchedule.begin(4, 8).changed(6, 2, 16)
        result.begin(4, lambda: schedule, evaluated or {})
        if logged:
            status.update(**logged)
        if error:
            raise error
    out = capsys.readouterr().out
    return result_of(out) if out else None


def _swallowed(error):
    return pytest.raises(type(error)) if error else contextlib.nullcontext()


def test_tokens_are_those_of_all_streams_that_the_run_has_read(tmp_path, capsys):
    result = of_session(tmp_path, capsys, step=9, loss=1.0, bits_per_byte=2.0)
    assert result
    assert (result["step"], result["tokens"]) == (9, 6 * 4 * 8 + 3 * 2 * 16)
    before = of_session(tmp_path, capsys, step=5, loss=1.0, bits_per_byte=2.0)
    assert before
    assert before["tokens"] == 5 * 4 * 8


def test_numbers_that_are_not_finite_are_null_and_other_processes_say_nothing(tmp_path, capsys):
    result = of_session(tmp_path, capsys, OSError("the disk\nis full"), step=9, loss=float("nan"), bits_per_byte=2.0)
    assert result
    assert (result["loss"], result["ended"], result["exit_status"]) == (None, "failed", "the disk is full")
    assert of_session(tmp_path, capsys, enabled=False) is None


def test_a_session_that_logged_nothing_tells_what_the_run_had_logged(tmp_path, capsys):
    lines = [dict(step=step, split="train", loss=step / 10, bits_per_byte=step / 5) for step in (2, 4, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = of_session(tmp_path, capsys)
    assert result
    assert (result["step"], result["loss"], result["bits_per_byte"]) == (4, 0.4, 0.8)  # 8 was gone back from


def test_an_evaluation_that_was_not_finite_is_told_as_null_by_every_later_start(tmp_path, capsys):
    """metrics.jsonl has null for its loss; a start that has nothing to train reads it back."""
    line = dict(step=4, split="validation", loss=None, bits_per_byte=None, tokens=9)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    result = of_session(tmp_path, capsys, evaluated={4: None})
    assert result
    assert (result["ended"], result["validation"]) == (
        "finished",
        dict(step=4, loss=None, bits_per_byte=None, tokens=9),
    )
