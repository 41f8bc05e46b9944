"""A warm start: what is taken from another run and what is fresh, which runs fit, and what is refused in one line.

Checkpoints are made up and on disk; no step is compiled but the made-up one.
"""

import dataclasses
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from launch import local
from tests import forked
from tests.buckets import reached_at
from tests.command import contents
from tests.common import store_of
from tests.made_up import first_state, made_up_step
from tests.run.saved import RECORD, SCHEDULE, SETTINGS, damage, names
from tests.training.test_bad_steps import AskedAt, NoSignals, settings_for
from tvq_pod.config.identity import OPTIMIZER_STATE
from tvq_pod.config.init_from import Source, check_init_from, source_of
from tvq_pod.config.resolve import config_of, resolve
from tvq_pod.config.run_config import read_run_config
from tvq_pod.config.settings import CheckpointSettings, MeshSettings, Settings
from tvq_pod.errors import Preempted, UserError
from tvq_pod.modes import train as train_module
from tvq_pod.modes.inspect_run import inspect
from tvq_pod.modes.train import train
from tvq_pod.nn.codebook import is_codebook
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.hashes import sha256_of
from tvq_pod.training import restore, warm_start
from tvq_pod.training.warm_start import LAYERS, VOCAB, WarmStart

N_LAYERS = 2  # of the other run


def with_fields(settings, **groups):
    """Settings with some fields of some groups changed, or settings of no group."""
    changes = {
        name: dataclasses.replace(getattr(settings, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(settings, **changes)


THEIRS = with_fields(SETTINGS, model=dict(n_layer=N_LAYERS), train=dict(ema_decay=0.9))


@pytest.fixture(scope="module")
def mesh(eight_devices):
    return make_mesh(MeshSettings(), eight_devices)


@pytest.fixture(scope="module")
def their_state(mesh):
    """A state in which no two numbers of an array are alike, and none is 0."""
    state = first_state(THEIRS, mesh)
    rng = np.random.default_rng(0)

    def numbers(x):
        return jax.device_put(1 + rng.permutation(x.size).reshape(x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(numbers, state)


@pytest.fixture(scope="module")
def source_once(tmp_path_factory, their_state):
    workdir = tmp_path_factory.mktemp("theirs")
    checkpoints = Checkpoints(workdir, CheckpointSettings(keep=0))
    for step in (20, 40):
        checkpoints.save(their_state, step, RECORD | {"config.model.n_layer": str(N_LAYERS)}, SCHEDULE)
        checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def source(source_once, tmp_path):
    """The folder of another run, with checkpoints 20 and 40 of `their_state`."""
    return shutil.copytree(source_once, tmp_path / "theirs")


@pytest.fixture
def fresh(monkeypatch):
    """The states of the seed, which are quick to make here."""
    monkeypatch.setattr(warm_start, "create_train_state", first_state)
    monkeypatch.setattr(restore, "create_train_state", first_state)


def started(settings, tmp_path, mesh):
    """The first state, and the ancestry, of a run that starts from another one."""
    warm = WarmStart.of(settings, epath.Path(tmp_path / "ours"))
    assert warm is not None
    state = warm.state(mesh)
    warm.close()
    return state, warm.ancestry


def refused(settings, tmp_path):
    """The line that refuses a warm start."""
    with pytest.raises(UserError) as raised:
        WarmStart.of(settings, epath.Path(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()
    return str(raised.value)


@pytest.mark.slow(4)
def test_weights_and_codebooks_are_theirs_and_all_else_is_fresh(source, tmp_path, mesh, their_state, fresh):
    before = contents(source)
    ours = with_fields(THEIRS, init_from=str(source))
    state, (ancestor,) = started(ours, tmp_path, mesh)
    assert sha256_of(state.params) == sha256_of(their_state.params) != sha256_of(first_state(ours, mesh).params)
    assert sha256_of(state.ema) == sha256_of(jax.tree.map(lambda x: x.astype(jnp.float32), state.params))
    assert sha256_of(state.replace(params=None, ema=None)) == sha256_of(
        first_state(ours, mesh).replace(params=None, ema=None)
    )
    assert contents(source) == before
    expected = dict(run=str(source), step=40, corpus="corpus-a", layers=N_LAYERS, optimizer=False)
    assert {name: ancestor[name] for name in expected} == expected
    assert re.fullmatch("[0-9a-f]{8}", ancestor["fingerprint"])


@pytest.mark.slow(3)
def test_the_optimizer_s_state_is_taken_on_request_and_its_schedule_starts_over(
    source, tmp_path, mesh, their_state, fresh
):
    ours = with_fields(THEIRS, init_from=f"{source}@20", init_optimizer=True)
    state, (ancestor,) = started(ours, tmp_path, mesh)
    assert (ancestor["step"], ancestor["optimizer"]) == (20, True)
    (*directions, schedule), (*theirs, _) = state.opt_state.inner_state, their_state.opt_state.inner_state
    assert sha256_of(directions) == sha256_of(theirs)
    assert int(schedule.count) == int(state.step) == 0
    first = first_state(ours, mesh)
    for name in ("recurrent", "bad_steps", "digest"):
        assert sha256_of(getattr(state, name)) == sha256_of(getattr(first, name)), name


@pytest.mark.slow(3)
def test_mesh_dtypes_window_cache_and_update_may_differ(source, tmp_path, eight_devices, their_state, fresh):
    ours = with_fields(
        THEIRS,
        init_from=str(source),
        model=dict(param_dtype="bfloat16", dtype="bfloat16", mem_len=8, block_len=8, agg_cache=False),
        train=dict(batch_size=4, update_len=16, ema_decay=0.0),
        optimizer=dict(name="lion"),
        mesh=dict(data=2, model=2),
    )
    state, _ = started(ours, tmp_path, make_mesh(ours.mesh, eight_devices[:4]))
    assert state.ema is None

    def same(path, our, their):
        assert our.dtype == (jnp.float32 if is_codebook(path) else jnp.bfloat16)
        assert len(our.sharding.device_set) == 4
        np.testing.assert_array_equal(np.asarray(our), np.asarray(their.astype(our.dtype)))

    jax.tree_util.tree_map_with_path(same, state.params, their_state.params)


@pytest.mark.slow(6)
@pytest.mark.parametrize(("n_layer", "n_taken"), [(1, 1), (3, 2), (2, 1)])
def test_the_first_layers_are_taken_and_others_are_of_the_seed(
    source, tmp_path, mesh, their_state, fresh, n_layer, n_taken
):
    ours = with_fields(THEIRS, init_from=str(source), init_layers=n_taken, model=dict(n_layer=n_layer))
    state, (ancestor,) = started(ours, tmp_path, mesh)
    assert ancestor["layers"] == n_taken
    seed = first_state(ours, mesh).params
    theirs = their_state.params
    for name in ("embedding", "w_out", "norm_out"):
        assert sha256_of(state.params[name]) == sha256_of(theirs[name])
    for part, expected in ((slice(0, n_taken), theirs), (slice(n_taken, n_layer), seed)):
        ours_there, expected_there = (
            jax.tree.map(lambda x, part=part: x[part], params["layers"]) for params in (state.params, expected)
        )
        assert sha256_of(ours_there) == sha256_of(expected_there)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            dict(model=dict(d_model=12)),
            "config.model.d_model=12: step 40 of HERE was made with 8; give that, or",
        ),
        (dict(model=dict(n_code=7)), "config.model.n_code=7: step 40 of HERE was made with 5"),
        (dict(model=dict(head_type="mha")), "config.model.head_type=mha: step 40 of HERE was made with shga; give"),
        (dict(model=dict(attn_type="full")), "config.model.attn_type=full: step 40 of HERE was made with vq"),
        (
            dict(model=dict(n_layer=1)),
            "config.model.n_layer=1: step 40 of HERE has 2 layers; give 2, or config.init_layers=1 to take its "
            "first 1$",
        ),
        (
            dict(model=dict(n_layer=3)),
            "config.model.n_layer=3: step 40 of HERE has 2 layers; give 2, or config.init_layers=2 to take its first "
            "2, and draw the others from the seed",
        ),
        (
            dict(model=dict(n_layer=3), init_layers=3),
            "config.init_layers=3: step 40 of HERE has 2 layers; give at most that",
        ),
        (
            dict(optimizer=dict(name="lion"), init_optimizer=True),
            "config.init_optimizer=True: step 40 of HERE has the state of adamw, but config.optimizer.name=lion; give",
        ),
        (
            dict(init_layers=1, init_optimizer=True),
            "config.init_optimizer=True: step 40 of HERE has the state of all 2 layers, but only 1 are taken",
        ),
        (dict(data=dict(vocab="sentencepiece")), "config.data.vocab=sentencepiece: would be trained again"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(source, tmp_path, changes, line):
    settings = with_fields(THEIRS, init_from=str(source), **changes)
    assert re.match(line.replace("HERE", re.escape(f"config.init_from={source}")), refused(settings, tmp_path))


def test_a_vocabulary_that_is_known_late_is_refused_too(source, tmp_path):
    warm = WarmStart(with_fields(THEIRS, init_from=str(source)), epath.Path(tmp_path / "ours"))
    warm.check_vocab("bytes")
    with pytest.raises(UserError, match=r"^config.data.vocab=pieces: step 40 of .* was made with bytes; give"):
        warm.check_vocab("pieces")
    warm.close()


def saved_with(workdir, state, **record):
    """The folder of a run whose one checkpoint has some other entries in its record."""
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    checkpoints.save(state, 20, RECORD | {LAYERS: str(N_LAYERS)} | record, SCHEDULE)
    assert checkpoints.wait(), checkpoints.error
    checkpoints.close()
    return workdir


def test_an_optimizer_s_state_of_another_version_is_refused(tmp_path, their_state):
    source = saved_with(tmp_path / "theirs", their_state, **{OPTIMIZER_STATE: "0"})
    assert refused(with_fields(THEIRS, init_from=str(source), init_optimizer=True), tmp_path).endswith(
        "has the state of adamw in a form that this version does not read; leave it out"
    )
    WarmStart(with_fields(THEIRS, init_from=str(source)), epath.Path(tmp_path / "ours")).close()  # weights alone do


def test_a_run_whose_mixture_has_another_vocabulary_is_refused(tmp_path, their_state, made_up):
    """It is known once the stores are open; of the other run only the record is read."""
    source = saved_with(tmp_path / "theirs", their_state, **{VOCAB: "pieces", "config.model.n_vocab": "264"})
    store_of(tmp_path / "store", [bytes([65 + n]) * 99 for n in range(20)])
    ours = with_fields(THEIRS, init_from=str(source), data=dict(mixture=f"{tmp_path}/store=1"), model=dict(n_vocab=264))
    with pytest.raises(UserError, match=r"^config.data.vocab=bytes: step 20 of .* was made with pieces; give that run"):
        train(ours, epath.Path(tmp_path / "ours"), NoSignals())
    assert not (tmp_path / "ours/checkpoints").exists()


def test_a_run_that_is_missing_damaged_or_this_one_is_refused(source, tmp_path):
    def line(init_from):
        return refused(with_fields(THEIRS, init_from=str(init_from)), tmp_path)

    assert line(tmp_path / "no") == f"config.init_from={tmp_path}/no: has no checkpoint; train there first"
    assert line(f"{source}@30") == f"config.init_from={source}@30: has no such checkpoint; give one of 20, 40"
    for own in (f"{tmp_path}/ours", f"{tmp_path}/theirs/../ours/", f"{tmp_path}/ours@20"):
        assert line(own).startswith(f"config.init_from={own}: is this run's own folder (--workdir={tmp_path}/ours)")
    damage(source, 40)
    before = contents(source)
    assert line(f"{source}@40") == f"config.init_from={source}@40: step 40 is damaged; the checkpoints are 20, 40"
    warm = WarmStart(with_fields(THEIRS, init_from=str(source)), epath.Path(tmp_path / "ours"))
    assert warm.ancestry[0]["step"] == 20  # the newest good one
    warm.close()
    damage(source, 20)
    assert line(source) == f"config.init_from={source}: every checkpoint is damaged; the checkpoints are 20, 40"
    assert names(source) == ["20", "40"]
    assert len(contents(source)) == len(before)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("runs/a", Source("runs/a", None)),
        ("runs/a@500", Source("runs/a", 500)),
        ("gs://bucket/a@0", Source("gs://bucket/a", 0)),
        ("me@home/a", Source("me@home/a", None)),
        ("runs/a@3@4", Source("runs/a@3", 4)),
        ("@7", Source("@7", None)),
    ],
)
def test_a_step_is_a_number_behind_the_last_at(text, source):
    assert source_of(text) == source


def test_the_same_bucket_or_folder_is_known_by_any_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for one, other in (("gs://b/x/", "gs://b/x"), (f"{tmp_path}/link", f"{tmp_path}/run")):
        with pytest.raises(UserError, match="is this run's own folder"):
            check_init_from(one, other)
    check_init_from("gs://b/x", "gs://b/y")
    with pytest.raises(UserError, match=r"^config.init_from=s3://b/x: s3:// is not supported"):
        check_init_from("s3://b/x", "gs://b/y")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (dict(init_optimizer=True), "config.init_optimizer=True: is for config.init_from, which is empty"),
        (dict(init_layers=1), "config.init_layers=1: is for config.init_from, which is empty"),
        (dict(init_layers=9, init_from="a"), "config.init_layers=9: must be at most config.model.n_layer=2"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes, line):
    with pytest.raises(UserError, match=f"^{line}"):
        resolve(config_of(with_fields(Settings(), **changes)))


def test_a_run_that_trains_meanwhile_may_delete_what_is_being_read(source, tmp_path, mesh, fresh, monkeypatch):
    """Its newest checkpoint goes while it is verified, and the next one while its arrays are read."""
    verify, restore_params, gone = CheckpointReader._is_good, CheckpointReader.restore_params, []

    def replaced(step, new):
        shutil.copytree(source / f"checkpoints/{step}", source / f"checkpoints/{new}")
        for old in CheckpointReader(source).steps():
            if old < new:
                shutil.rmtree(source / f"checkpoints/{old}")
        gone.append(step)

    def verified(self, step):
        if not gone:
            replaced(step, 50)
        return verify(self, step)

    def restored(self, step, *rest):
        if len(gone) == 1:
            replaced(step, 60)
        return restore_params(self, step, *rest)

    monkeypatch.setattr(CheckpointReader, "_is_good", verified)
    monkeypatch.setattr(CheckpointReader, "restore_params", restored)
    _, (ancestor,) = started(with_fields(THEIRS, init_from=str(source)), tmp_path, mesh)
    assert (gone, ancestor["step"]) == ([40, 50], 60)


@pytest.fixture
def made_up(monkeypatch, fresh):
    """Trainings with a step that is quick to compile."""
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)


def train_made_up(settings, workdir, preemption=None):
    """Trains, and returns the checkpoints' reader."""
    train(settings, epath.Path(workdir), preemption or NoSignals())
    return CheckpointReader(epath.Path(workdir))


@pytest.mark.slow(8)
def test_the_first_start_alone_needs_the_other_run(corpus, tmp_path, made_up, capsys):
    """Stopped at step 7, a run goes on without the other one, whose folder is gone; so does a third one from it."""
    few = with_fields(settings_for(corpus), train=dict(num_steps=12), checkpoint=dict(keep=0))
    train_made_up(few, tmp_path / "a")
    settings = with_fields(few, init_from=f"{tmp_path}/a@5", train=dict(update_len=16))
    with pytest.raises(Preempted, match="saved step 7"):
        train_made_up(settings, tmp_path / "b", AskedAt(7))
    said = capsys.readouterr().err
    assert f"starts from step 5 of {tmp_path}/a: weights and codebooks" in said
    assert names(tmp_path / "b")[0] == "0"  # what it started with is its own
    shutil.rmtree(tmp_path / "a")
    reader = train_made_up(settings, tmp_path / "b")
    said = capsys.readouterr().err
    assert "resumes from step 7" in said
    assert "WARNING: config.init_from" not in said
    once = train_made_up(with_fields(settings, init_from=str(tmp_path / "b")), tmp_path / "c")
    (parent,), (mother, grandmother) = reader.ancestry(12), once.ancestry(12)
    assert (parent["run"], parent["step"], mother["run"], mother["step"]) == (
        *(f"{tmp_path}/a", 5),
        *(f"{tmp_path}/b", 12),
    )
    assert grandmother == parent
    capsys.readouterr()
    inspect(settings, epath.Path(tmp_path / "c"), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ancestor: ")]
    assert [line.split(" fingerprint ")[0] for line in lines] == [
        f"ancestor: {tmp_path}/b step 12",
        f"ancestor: {tmp_path}/a step 5",
    ]
    for init_from, is_another in (("elsewhere", True), (f"{tmp_path}/a@4", True), (f"{tmp_path}/a", False)):
        train_made_up(with_fields(settings, init_from=init_from), tmp_path / "b")
        warned = f"WARNING: config.init_from={init_from}: only applies to the first start" in capsys.readouterr().err
        assert warned == is_another


@pytest.mark.slow(3)
def test_a_run_that_never_saved_is_the_run_that_was_not_stopped(corpus, tmp_path, made_up):
    """It goes back to what it took, not to the seed."""
    few = with_fields(settings_for(corpus), train=dict(num_steps=4))
    train_made_up(few, tmp_path / "a")
    settings = with_fields(few, init_from=str(tmp_path / "a"))
    whole = train_made_up(settings, tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "c/checkpoints/4")
    again = train_made_up(settings, tmp_path / "c")  # from its step 0
    assert again.steps() == whole.steps() == [0, 4]
    mesh = make_mesh(settings.mesh)
    states = [reader.restore(4, first_state(settings, mesh)) for reader in (whole, again)]
    assert sha256_of(states[0]) == sha256_of(states[1])


@pytest.mark.slow(40)
def test_two_processes_start_from_a_run_in_a_bucket_and_go_back_together(
    trained, config_file, server, tmp_path, monkeypatch, capsys
):
    """The real command. Both see the same checkpoint of the other run, and the same step to go back to."""
    files, (theirs, _, _), ours = reached_at(monkeypatch, server), trained, tmp_path / "ours"
    for step in (20, 40):
        (theirs / f"checkpoints/{step}/commit_success.txt").touch()  # as orbax leaves it in a bucket
    files.put(f"{theirs}/", "bucket/theirs", recursive=True)
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)
    flags = [f"--config={config_file}", f"--workdir={ours}", "--config.init_from=gs://bucket/theirs@20"]
    flags += ["--config.train.num_steps=4", "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=0"]
    flags += ["--config.sample.length=0", "--config.eval.at_end=False", "--config.train.update_len=16"]
    for more, expected in (([], ["0", "2", "4"]), (["--step=2"], ["0", "2", "4", "4.undone"])):
        job = local.start(2, 4, [*flags, *more])
        said = [process.communicate(timeout=300)[1].decode() for process in job]
        assert [process.returncode for process in job] == [0, 0], said
        assert names(ours) == expected
    hashes = []
    for workdir, step in ((ours, 0), (theirs, 20), (ours, 4)):
        inspect(resolve(read_run_config(workdir)), epath.Path(workdir), step)
        lines = capsys.readouterr().out.splitlines()
        hashes += [line for line in lines if line.startswith("parameters_sha256")]
        ancestors = [line for line in lines if line.startswith("ancestor: ")]
        assert [line.split(" fingerprint ")[0] for line in ancestors] == (
            ["ancestor: gs://bucket/theirs step 20"] if workdir == ours else []
        )
    assert hashes[0] == hashes[1] != hashes[2]
