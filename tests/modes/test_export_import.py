"""--mode=export and --mode=import: a model leaves its run, and comes back as the start of another."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

import tvq_pod
from tests import forked
from tests.buckets import reached_at
from tests.command import ROOT, contents, environment, fingerprint, finish, metrics_of, run, start
from tests.common import model_params
from tests.data.test_vocab import trained as trained_vocab
from tests.made_run import FINGERPRINT, make_run, settings_of
from tests.made_up import first_state
from tvq_pod.config.resolve import resolve
from tvq_pod.config.run_config import read_run_config
from tvq_pod.config.settings import CheckpointSettings, EvalSettings, MeshSettings
from tvq_pod.errors import UserError
from tvq_pod.inference.exported import Origin, read_exported
from tvq_pod.modes.export_model import export
from tvq_pod.modes.import_model import import_model
from tvq_pod.modes.inspect_run import inspect
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def import_from(folder, workdir, **model):
    settings = resolve(read_run_config(folder, "--from"))
    settings = dataclasses.replace(settings, model=settings.model.replace(**model))
    import_model(settings, epath.Path(workdir), epath.Path(folder))


@pytest.mark.slow(5)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_what_was_exported_and_imported_is_exported_again_bit_for_bit(kind, tmp_path):
    (tmp_path / "run").mkdir()
    vocab = trained_vocab(tmp_path) if kind == "sentencepiece" else None
    settings = make_run(tmp_path / "run", settings_of(n_vocab=400), vocab=vocab)
    export(settings, epath.Path(tmp_path / "run"), epath.Path(tmp_path / "out"), None, None)
    assert read_exported(epath.Path(tmp_path / "out")).origin == Origin(3, FINGERPRINT)
    import_from(tmp_path / "out", tmp_path / "imported")
    again = resolve(read_run_config(tmp_path / "imported"))
    export(again, epath.Path(tmp_path / "imported"), epath.Path(tmp_path / "again"), 0, "float32")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob("*.writing*")) == []
    if vocab:
        assert again.data.vocab == str(tmp_path / "imported/vocab.model")


@pytest.mark.slow(3)
def test_the_average_of_the_weights_is_what_leaves_a_run_that_has_one(tmp_path):
    """By --mode=export and tvq_pod.load; the weights of the step, where config.eval.weights=raw asks for them."""
    settings = settings_of()
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, ema_decay=0.9))
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", settings, changed=lambda x: x.replace(ema=jax.tree.map(lambda a: a + 1.0, x.ema)))
    tensors = {}
    for weights in ("ema", "raw"):
        asked = dataclasses.replace(settings, eval=EvalSettings(weights=weights))
        export(asked, epath.Path(tmp_path / "run"), epath.Path(tmp_path / weights), None, None)
        tensors[weights] = read_exported(epath.Path(tmp_path / weights)).tensors
    for name, raw in tensors["raw"].items():
        np.testing.assert_array_equal(tensors["ema"][name], raw + 1.0)
    loaded, raw = tvq_pod.load(tmp_path / "run").params, model_params(settings.model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1.0), loaded, raw)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("one")
    (folder / "run").mkdir()
    export(make_run(folder / "run", settings_of()), epath.Path(folder / "run"), epath.Path(folder / "out"), 3, None)
    return folder / "out"


@pytest.mark.slow(2)
def test_an_imported_checkpoint_belongs_to_a_model_and_to_no_corpus(out, tmp_path):
    import_from(out, tmp_path / "imported", dtype="bfloat16")
    checkpoints = CheckpointReader(tmp_path / "imported")
    record = checkpoints.record(checkpoints.pick(None))
    checkpoints.close()
    assert record["imported"] == dict(step=3, fingerprint=FINGERPRINT)
    assert record["config.model.d_model"] == "8"
    assert record["config.model.dtype"] == "bfloat16"
    assert not {"config.seed", "config.data.store, fingerprint"} & record.keys()


@pytest.mark.slow(3)
def test_an_imported_model_and_all_that_descends_from_it_say_where_it_came_from(out, tmp_path, capsys):
    import_from(out, tmp_path / "imported")
    inspect(resolve(read_run_config(tmp_path / "imported")), epath.Path(tmp_path / "imported"), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ancestor")]
    assert lines == [f"ancestor: {out} step 3 corpus {FINGERPRINT}: 1 layers"]
    checkpoints = Checkpoints(tmp_path / "imported", CheckpointSettings())
    checkpoints.begin(0)  # training resumes from it
    record, schedule = checkpoints.record(0), checkpoints.schedule(0)
    state = first_state(settings_of(), make_mesh(MeshSettings(), jax.devices()[:1]))
    checkpoints.save(state, 5, {n: value for n, value in record.items() if n not in ("imported", "ancestry")}, schedule)
    assert checkpoints.wait(), checkpoints.error
    assert checkpoints.ancestry(5) == record["ancestry"]
    checkpoints.close()


@pytest.mark.slow(1)
def test_a_run_whose_own_data_or_first_weights_are_elsewhere_is_exported_without_naming_them(tmp_path):
    """And what was exported can be imported: no setting is left that needs another one."""
    settings = settings_of()
    data = dataclasses.replace(settings.data, mixture="/nowhere/a=1,/nowhere/b=1", mixture_schedule="5:0/1")
    settings = dataclasses.replace(settings, data=data, init_from="/nowhere/c", init_optimizer=True, init_layers=1)
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", settings)
    export(settings, epath.Path(tmp_path / "run"), epath.Path(tmp_path / "out"), None, None)
    assert "nowhere" not in (tmp_path / "out/config.json").read_text()
    import_from(tmp_path / "out", tmp_path / "imported")
    assert resolve(read_run_config(tmp_path / "imported")).init_from == ""


@pytest.mark.slow(2)
def test_a_setting_that_the_model_depends_on_may_not_be_changed_on_the_way(out, tmp_path):
    with pytest.raises(UserError, match=r"config\.model\.window_bias=8\.0: the model in .* has 0\.0; leave"):
        import_from(out, tmp_path / "imported", window_bias=8.0)
    with pytest.raises(UserError, match=r"config\.model\.d_v=16: the model in .* has 8; leave"):
        import_from(out, tmp_path / "imported", d_v=16)
    assert not list(tmp_path.iterdir())


FAILS = """
import os, resource, signal, sys
from etils import epath
from tvq_pod.config.resolve import resolve
from tvq_pod.config.run_config import read_run_config
from tvq_pod.errors import UserError
from tvq_pod.modes import import_model
if HOW == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
else:
    import_model.write_whole = lambda path, content: os.kill(os.getpid(), signal.SIGKILL)
try:
    import_model.import_model(resolve(read_run_config(FROM, "--from")), epath.Path(WORKDIR), epath.Path(FROM))
except UserError as error:
    sys.exit(str(error))
"""


def failing_import(out, workdir, how) -> tuple[int, str]:
    """Exit code and messages of a process that finds a full disk, or is killed just before the run is complete."""
    names = f"FROM, WORKDIR, HOW = {str(out)!r}, {str(workdir)!r}, {how!r}"
    command = [sys.executable, "-c", f"{names}\n{FAILS}"]
    process = forked.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.mark.slow
def test_an_import_on_a_full_disk_leaves_nothing(out, tmp_path):
    code, err = failing_import(out, tmp_path / "imported", "full")
    assert code == 1, err
    assert err.splitlines()[-1].startswith(f"--workdir={tmp_path}/imported: can't be written (")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_import_that_is_killed_leaves_no_run_of_that_name(out, tmp_path):
    code, err = failing_import(out, tmp_path / "imported", "killed")
    assert code == -signal.SIGKILL, err
    (draft,) = tmp_path.iterdir()
    assert draft.name.startswith("imported.writing-")
    assert (draft / "checkpoints/0").is_dir()
    assert not (draft / "config.json").exists()
    import_from(out, tmp_path / "imported")


def test_quadratic_attention_is_not_exported(tmp_path):
    with pytest.raises(UserError, match=r"config\.model\.attn_type=full: can't be exported"):
        export(settings_of(attn_type="full"), epath.Path(tmp_path), epath.Path(tmp_path / "out"), None, None)


@pytest.mark.slow(1)
def test_each_mistake_is_one_line_and_changes_nothing(out, tmp_path, config_file):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    run_of_out, config = f"--workdir={out.parent / 'run'}", f"--config={config_file}"
    fresh, given, nowhere = f"--workdir={tmp_path / 'fresh'}", f"--from={out}", f"--from={tmp_path / 'nowhere'}"
    cases = {
        (config, fresh, "--mode=export", f"--to={tmp_path / 'out'}"): f"{fresh}: has no checkpoint; train there first",
        (fresh, "--mode=export", f"--to={tmp_path / 'out'}"): f"{fresh}: has no config.json",
        (run_of_out, "--mode=export"): "--to=: must be given for --mode=export: the folder to write",
        (run_of_out, "--mode=export", f"--to={tmp_path / 'taken'}"): f"--to={tmp_path / 'taken'}: already exists",
        (run_of_out, "--mode=export", f"--to={tmp_path / 'link'}"): f"--to={tmp_path / 'link'}: already exists",
        (run_of_out, "--mode=export", f"--to={tmp_path / 'taken/file'}"): f"--to={tmp_path / 'taken/file'}: can't be",
        (run_of_out, "--mode=export", "--to=s3://a/b"): "--to=s3://a/b: s3:// is not supported",
        (run_of_out, "--mode=export", f"--to={tmp_path / 'out'}", "--step=9"): "--step=9: ",
        (run_of_out, "--mode=export", f"--to={tmp_path / 'out'}", "--config.model.mem_len=8"): "config.model.mem_len=8",
        (run_of_out, "--mode=eval", f"--to={tmp_path / 'out'}"): "--to: is for --mode=export",
        (fresh, "--mode=import"): "--from=: must be given for --mode=import",
        (fresh, "--mode=import", nowhere): f"{nowhere}: has no config.json",
        (fresh, "--mode=import", f"--from={tmp_path / 'taken'}"): f"--from={tmp_path / 'taken'}: has no config.json",
        (fresh, "--mode=import", f"--from={out.parent / 'run'}"): f"--from={out.parent / 'run'}: has no model.safetens",
        (fresh, "--mode=import", given, "--config.model.n_code=9"): "config.model.n_code=9: the model in ",
        (fresh, "--mode=import", given, config): "config.model.d_model=16: the model in ",
        (run_of_out, "--mode=import", given): f"{run_of_out}: already exists",
        (f"--workdir={tmp_path / 'taken'}", "--mode=import", given): f"--workdir={tmp_path / 'taken'}: already exists",
        (f"--workdir={tmp_path / '[1]'}", "--mode=import", given): f"--workdir={tmp_path / '[1]'}: the full path",
    }  # fmt: skip
    before = contents(out.parent) | contents(tmp_path)
    for flags, line in cases.items():
        code, printed, err = finish(start(*flags))
        assert (code, printed) == (1, ""), (flags, err)
        assert err.startswith(f"error: {line}"), (flags, err)
        assert err.count("\n") == 1, err
    assert contents(out.parent) | contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "taken"]


@pytest.mark.slow(40)
def test_an_imported_run_is_evaluated_sampled_and_trained_on_another_corpus(trained, tmp_path):
    workdir, _, _ = trained
    _, err = run(f"--workdir={workdir}", "--mode=export", f"--to={tmp_path / 'out'}")
    assert err.startswith("step 40: ")
    imported = f"--workdir={tmp_path / 'imported'}"
    run(imported, "--mode=import", f"--from={tmp_path / 'out'}", "--config.train.num_steps=10")
    source = f"--source={json.loads((workdir / 'config.json').read_text())['data']['source']}"
    inspected = [run(flag, "--mode=inspect")[0] for flag in (imported, f"--workdir={workdir}")]
    assert fingerprint(inspected[0])[0] == fingerprint(inspected[1])[0]  # the parameters'
    (during,) = metrics_of(workdir, "validation")[:1]
    printed, _ = run(imported, "--mode=eval", source, f"--config.data.store={workdir / 'store'}")
    result = json.loads(printed)
    assert (result["step"], result["tokens"]) == (0, during["tokens"])
    assert result["loss"] == pytest.approx(during["loss"], rel=1e-5)
    greedy = ("--mode=sample", "--prompt=the quick", "--config.sample.temperature=0")
    assert run(imported, *greedy) == run(f"--workdir={workdir}", *greedy)
    other = tmp_path / "other"
    other.mkdir()
    for n in range(30):
        (other / f"{n}.txt").write_text(f"another corpus, document {n}. " * 20)
    _, err = run(imported, f"--source={other}", "--config.seed=5", "--config.eval.at_end=False")
    assert "resumes from step 0 in" in err
    losses = [line["loss"] for line in metrics_of(tmp_path / "imported", "train")]
    assert losses[0] < 5  # a new model has log(259) = 5.6
    code, _, err = finish(start(imported, f"--source={other}", "--config.seed=6"))
    assert (code, err.splitlines()[-1].partition(";")[0]) == (
        1,
        f"error: config.seed=6: the checkpoint {tmp_path / 'imported/checkpoints/10'} was made with 5",
    )


@pytest.mark.slow(20)
def test_buckets_are_exported_to_and_imported_from(out, tmp_path, server, monkeypatch):
    files = reached_at(monkeypatch, server)
    run(f"--workdir={out.parent / 'run'}", "--mode=export", "--to=gs://bucket/out")
    assert {name: files.cat(f"bucket/out/{name}") for name in files_of(out)} == files_of(out)
    code, _, err = finish(start(f"--workdir={out.parent / 'run'}", "--mode=export", "--to=gs://bucket/out"))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: --to=gs://bucket/out: already exists")
    run("--workdir=gs://bucket/imported", "--mode=import", "--from=gs://bucket/out")
    run("--workdir=gs://bucket/imported", "--mode=export", f"--to={tmp_path / 'again'}")
    assert files_of(tmp_path / "again") == files_of(out)
    code, _, err = finish(start("--workdir=gs://bucket/imported", "--mode=import", "--from=gs://bucket/out"))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: --workdir=gs://bucket/imported: already exists")
