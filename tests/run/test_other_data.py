"""A run that resumes with other data: refused by name, or streams of that data from there on, known to its checkpoints.

Trainings have a step that is quick to compile. Digests are computed here from the streams that should be read.
"""

import dataclasses
import shutil

import jax
import pytest
from etils import epath

from tests.command import contents
from tests.made_up import first_state, made_up_step
from tests.training.test_bad_steps import NoSignals, settings_for
from tvq_pod.data import digest
from tvq_pod.data.loader import Feed
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.run_streams import streams_of
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.store import TokenStore
from tvq_pod.errors import UserError
from tvq_pod.modes import train as train_module
from tvq_pod.modes.train import train
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.metrics import lines_of
from tvq_pod.training import restore

B, T, SEED = 8, 8, 0


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)


def settings_of(source, num_steps, on_data_change="refuse", **data):
    settings = settings_for(source)
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, **data),
        train=dataclasses.replace(settings.train, num_steps=num_steps, on_data_change=on_data_change),
    )


def trained(settings, workdir):
    """The digest of each step's line."""
    train(settings, epath.Path(workdir), NoSignals())
    return {step: line["digest"] for step, line in lines_of(epath.Path(workdir), "train").items()}


def digest_of(settings, *stretches):
    """By hand. stretches: (store, data schedule, first update, last update + 1), in the order of reading."""
    value, roll, mesh = digest.start(), jax.jit(digest.roll), make_mesh(settings.mesh)
    for store, schedule, first, last in stretches:
        split = store.split("train")
        streams = streams_of(schedule, split, SEED)
        for batch in Feed(split, streams, mesh, B, T, 1, 1).batches(first, last):
            value = roll(value, batch)
    return digest.as_text(value)


@pytest.fixture
def other(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.txt").write_text(f"something else, number {n}. " * (3 + n % 5))
    return folder


def test_a_run_goes_on_with_another_store(corpus, other, tmp_path, capsys):
    workdir, store = tmp_path / "run", str(tmp_path / "stores/other")
    trained(settings_of(corpus, 5), workdir)
    before = contents(workdir)
    changed = settings_of(other, 9, store=store)
    with pytest.raises(UserError, match=r"config.data.source=.*or another --workdir;.*on_data_change=restart_streams$"):
        trained(changed, workdir)  # there is no such store yet
    assert contents(workdir) == before
    assert not (tmp_path / "stores").exists()
    shutil.copytree(workdir, tmp_path / "copy")
    allowed = settings_of(other, 9, "restart_streams", store=store)
    found = trained(allowed, workdir)
    assert "streams start over at step 5" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^config.data.store, fingerprint=.*or config.train.on_data_change=restart_"):
        trained(changed, tmp_path / "copy")  # there is one now
    both = TokenStore(workdir / "store"), TokenStore(store)
    begun = DataSchedule.begin(B, T)
    of_other = begun.changed(5, B, T, data=both[1].fingerprint)
    assert found[9] == digest_of(allowed, (both[0], begun, 0, 5), (both[1], of_other, 0, 4))
    reader = CheckpointReader(workdir)
    assert reader.schedule(9) == of_other
    # From now on that is its data: a start that refuses changes goes on in the same streams.
    found = trained(settings_of(other, 12, store=store), workdir)
    assert found[12] == digest_of(allowed, (both[0], begun, 0, 5), (both[1], of_other, 0, 7))
    assert reader.schedule(12) == of_other


@pytest.mark.slow(5)
def test_weights_of_a_mixture_change_at_their_steps_in_a_run_that_is_resumed_too(corpus, other, tmp_path, capsys):
    stores = [tmp_path / f"{name}/store" for name in "ab"]
    for path, source in zip(stores, (corpus, other), strict=True):
        trained(settings_of(source, 1), path.parent)
    text, schedule = f"{stores[0]}=3,{stores[1]}=1", "4:0/1,10:1/1"
    mixed = settings_of("", 12, mixture=text, mixture_schedule=schedule)
    capsys.readouterr()
    alone = trained(mixed, tmp_path / "alone")
    assert "mixture: weights 0/1 from step 4 on, 0.5/0.5 from step 10 on" in capsys.readouterr().err
    shutil.copytree(tmp_path / "alone", tmp_path / "resumed")
    for step in (10, 12):
        shutil.rmtree(tmp_path / f"resumed/checkpoints/{step}")
    assert trained(mixed, tmp_path / "resumed") == alone
    store = Mixture.open(text, schedule)
    assert alone[12] == digest_of(mixed, (store, DataSchedule.begin(B, T), 0, 12))
    other_weights = settings_of("", 14, mixture=text, mixture_schedule="13:1/1")
    with pytest.raises(UserError, match=r"^config.data.store, fingerprint=.*or config.train.on_data_change=restart_"):
        trained(other_weights, tmp_path / "alone")
