"""--mode=sample with JSON lines: many prompts in, one line for each sample out."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from tests import forked
from tests.command import finish, start
from tests.common import model_params
from tests.made_run import make_run, settings_of
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.inference.text import continuations
from tvq_pod.modes.sample import sample
from tvq_pod.run.checkpoint_reader import CheckpointReader

SETTINGS = settings_of(head_type="mqa")
PROMPTS = [dict(prompt="the quick"), dict(id="b", prompt=""), dict(prompt="brown fox " * 5, more=[1]), dict(prompt="x")]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    make_run(workdir, SETTINGS)
    (workdir / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return workdir


def with_sample(**how):
    return dataclasses.replace(SETTINGS, sample=dataclasses.replace(SETTINGS.sample, **how))


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow(3)
def test_each_prompt_of_a_file_has_its_lines_in_order(workdir, tmp_path):
    """On eight devices, two samples of each prompt, in a file."""
    how, output = dict(length=10, count=2, logprobs=True, seed=3), tmp_path / "samples.jsonl"
    sample(with_sample(**how), epath.Path(workdir), [b"given"], None, f"{workdir}/prompts.jsonl", str(output))
    lines, prompts = lines_of(output.read_text()), [dict(prompt="given"), *PROMPTS]
    assert [(line["index"], line["sample"]) for line in lines] == [(n, k) for n in range(5) for k in range(2)]
    for line in lines:
        own = prompts[line["index"]]
        assert own.items() <= line.items()
        assert list(line) == ["index", "sample", *own, "text", "tokens", "ended_by", "logprobs"]
        assert line["ended_by"] == ("length" if len(line["tokens"]) == 10 else "end_of_document")
        assert bytes(token - 3 for token in line["tokens"]).decode(errors="replace") == line["text"]
        assert len(line["logprobs"]) == len(line["tokens"])
        assert max(line["logprobs"]) < 0
    assert len({line["text"] for line in lines}) == 10


@pytest.mark.slow
def test_a_line_has_the_text_that_is_printed_without_json(workdir, capsys):
    sample(with_sample(length=10), epath.Path(workdir), [], None, f"{workdir}/prompts.jsonl")
    lines = lines_of(capsys.readouterr().out)
    prompts = [prompt["prompt"].encode() for prompt in PROMPTS]
    sample(with_sample(length=10), epath.Path(workdir), prompts, None)
    printed = capsys.readouterr().out.split("\n\n" + "-" * 80 + "\n")
    assert [line["prompt"] + line["text"] for line in lines] == [text.removesuffix("\n") for text in printed]


@pytest.mark.slow
def test_a_stop_string_ends_a_sample_as_text_and_as_json(workdir, capsys):
    args = epath.Path(workdir), [], None, f"{workdir}/prompts.jsonl"
    sample(with_sample(length=20, temperature=0.0), *args)
    free = lines_of(capsys.readouterr().out)
    stops = [line["text"][4:6] for line in free]
    spelled = r"\,".join(stop.replace("\\", r"\\").replace("\n", r"\n") for stop in stops)
    sample(with_sample(length=20, temperature=0.0, stop=spelled), *args)
    lines = lines_of(capsys.readouterr().out)
    for line, before in zip(lines, free, strict=True):
        assert line["ended_by"] == "stop"
        at = min(before["text"].index(stop) for stop in stops if stop in before["text"])
        assert line["text"] == before["text"][:at]
        assert line["tokens"] == before["tokens"][: len(line["tokens"])]
    devices = jax.local_devices()[:1]
    how = dataclasses.replace(SETTINGS.sample, length=20, temperature=0.0, stop=spelled)
    params = model_params(SETTINGS.model)
    (pieces,) = continuations(params, SETTINGS.model, ByteVocab(), how, [b"the quick"], devices)
    assert "".join(pieces) == "the quick" + lines[0]["text"]


@pytest.mark.parametrize(
    ("how", "flags", "message"),
    [
        (dict(logprobs=True), {}, "config.sample.logprobs=True: text has no place for them; give --output=FILE"),
        ({}, dict(output="{folder}"), "--output={folder}: already exists, and is not replaced; give a new file"),
        ({}, dict(output="{folder}/none/x"), "--output={folder}/none/x: the folder {folder}/none does not exist"),
        ({}, dict(prompt_file="{folder}/none"), "--prompt_file={folder}/none: can't be read"),
        ({}, dict(prompt_file="{folder}/bad.jsonl"), "--prompt_file={folder}/bad.jsonl: line 2 has no text prompt"),
    ],
)
def test_what_can_not_be_sampled_is_refused_before_a_checkpoint_is_read(how, flags, message, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    monkeypatch.setattr(CheckpointReader, "__init__", lambda *args: pytest.fail("a checkpoint is read"))
    flags = {name: value.format(folder=tmp_path) for name, value in flags.items()}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        sample(with_sample(**how), epath.Path(tmp_path), [], None, **flags)
    assert str(error.value).startswith(message.format(folder=tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_images_are_not_written_as_json(tmp_path):
    images = dataclasses.replace(SETTINGS, data=dataclasses.replace(SETTINGS.data, format="imagenet64"))
    with pytest.raises(UserError, match=r"--output=x: is for text; leave it out with config\.data\.format=im"):
        sample(images, epath.Path(tmp_path), [], None, output="x")


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(workdir):
    for flag, message in {
        "--config.sample.top_k=-1": "config.sample.top_k=-1: must be at least 0",
        "--config.sample.min_p=-0.1": "config.sample.min_p=-0.1: must be at least 0 and below 1",
        "--config.sample.repetition_penalty=-1": "config.sample.repetition_penalty=-1.0: must be above 0",
        "--config.sample.max_rows=0": "config.sample.max_rows=0: must be at least 1",
        r"--config.sample.stop=a\b": r"config.sample.stop=a\b: \b is not an escape; the escapes are \n, \t, \\, \,",
        "--output=s3://b/x": "--output=s3://b/x: s3:// is not supported",
    }.items():
        code, out, err = finish(start(f"--workdir={workdir}", "--mode=sample", flag))
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1


@pytest.mark.slow
def test_all_processes_end_if_the_first_can_not_write(workdir):
    """In a folder that takes no files."""
    flags = [f"--workdir={workdir}", "--mode=sample", "--prompt=a", "--output=/proc/samples.jsonl"]
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--devices_per_process=1", "--", *flags]
    job = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 1, out
    errors = [line for line in out.splitlines() if "error: " in line]
    assert "error: --output=/proc/samples.jsonl: can't be written (No such file or directory)" in errors[0] + errors[1]
    assert "error: process 0 could not continue" in errors[0] + errors[1]


@pytest.mark.slow
def test_several_processes_write_the_lines_of_one(workdir, tmp_path):
    """Each of two devices has one row, so that most prompts wait."""
    flags = [f"--workdir={workdir}", "--mode=sample", "--config.sample.length=10", "--config.sample.max_rows=1"]
    flags += [f"--prompt_file={workdir}/prompts.jsonl", "--config.sample.count=2"]
    outs = []
    for n in (1, 2):
        command = [sys.executable, "-m", "launch.local", f"--processes={n}", "--devices_per_process=1", "--", *flags]
        command.append(f"--output={tmp_path}/{n}.jsonl")
        job = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        out, _ = job.communicate(timeout=300)
        assert job.returncode == 0, out
        outs.append(lines_of((tmp_path / f"{n}.jsonl").read_text()))
    assert outs[0] == outs[1]
    assert len(outs[0]) == 2 * len(PROMPTS)
    assert np.unique([line["text"] for line in outs[0]]).size == len(outs[0])
