"""The other modes on the command line, and mistakes: real processes, their exit codes and their last words."""

import fcntl
import itertools
import json
import math
import os
import pathlib
import shutil

import pytest

from tests.command import contents, fingerprint, finish, metrics_of, run, start


@pytest.mark.slow
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


@pytest.mark.slow(16)
def test_eval_and_inspect_know_the_average_of_the_weights(trained, tmp_path):
    """Of a run that switched it on at step 40."""
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    flags = ["--config.train.num_steps=45", "--config.train.ema_decay=0.9", "--config.sample.length=0"]
    _, err = run(f"--workdir={workdir}", *flags)
    assert "checkpoint 40 has no moving average; it starts from the weights" in err
    during = metrics_of(workdir, "validation")[-1]
    assert (during["step"], during["weights"]) == (45, "ema")
    found = {}
    for weights in ("ema", "raw"):
        out, err = run(f"--workdir={workdir}", "--mode=eval", f"--config.eval.weights={weights}")
        assert ("their moving average at step 45" in err) == (weights == "ema")
        found[weights] = json.loads(out)
        assert found[weights]["weights"] == weights
    assert [found[weights]["split"] for weights in found] == ["validation", "validation_weights_raw"]
    assert found["ema"]["loss"] == pytest.approx(during["loss"], rel=1e-5)
    assert found["raw"]["loss"] != pytest.approx(during["loss"], rel=1e-4)
    hashes = [
        [
            line
            for line in run(f"--workdir={workdir}", "--mode=inspect", f"--step={step}")[0].splitlines()
            if "sha256" in line
        ]
        for step in (45, 40)
    ]
    names = ["parameters_sha256", "ema_sha256", "train_state_sha256"]
    assert [line.partition(":")[0] for line in hashes[0]] == names
    assert [line.partition(":")[0] for line in hashes[1]] == [names[0], names[2]]
    assert len({line.partition(":")[2] for line in hashes[0]}) == 3


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


@pytest.mark.slow
def test_inspect_shows_the_run_and_a_fingerprint(trained):
    workdir, _, _ = trained
    out, _ = run(f"--workdir={workdir}", "--mode=inspect")
    assert '"num_steps": 40' in out
    assert "steps: 20 40" in out
    assert "layers/unit0/w_q/kernel" in out
    parameters = [line.split() for line in out.splitlines() if " float32 P(" in line]
    assert len(parameters) == 16
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
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    err = process.stderr.read()
    assert process.wait(timeout=300) == 141, err
    assert "rror" not in err
    if mode == "eval":
        assert len(metrics_of(workdir, "test")) == len(metrics_of(trained[0], "test")) + 1
    else:
        assert not err


@pytest.mark.slow
def test_eval_shows_what_the_cache_is_worth_place_by_place(trained, corpus, tmp_path):
    """Of a split and a step that are not those of the run's own evaluation."""
    workdir, _, _ = trained
    losses = [metrics_of(workdir, "validation")[0]["loss"]]
    for flags, name in (((), "step_20_test"), (("--config.eval.cache=off",), "step_20_test_cache_off")):
        table = tmp_path / f"{name}.tsv"
        given = (f"--workdir={workdir}", "--mode=eval", "--split=test", "--step=20", f"--per_document={table}")
        out, err = run(*given, *flags)
        header, *rows = (line.split("\t") for line in table.read_text().splitlines())
        assert header == ["document", "name", "tokens", "bytes", "loss"]
        assert all((corpus / row[1]).is_file() for row in rows)
        assert sum(int(row[2]) for row in rows) == json.loads(out)["tokens"]
        total = sum(int(row[2]) * float(row[4]) for row in rows)
        assert total / json.loads(out)["tokens"] == pytest.approx(json.loads(out)["loss"], rel=1e-4)
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
        (config, fresh, f"--config.data.source={folder / 'nowhere'}"): ("config.data.source=", "does not exist"),
        (config, fresh, "--config.data.source="): ("config.data.source=", "does not exist"),
        (config, f"--workdir={configs}/run", f"--config.data.source={configs}"): ("contains the token store",),
        (config, fresh, "--mode=trian"): ("mode", "trian"),
        (config, fresh, "stray"): ("stray",),
        (config, fresh, "--mode=eval"): ("--workdir=", "has no checkpoint"),
        (config, fresh, "--mode=sample"): ("--workdir=", "has no checkpoint"),
        (config, fresh, "--mode=inspect"): ("--workdir=", "has no checkpoint"),
        (fresh, "--mode=eval"): ("--workdir=", "config.json"),
        (fresh,): ("--workdir=", "config.json", "--config=FILE"),
        (config,): ("--workdir=", "is missing"),
        ("--config=configs/nowhere.py", fresh): ("configs/nowhere.py",),
        (f"--config={folder / 'broken.py'}", fresh): ("division by zero",),
        (config, f"--workdir={folder / 'file'}"): ("--workdir=", "can't be used"),
        (config, fresh, "--config.data.glob=/x"): ("config.data.glob=/x", "is not a pattern"),
        (config, fresh, "--config.seed=99999999999999999999"): ("config.seed=", "below 2 ** 31"),
        (config, fresh, "--config.optimizer.learning_rate=nan"): ("config.optimizer.learning_rate=nan",),
        (f"--workdir={folder / 'file'}", "--mode=eval"): ("--workdir=", "has no config.json"),
        (config, fresh, "--config.data.mixture=x"): ("config.data.mixture=x", "is not STORE=WEIGHT"),
        (config, fresh, "--config.eval.cache=maybe"): ("config.eval.cache=maybe", "on, off"),
        (config, fresh, "--config.eval.cache=off"): ("config.eval.cache=off", "is for --mode=eval"),
        (config, fresh, "--config.eval.weights=raw", "--config.train.ema_decay=0.9"): ("weights=raw: is for",),
        (config, fresh, "--config.optimizer.schedule=wsd", "--config.optimizer.decay_steps=36"): (
            "config.optimizer.decay_steps=36", "have 41 steps, and config.train.num_steps=40"),
        (config, fresh, "--mode=train_vocab"): ("config.data.vocab=bytes", "must be sentencepiece"),
        ("--config=configs/enwik8.py", fresh, f"--source={folder / 'blank.txt'}"): ("has 2 bytes, but enwik8",),
        ("--config=configs/imagenet64.py", fresh, "--config.sample.length=9"): ("sample.length=9", "12288, an image"),
        (config, fresh, "--split=test"): ("--split", "is for --mode=eval"),
        (config, fresh, "--step=-1"): ("--step=-1",),
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
        (f"--workdir={workdir}", "--mode=eval", f"--config.data.store={folder / 'empty'}"): ("is not a token store",),
        (f"--workdir={workdir}", "--mode=eval", "--config.data.vocab=byte"): ("config.data.vocab=byte",),
        (f"--workdir={workdir}", "--config.data.glob=*.md"): ("config.data.glob=*.md", "with **/*"),
        (config, fresh, f"--config.data.store={workdir}"): ("config.data.store=", "not a complete token store"),
        (config, f"--workdir={workdir}", "--mode=sample", "--prompt_file=/nowhere"): ("--prompt_file=/nowhere",),
        (f"--workdir={workdir}", "--step=7"): ("--step=7", "20, 40"),
        (config, f"--workdir={workdir}/none", "--step=7"): ("--step=7", "no checkpoint to go back to"),
        (config, fresh, f"--config.init_from={folder}/none"): (f"config.init_from={folder}/none", "has no checkpoint"),
        (config, fresh, f"--config.init_from={workdir}@7"): (f"config.init_from={workdir}@7", "20, 40"),
        (config, fresh, f"--config.init_from={workdir}", "--config.model.d_k=4"): ("config.model.d_k=4", "made with 8"),
        (f"--workdir={workdir}", f"--config.init_from={workdir}@20"): ("own folder", "--step=20 goes back"),
        (f"--workdir={workdir}", f"--source={folder / 'blank.txt'}", f"--config.data.store={folder / 'new'}"): (
            f"config.data.source={folder / 'blank.txt'}", "checkpoints/40 was trained on a corpus with"),
        (f"--workdir={workdir}", "--config.seed=1", f"--config.data.store={folder / 'new'}"): ("seed=1", "with 0"),
        (f"--workdir={workdir}", "--config.model.dtype=bfloat16"): ("config.model.dtype=bfloat16", "with float32"),
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "lock"}
    check_mistakes(cases, folder)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "lock"} == before
