"""--mode=prepare on the command line, and runs on what it made."""

import json
import math

import pytest
import sentencepiece

from tests.command import finish, metrics_of, run, said_until, start


def test_prepare_makes_a_store_that_training_uses(tmp_path, config_file):
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.data.store={tmp_path / 'store'}"]
    _, err = run(*flags, "--mode=prepare")
    assert "train" in err
    assert (tmp_path / "store/store.json").exists()
    assert not (tmp_path / "run").exists()
    _, err = run(*flags, "--mode=prepare")
    assert "already exists" in err
    training = start(*flags)
    lines = said_until(training, "store ")
    assert training.wait() == 75, lines
    assert any(line.startswith(f"store {tmp_path / 'store'}") for line in lines)
    assert not any("preparing" in line for line in lines)


def test_append_adds_new_files_of_the_source(tmp_path, config_file):
    (tmp_path / "texts").mkdir()
    for n in range(3):
        (tmp_path / f"texts/{n}.txt").write_text(f"text {n} " * 9)
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--source={tmp_path / 'texts'}"]
    flags += [f"--config.data.store={tmp_path / 'store'}", "--mode=prepare"]
    code, _, err = finish(start(*flags, "--append"))
    assert code == 1
    assert f"error: config.data.store={tmp_path / 'store'}: does not exist, and --append adds to a store" in err
    run(*flags)
    (tmp_path / "texts/more.txt").write_text("more " * 20)
    _, err = run(*flags, "--append")
    assert "adding 1 of 4 files" in err
    assert "in 2 parts" in err
    _, err = run(*flags, "--append")
    assert "nothing is added" in err


@pytest.mark.slow
def test_a_run_on_several_stores(tmp_path, config_file, corpus):
    for name, glob in (("a", "?.txt"), ("b", "??.txt")):
        run(f"--config={config_file}", f"--workdir={tmp_path}", "--mode=prepare", f"--source={corpus}",
            f"--config.data.glob={glob}", f"--config.data.store={tmp_path / name}")  # fmt: skip
    flags = [
        f"--config.data.mixture={tmp_path}/a=0.7,{tmp_path}/b=0.3",
        "--config.train.num_steps=20",
        "--config.sample.length=0",
    ]
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
    run(f"--config={config_file}", f"--workdir={workdir}", *flags, "--config.sample.length=0")
    (tmp_path / "m.model").unlink()  # the run has its own
    (validation,) = metrics_of(workdir, "validation")
    nats = validation["loss"] * validation["tokens"]
    n_bytes = nats / math.log(2) / validation["bits_per_byte"]
    store = json.loads((workdir / "store/store.json").read_text())
    assert n_bytes == pytest.approx(store["splits"]["validation"]["n_bytes"], rel=1e-6)
    assert n_bytes > validation["tokens"]
    out, _ = run(f"--workdir={workdir}", "--mode=sample", "--prompt=the quick", "--config.sample.length=5")
    assert out.startswith("the quick")
