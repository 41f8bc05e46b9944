"""--mode=train on the command line: what it shows and keeps, and how the next start goes on."""

import json
import shutil

import pytest

from tests.command import contents, finish, metrics_of, packages_of, run, start
from tvq_pod.run import packages


def test_training_shows_progress_evaluates_samples_and_saves(trained):
    workdir, out, err = trained
    assert "8 cpu device(s)" in err
    for word in ("loss", "bits/byte", "tokens/s", "ETA", "validation loss", "bits per byte"):
        assert word in err
    losses = [line["loss"] for line in metrics_of(workdir, "train")]
    assert [line["step"] for line in metrics_of(workdir, "train")] == list(range(5, 41, 5))
    assert losses[-1] < losses[0] - 0.5
    assert {"tokens_per_second", "bits_per_byte", "grad_norm", "learning_rate", "code_perplexity", "l_commit"} <= set(
        metrics_of(workdir, "train")[0]
    )
    for line in metrics_of(workdir, "train"):
        assert line["tokens_per_second_per_chip"] == pytest.approx(line["tokens_per_second"] / 8)
        shares = [line[f"share_{name}"] for name in ("waiting_for_data", "saving", "evaluating")]
        assert min(shares) >= 0
        assert sum(shares) <= 1
        assert not {"mfu", "peak_memory_bytes"} & set(line)  # a CPU has neither
    spent = json.loads((workdir / "status.json").read_text())["goodput"]
    assert f"goodput {spent['goodput']:.1%}: of " in err
    assert spent["reached_step"] == 40
    assert all(spent["seconds"][kind] > 0 for kind in ("steps", "saves", "evaluation", "compile", "restore", "end"))
    assert spent["seconds"]["repeated"] == spent["seconds"]["waiting"] == 0
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "40"]
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 40
    *sample, _ = out.splitlines(keepends=True)  # the last line is the result's
    assert (workdir / "samples/step_40.txt").read_text() == "".join(sample).rstrip("\n")
    assert [line["packages"] for line in packages_of(workdir)] == [packages.installed()]


def test_tensorboard_reads_the_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, _, _ = trained
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged = metrics_of(workdir, "train")
    assert [step for step, _ in written] == [line["step"] for line in logged]
    assert [value for _, value in written] == pytest.approx([line["loss"] for line in logged], abs=1e-5)
    assert {"validation/bits_per_byte", "train/share_saving"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_a_run_that_is_done_says_so_and_changes_nothing(trained):
    workdir, out, _ = trained
    before = contents(workdir)
    again, err = run(f"--workdir={workdir}", "--config.metrics.tensorboard=False", "--config.optimizer.clip_norm=0.0")
    assert "nothing to train: step 40 of" in err
    assert contents(workdir) == before
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # the same sample


@pytest.mark.slow
def test_settings_and_packages_may_change_on_the_way(trained, tmp_path):
    workdir, _, _ = trained
    shutil.copytree(workdir, tmp_path / "copy")
    (first,) = packages_of(workdir)
    first["packages"]["jax"] = "0.0.1"
    (tmp_path / "copy/packages.jsonl").write_text(json.dumps(first) + "\n")
    flags = ["--config.train.num_steps=45", "--config.optimizer.clip_norm=0.0", "--config.model.block_len=16"]
    _, err = run(f"--workdir={tmp_path / 'copy'}", *flags, "--config.model.remat=none")
    assert "resumes from step 40" in err
    assert (
        f"WARNING: package versions differ from the start at step 0: jax 0.0.1 -> {packages.installed()['jax']}" in err
    )
    assert [line["step"] for line in packages_of(tmp_path / "copy")] == [0, 40]
    assert json.loads((tmp_path / "copy/config.json").read_text())["optimizer"]["clip_norm"] == 0.0
    (line,) = [json.loads(line) for line in (tmp_path / "copy/config_history.jsonl").read_text().splitlines()]
    changes = [("model.block_len", 8, 16), ("model.remat", "projections", "none"), ("optimizer.clip_norm", 1.0, 0.0),
               ("train.num_steps", 40, 45)]  # fmt: skip
    assert line["step"] == 40
    assert line["changed"] == {f"config.{name}": [old, new] for name, old, new in changes}
    told = [line for line in err.splitlines() if line.endswith("at the last start")]
    assert sorted(told) == [f"config.{name}={new}: was {old} at the last start" for name, old, new in changes]
    assert metrics_of(tmp_path / "copy", "validation")[-1]["step"] == 45


@pytest.mark.slow
def test_a_damaged_corpus_ends_a_run_in_one_line(trained, tmp_path):
    workdir, _, _ = trained
    shutil.copytree(workdir, tmp_path / "copy")
    chunk = tmp_path / "copy/store/train/tokens/c/0"
    chunk.write_bytes(chunk.read_bytes()[:300])
    code, _, err = finish(start(f"--workdir={tmp_path / 'copy'}", "--config.train.num_steps=45"))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: config.data.store: is damaged")
    assert str(chunk) in err.splitlines()[-1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(trained, tmp_path):
    workdir, _, _ = trained
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy/checkpoints/40/record/metadata").write_text("{}")
    quick = ("--config.eval.at_end=False", "--config.sample.length=0")
    _, err = run(f"--workdir={tmp_path / 'copy'}", *quick, devices=8)
    assert "checkpoints/40 is set aside as 40.damaged" in err
    assert "resumes from step 20" in err
    assert metrics_of(tmp_path / "copy", "train")[-1]["loss"] == metrics_of(workdir, "train")[-1]["loss"]


def test_rows_that_do_not_divide_over_devices_are_named(tmp_path, config_file):
    workdir = tmp_path / "fresh"
    for flag, message in (
        ("--config.train.batch_size=12", "config.train.batch_size=12: must be a multiple of the 8 devices"),
        ("--config.eval.batch_size=4", "config.eval.batch_size=4: must be a multiple of the 8 devices"),
    ):
        code, _, err = finish(start(f"--config={config_file}", f"--workdir={workdir}", flag, devices=8))
        assert code == 1
        assert err.splitlines()[-1].startswith(f"error: {message}")
    assert not workdir.exists()
