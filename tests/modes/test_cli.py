"""The command line as a user has it: real processes, their exit codes and their last words."""

import fcntl
import itertools
import json
import math
import os
import pathlib
import shutil

import pytest
import sentencepiece

from tests.command import fingerprint, finish, metrics_of, packages_of, run, start
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
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "40"]
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 40
    assert (workdir / "samples/step_40.txt").read_text() == out.rstrip("\n")
    assert [line["packages"] for line in packages_of(workdir)] == [packages.installed()]


def test_tensorboard_reads_the_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, _, _ = trained
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged = metrics_of(workdir, "train")
    assert [step for step, _ in written] == [line["step"] for line in logged]
    assert [value for _, value in written] == pytest.approx([line["loss"] for line in logged], abs=1e-5)
    assert "validation/bits_per_byte" in events.Tags()["scalars"]


def test_eval_gives_what_training_gave_on_another_mesh(trained):
    workdir, _, _ = trained
    (during,) = metrics_of(workdir, "validation")[:1]
    out, _ = run(f"--workdir={workdir}", "--mode=eval", "--config.eval.batch_size=3")
    result = json.loads(out)
    assert result["step"] == 40
    assert result["tokens"] == during["tokens"]
    assert result["loss"] == pytest.approx(during["loss"], rel=1e-5)


@pytest.mark.slow
def test_eval_and_sample_in_another_dtype_than_the_run_trained_in(trained):
    workdir, _, _ = trained
    (during,) = metrics_of(workdir, "validation")[:1]
    given = (f"--workdir={workdir}", "--config.model.dtype=bfloat16")
    evaluated, _ = run(*given, "--mode=eval")
    sampled, _ = run(*given, "--mode=sample", "--prompt=the quick", "--config.sample.length=5")
    result = json.loads(evaluated)
    assert (result["split"], result["step"], result["tokens"]) == ("validation_dtype_bfloat16", 40, during["tokens"])
    assert result["loss"] == pytest.approx(during["loss"], rel=0.02)
    assert result["loss"] != during["loss"]
    assert sampled.startswith("the quick")


@pytest.mark.slow
def test_sample_goes_on_from_each_prompt(trained, tmp_path):
    workdir, _, _ = trained
    odd = tmp_path / "a [p]rompt? 100% #*é.txt"
    odd.write_text("from a file: é")
    flags = ["--mode=sample", f"--workdir={workdir}", "--config.sample.length=15"]  # on the run's own config
    out, _ = run(*flags, "--prompt=the quick", "--prompt=lazy", f"--prompt_file={odd}")
    first, second, third = out.split("\n" + "-" * 80 + "\n")
    assert first.startswith("the quick")
    assert second.startswith("lazy")
    assert third.startswith("from a file: é")
    assert len(first) > len("the quick")


def test_inspect_shows_the_run_and_a_fingerprint(trained):
    workdir, _, _ = trained
    out, _ = run(f"--workdir={workdir}", "--mode=inspect")
    assert '"num_steps": 40' in out
    assert "steps: 20 40" in out
    assert "layers/unit0/w_q/kernel" in out
    parameters = [line.split() for line in out.splitlines() if " float32 P(" in line]
    assert len(parameters) == 25
    count = sum(math.prod(map(int, shape.split("x"))) for _, shape, *_ in parameters)
    assert f"parameters: {count}\n" in out
    older, _ = run(f"--workdir={workdir}", "--mode=inspect", "--step=20")
    assert fingerprint(older) != fingerprint(out)


READ_ONLY = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []  # root, too, asks for permission


@pytest.mark.slow
def test_a_run_that_can_only_be_read_is_evaluated_all_the_same(trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    (workdir / "metrics.jsonl").chmod(0o444)
    for path in [workdir, *workdir.rglob("*")]:
        if path.is_dir():
            path.chmod(0o555)
    before = contents(workdir)
    code, out, err = finish(start(f"--workdir={workdir}", "--mode=eval", "--split=test", prefix=READ_ONLY))
    assert code == 0, err
    assert json.loads(out)["tokens"] > 0
    warnings = [line for line in err.splitlines() if "WARNING" in line or "Traceback" in line or "Warning" in line]
    files = f"{workdir}/metrics.jsonl, {workdir}/eval/step_40_test.tsv"
    assert warnings == [f"WARNING: {files} can't be written (Permission denied)"]
    assert contents(workdir) == before
    workdir.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sample", "inspect", "eval"])
def test_output_that_nobody_reads_ends_a_mode_quietly(mode, trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    process = start(f"--workdir={workdir}", f"--mode={mode}", *(["--split=test"] if mode == "eval" else []))
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 141, err
    assert "rror" not in err
    if mode == "eval":
        assert len(metrics_of(workdir, "test")) == len(metrics_of(trained[0], "test")) + 1
    else:
        assert not err


@pytest.mark.slow
def test_prepare_makes_a_store_that_training_uses(tmp_path, config_file):
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.data.store={tmp_path / 'store'}"]
    _, err = run(*flags, "--mode=prepare")
    assert "train" in err
    assert (tmp_path / "store/store.json").exists()
    assert not (tmp_path / "run").exists()
    _, err = run(*flags, "--mode=prepare")
    assert "is there already" in err
    _, err = run(*flags, "--config.train.num_steps=1", "--config.eval.at_end=False", "--config.sample.length=0")
    assert "preparing" not in err


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.slow
def test_a_run_that_is_done_says_so_and_changes_nothing(trained):
    workdir, out, _ = trained
    before = contents(workdir)
    again, err = run(f"--workdir={workdir}", "--config.metrics.tensorboard=False", "--config.optimizer.clip_norm=0.0")
    assert "nothing to train: step 40" in err
    assert contents(workdir) == before
    assert again == out  # the same sample


@pytest.mark.slow
def test_settings_and_packages_may_change_on_the_way(trained, tmp_path):
    workdir, _, _ = trained
    shutil.copytree(workdir, tmp_path / "copy")
    (first,) = packages_of(workdir)
    first["packages"]["jax"] = "0.0.1"
    (tmp_path / "copy/packages.jsonl").write_text(json.dumps(first) + "\n")
    flags = ["--config.train.num_steps=45", "--config.optimizer.clip_norm=0.0", "--config.model.block_len=16"]
    _, err = run(f"--workdir={tmp_path / 'copy'}", *flags, "--config.model.remat=none")
    assert "goes on from step 40" in err
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
    _, err = run(f"--workdir={tmp_path / 'copy'}", devices=8)
    assert "checkpoints/40 is set aside as 40.damaged" in err
    assert "goes on from step 20" in err
    assert metrics_of(tmp_path / "copy", "train")[-1]["loss"] == metrics_of(workdir, "train")[-1]["loss"]


@pytest.mark.slow
def test_eval_shows_what_the_cache_is_worth_place_by_place(trained):
    """Of a split and a step that are not those of the run's own evaluation."""
    workdir, _, _ = trained
    losses = [metrics_of(workdir, "validation")[0]["loss"]]
    for flags, name in (((), "step_20_test"), (("--config.eval.cache=off",), "step_20_test_cache_off")):
        out, err = run(f"--workdir={workdir}", "--mode=eval", "--split=test", "--step=20", *flags)
        assert "0 - 1,023" in err
        result = json.loads(out)
        assert (result["split"], result["step"]) == (name.removeprefix("step_20_"), 20)
        header, row = (line.split("\t") for line in (workdir / f"eval/{name}.tsv").read_text().splitlines())
        assert header == ["first_position", "tokens", "loss", "bits_per_byte"]
        assert int(row[1]) == result["tokens"]
        assert float(row[2]) == pytest.approx(result["loss"], abs=1e-5)
        assert (workdir / f"eval/{name}.png").exists()
        losses.append(result["loss"])
    assert all(one != pytest.approx(other, rel=1e-5) for one, other in itertools.combinations(losses, 2))
    assert [metrics_of(workdir, split)[-1]["loss"] for split in ("test", "test_cache_off")] == losses[1:]


@pytest.mark.slow
def test_a_run_on_several_stores(tmp_path, config_file, corpus):
    for name, glob in (("a", "?.txt"), ("b", "??.txt")):
        run(f"--config={config_file}", f"--workdir={tmp_path}", "--mode=prepare", f"--source={corpus}",
            f"--config.data.glob={glob}", f"--config.data.store={tmp_path / name}")  # fmt: skip
    flags = [f"--config.data.mixture={tmp_path}/a=0.7,{tmp_path}/b=0.3", "--config.train.num_steps=20"]
    run(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags)
    out, _ = run(f"--workdir={tmp_path / 'run'}", "--mode=eval")
    assert json.loads(out)["loss"] == pytest.approx(metrics_of(tmp_path / "run", "validation")[0]["loss"], rel=1e-5)
    other = f"--config.data.mixture={tmp_path}/a=0.6,{tmp_path}/b=0.4"
    code, _, err = finish(start(f"--workdir={tmp_path / 'run'}", other, "--config.train.num_steps=25"))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_sentencepiece_model_on_json_lines(tmp_path, config_file):
    texts = [f"the quick brown fox number {i} jumps over the lazy dog" for i in range(60)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(dict(body=text)) + "\n" for text in texts))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "m"), vocab_size=80, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    workdir = tmp_path / "run"
    flags = [
        f"--config.data.source={tmp_path / 'docs.jsonl'}", "--config.data.text_field=body",
        f"--config.data.vocab={tmp_path / 'm.model'}", "--config.model.n_vocab=100", "--config.train.num_steps=5",
    ]  # fmt: skip
    run(f"--config={config_file}", f"--workdir={workdir}", *flags)
    (tmp_path / "m.model").unlink()  # the run has its own
    (validation,) = metrics_of(workdir, "validation")
    nats = validation["loss"] * validation["tokens"]
    n_bytes = nats / math.log(2) / validation["bits_per_byte"]
    store = json.loads((workdir / "store/store.json").read_text())
    assert n_bytes == pytest.approx(store["splits"]["validation"]["n_bytes"], rel=1e-6)
    assert n_bytes > validation["tokens"]
    out, _ = run(f"--workdir={workdir}", "--mode=sample", "--prompt=the quick", "--config.sample.length=5")
    assert out.startswith("the quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Files that are not what they should be."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "taken", "linked"):
        (folder / name).mkdir()
    (folder / "blank.txt").write_text("\n\n")
    (folder / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    (folder / "file").write_text("")
    (folder / "linked/store").symlink_to(folder / "nowhere")
    return folder


def check_mistakes(cases: dict[tuple[str, ...], tuple[str, ...]], folder: pathlib.Path) -> None:
    """Each command fails, and the words are in the one line that it says; nothing is written."""
    for flags, words in cases.items():
        code, out, err = finish(start(*flags))
        assert code == 1, (flags, out, err)
        assert "Traceback" not in err, (flags, err)
        last = err.strip().splitlines()[-1] if "Pass --help" not in err else err
        assert all(word in last for word in words), (flags, err)
    assert not any((folder / name).exists() for name in ("fresh", "new", "nowhere"))


def test_each_mistake_is_one_line_and_costs_nothing(folder, config_file):
    config, fresh, configs = f"--config={config_file}", f"--workdir={folder / 'fresh'}", config_file.parent
    cases = {
        (config, fresh, "--config.model.d_modle=3"): ("d_modle", "d_model"),
        (config, fresh, "--config.modle.d_model=3"): ("modle", "model"),
        (config, fresh, "--config.train.num_steps=many"): ("num_steps", "many"),
        (config, fresh, "--config.model.block_len=7"): ("config.model.block_len=7", "must divide", "as 8 does"),
        (config, fresh, "--config.mesh.data=3"): ("config.mesh.data=3", "-1"),
        (config, fresh, "--config.model.n_vocab=100"): ("config.model.n_vocab=100", "at least 259"),
        (config, fresh, f"--config.data.source={folder / 'empty'}"): ("config.data.source=", "is empty"),
        (config, fresh, f"--config.data.source={folder / 'blank.txt'}"): ("config.data.source=", "is empty"),
        (config, fresh, f"--config.data.source={folder / 'nowhere'}"): ("config.data.source=", "is not there"),
        (config, fresh, "--config.data.source="): ("config.data.source=", "is not there"),
        (config, f"--workdir={configs}/run", f"--config.data.source={configs}"): ("holds the token store",),
        (config, fresh, "--mode=trian"): ("mode", "trian"),
        (config, fresh, "stray"): ("stray",),
        (config, fresh, "--mode=eval"): ("--workdir=", "has no checkpoint"),
        (config, fresh, "--mode=sample"): ("--workdir=", "has no checkpoint"),
        (config, fresh, "--mode=inspect"): ("--workdir=", "has no checkpoint"),
        (fresh, "--mode=eval"): ("--workdir=", "config.json"),
        (fresh,): ("--workdir=", "config.json", "--config=FILE"),
        (config,): ("--workdir=", "must be given"),
        ("--config=configs/nowhere.py", fresh): ("configs/nowhere.py",),
        (f"--config={folder / 'broken.py'}", fresh): ("division by zero",),
        (config, f"--workdir={folder / 'file'}"): ("--workdir=", "can't be used"),
        (config, fresh, "--config.data.glob=/x"): ("config.data.glob=/x", "is no pattern"),
        (config, fresh, "--config.seed=99999999999999999999"): ("config.seed=", "below 2 ** 31"),
        (config, fresh, "--config.optimizer.learning_rate=nan"): ("config.optimizer.learning_rate=nan",),
        (f"--workdir={folder / 'file'}", "--mode=eval"): ("--workdir=", "has no config.json"),
        (config, fresh, "--config.data.mixture=x"): ("config.data.mixture=x", "is no STORE=WEIGHT"),
        (config, fresh, "--config.eval.cache=maybe"): ("config.eval.cache=maybe", "on, off"),
        (config, fresh, "--config.eval.cache=off"): ("config.eval.cache=off", "is for --mode=eval"),
        (config, fresh, "--mode=train_vocab"): ("config.data.vocab=bytes", "must be sentencepiece"),
        ("--config=configs/enwik8.py", fresh, f"--source={folder / 'blank.txt'}"): ("has 2 bytes, and enwik8",),
        ("--config=configs/imagenet64.py", fresh, "--config.sample.length=9"): ("sample.length=9", "12288, an image"),
        (config, fresh, "--split=test"): ("--split", "is for --mode=eval"),
        (config, f"--workdir={folder / 'linked'}"): ("config.data.store=", "is a symbolic link to", "not exist"),
        (config, f"--workdir={folder / 'taken'}"): ("--workdir=", "in use by another process"),
    }  # fmt: skip
    with (folder / "taken/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_mistakes(cases, folder)
    assert [path.name for path in (folder / "taken").iterdir()] == ["lock"]


@pytest.mark.slow
def test_each_mistake_about_an_earlier_run_is_one_line_and_changes_nothing(trained, folder, config_file):
    workdir, _, _ = trained
    config, fresh = f"--config={config_file}", f"--workdir={folder / 'fresh'}"
    cases = {
        (config, f"--workdir={workdir}", "--config.model.d_v=24"): ("config.model.d_v=24", "was made with 16"),
        (config, f"--workdir={workdir}", "--config.train.batch_size=16"): ("config.train.batch_size=16", "made with 8"),
        (config, f"--workdir={workdir}", "--config.train.update_len=16"): ("config.train.update_len=16", "with 32"),
        (config, f"--workdir={workdir}", "--config.data.test_share=0.3"): ("config.data.test_share=0.3", "with 0.2"),
        (config, f"--workdir={workdir}", "--mode=sample", "--config.model.d_k=4"): ("config.model.d_k=4", "with 8"),
        (config, f"--workdir={workdir}", "--mode=eval", "--step=7"): ("--step=7", "20, 40"),
        (f"--workdir={workdir}", "--mode=eval", "--config.model.agg_cache=False"): ("agg_cache=False", "with True"),
        (f"--workdir={workdir}", "--mode=inspect", "--config.train.batch_size=16"): ("batch_size=16", "with 8"),
        (f"--workdir={workdir}", "--mode=eval", f"--config.data.store={folder / 'empty'}"): ("is no token store",),
        (f"--workdir={workdir}", "--mode=eval", "--config.data.vocab=byte"): ("config.data.vocab=byte",),
        (f"--workdir={workdir}", "--config.data.glob=*.md"): ("config.data.glob=*.md", "with **/*"),
        (config, fresh, f"--config.data.store={workdir}"): ("config.data.store=", "no whole token store"),
        (config, f"--workdir={workdir}", "--mode=sample", "--prompt_file=/nowhere"): ("--prompt_file=/nowhere",),
        (f"--workdir={workdir}", "--step=20"): ("--step=20", "to go back to step 20, rename every later step"),
        (f"--workdir={workdir}", f"--source={folder / 'blank.txt'}", f"--config.data.store={folder / 'new'}"): (
            f"config.data.source={folder / 'blank.txt'}", "checkpoints/40 was trained on a corpus with"),
        (f"--workdir={workdir}", "--config.seed=1", f"--config.data.store={folder / 'new'}"): ("seed=1", "with 0"),
        (f"--workdir={workdir}", "--config.model.dtype=bfloat16"): ("config.model.dtype=bfloat16", "with float32"),
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "lock"}
    check_mistakes(cases, folder)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "lock"} == before


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
