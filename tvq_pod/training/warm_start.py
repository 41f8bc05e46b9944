"""A warm start (config.init_from): the first state of a run, with the weights and codebooks of another run.

Everything else is fresh: step 0, streams that have read nothing, the optimizer (unless config.init_optimizer is set),
the statistics of bad steps, the digest. The weights are those after the other run's step, never their moving average:
that is for evaluations, and no step ever started from it. The run's own average (config.train.ema_decay) starts at
these weights.

The other run's folder is only read, and it may still be training. What was taken is the first entry of `ancestry` in
the record of every checkpoint of this run, followed by the other run's own ancestry:

    run             its folder
    step            the step of the checkpoint
    fingerprint     of the checkpoint's files: 8 hexadecimal digits, from its manifest
    corpus          fingerprint of the data that it was trained on; "" if it was imported and not trained since
    layers          the number of its layers that were taken
    optimizer       whether the optimizer's state was taken

The entry of an imported model (--mode=import) has the folder that it was imported from as `run`, the step and corpus
that it was exported from, and no fingerprint.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from etils import epath

from tvq_pod.config.identity import FINGERPRINT, OPTIMIZER_STATE, STATE_VERSIONS, differing, warm_start_record
from tvq_pod.config.init_from import NAME, check_init_from, source_of
from tvq_pod.config.settings import Settings
from tvq_pod.data.store import TokenStore, store_path
from tvq_pod.data.train_vocab import TRAINED
from tvq_pod.data.vocab import load_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.paths import check_reached, is_bucket
from tvq_pod.host.terminal import say
from tvq_pod.nn.model import is_stacked
from tvq_pod.parallel.processes import all_agree, decided_by_process_zero
from tvq_pod.run import manifest
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.step_folders import StepFolders
from tvq_pod.training import ema
from tvq_pod.training.optimizer import with_schedule_of
from tvq_pod.training.step import TrainState, abstract_train_state, create_train_state

TRIES = 3  # to read the newest checkpoint of a run that is training and may delete it meanwhile
T = TypeVar("T")
VOCAB = "config.data.vocab"
LAYERS = "config.model.n_layer"
OPTIMIZER = "config.optimizer.name"


class WarmStart:
    """The checkpoint of another run that this one starts from. All processes call the same methods in the same order.

    Attribute: ancestry: see above.
    """

    def __init__(self, settings: Settings, workdir: epath.Path):
        """Finds the checkpoint, verifies it, and compares its record with the settings. Writes nothing.

        Raises UserError if it does not exist, is damaged, or does not fit this run.
        """
        check_init_from(settings.init_from, str(workdir))
        source = source_of(settings.init_from)
        check_reached(NAME, source.workdir)
        self._settings, self._here, self._asked = settings, f"{NAME}={settings.init_from}", source.step
        self._vocab_name = _vocab_name(settings, workdir)
        self._reader = CheckpointReader(
            source.workdir, settings.checkpoint.restore_timeout_seconds, given_by=self._here
        )
        self._tried(self._pick)

    @staticmethod
    def of(settings: Settings, workdir: epath.Path) -> "WarmStart | None":
        """Returns the warm start of a run that has no checkpoint of its own yet; None for any other run. Raises
        UserError."""
        if not settings.init_from:
            return None
        if decided_by_process_zero(bool(StepFolders(workdir / "checkpoints").steps())):
            return None
        return WarmStart(settings, workdir)

    def close(self) -> None:
        """Ends the threads that read checkpoints."""
        self._reader.close()

    def state(self, mesh: jax.sharding.Mesh) -> TrainState:
        """Returns the first state of the run, on the mesh. Raises UserError if the checkpoint can't be read."""
        fresh = create_train_state(self._settings, mesh)
        if self._is_all:
            for array in jax.tree.leaves((fresh.params, fresh.ema)):
                array.delete()  # before their replacements are read
        state = self._tried(lambda: self._taken(fresh, mesh), again=self._pick)
        what = "weights, codebooks and optimizer" if self._settings.init_optimizer else "weights and codebooks"
        layers = f" of its first {self._n_taken} layers" if self._settings.init_layers else ""
        say(f"starts from step {self._step} of {self._reader.path.parent}: {what}{layers}")
        return state

    @property
    def _is_all(self) -> bool:
        """True if both models have equally many layers, and all of them are taken."""
        return self._n_taken == self._n_source == self._settings.model.n_layer

    def check_vocab(self, vocab_name: str) -> None:
        """Raises UserError if the run's vocabulary, which is known by now, is not the other run's."""
        self._vocab_name = vocab_name
        self._check()

    def _tried(self, read: Callable[[], T], again: Callable[[], object] = lambda: None) -> T:
        """Returns what `read` returns. The other run may be training and delete the checkpoint during the read: then
        calls `again` and retries. Raises UserError on all processes if it fails on one."""
        error = None
        for n_left in reversed(range(TRIES)):
            there = self._reader.steps_of_process_zero()
            error, found = None, []
            try:
                found.append(read())
            except UserError as raised:
                error = raised
            if all_agree(error is None):
                return found[0]
            changed = decided_by_process_zero(self._reader.steps() != there)
            if not n_left or not changed or self._asked is not None:
                break
            self._tried(again)
        raise error or UserError(f"{self._here}: another process could not read it; its own line says why")

    def _pick(self) -> None:
        """Finds the checkpoint, and checks that it fits."""
        self._step = self._reader.pick(self._asked)
        self._record = self._reader.record(self._step)
        self._check()
        self.ancestry = [
            ancestor(
                str(self._reader.path.parent),
                self._step,
                self._fingerprint(),
                self._record.get(FINGERPRINT, ""),
                self._n_taken,
                self._settings.init_optimizer,
            ),
            *self._record.get("ancestry", []),
        ]

    def _fingerprint(self) -> str:
        try:
            return manifest.fingerprint(self._reader.path / str(self._step))
        except OSError as error:
            raise UserError(f"{self._here}: step {self._step} can't be read ({error}); start again") from None

    def _check(self) -> None:
        settings, saved = self._settings, self._record
        has = f"step {self._step} of {self._here}"
        record = warm_start_record(settings, self._vocab_name)
        if not self._vocab_name:
            del record[VOCAB]
        if other := differing(record, saved):
            name, value, made_with = other
            remedy = "give that run's vocabulary" if name == VOCAB else "give that"
            raise UserError(f"{name}={value}: {has} was made with {made_with}; {remedy}, or another {NAME}")
        self._check_layers(has)
        if settings.init_optimizer:
            self._check_optimizer(has)

    def _check_layers(self, has: str) -> None:
        settings, own = self._settings, self._settings.model.n_layer
        self._n_source = n_source = int(self._record[LAYERS])
        self._n_taken = settings.init_layers or n_source
        if settings.init_layers > n_source:
            raise UserError(
                f"config.init_layers={settings.init_layers}: {has} has {n_source} layers; give at most that"
            )
        if not settings.init_layers and n_source != own:
            few = min(n_source, own)
            others = "" if few == own else ", and draw the others from the seed"
            raise UserError(
                f"{LAYERS}={own}: {has} has {n_source} layers; give {n_source}, or config.init_layers={few} to take "
                f"its first {few}{others}"
            )

    def _check_optimizer(self, has: str) -> None:
        name, there = self._settings.optimizer.name, self._record.get(OPTIMIZER, "no optimizer")
        given = f"config.init_optimizer=True: {has} has the state of"
        if there != name:
            raise UserError(f"{given} {there}, but {OPTIMIZER}={name}; give that, or leave it out")
        if self._record.get(OPTIMIZER_STATE, "1") != STATE_VERSIONS[name]:
            raise UserError(f"{given} {name} in a form that this version does not read; leave it out")
        if not self._is_all:
            raise UserError(f"{given} all {self._n_source} layers, but only {self._n_taken} are taken; leave it out")

    def _taken(self, fresh: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
        """Returns the seed's state with what is taken from the checkpoint. Raises UserError."""
        model = self._settings.model.replace(n_layer=self._n_source)
        theirs = abstract_train_state(dataclasses.replace(self._settings, model=model, init_layers=0), mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(self._settings, mesh))
        opt_state = fresh.opt_state
        if self._settings.init_optimizer:
            params, opt_state = self._reader.restore_weights_and_optimizer(self._step, theirs)
            opt_state = with_schedule_of(fresh.opt_state, opt_state)
        else:
            params = self._reader.restore_params(self._step, theirs.params)
        if not self._is_all:
            join = jax.jit(first_layers, static_argnums=2, out_shardings=shardings.params)
            params = join(params, fresh.params, self._n_taken)
        average = None
        if fresh.ema is not None:
            average = jax.jit(ema.start, out_shardings=shardings.ema)(params)
        return fresh.replace(params=params, opt_state=opt_state, ema=average)


def first_layers(theirs: dict, fresh: dict, n: int) -> dict:
    """Returns the parameters of `theirs`, but only its first n layers; the layers after them are from `fresh`."""

    def joined(path, their, own):
        return jnp.concatenate([their[:n], own[n:]]) if is_stacked(path) else their

    return jax.tree_util.tree_map_with_path(joined, theirs, fresh)


def _vocab_name(settings: Settings, workdir: epath.Path) -> str:
    """Returns the name of the run's vocabulary; "" if it is not known before there is a store.

    Raises UserError for a vocabulary that is still to be trained, which would differ from that of the weights.
    """
    if settings.data.mixture:
        return ""
    path = store_path(settings, workdir)
    if TokenStore.exists(path):
        with contextlib.suppress(UserError):  # a damaged store is reported when it is opened
            return TokenStore(path).vocab_name
        return ""
    if settings.data.vocab == TRAINED:
        raise UserError(
            f"{VOCAB}={TRAINED}: would be trained again, but the weights of {NAME}={settings.init_from} belong to that "
            f"run's vocabulary; give that run's {VOCAB}, or the file vocab.model in its folder"
        )
    return load_vocab(settings.data.vocab).name


def ancestor(run: str, step: int, fingerprint: str, corpus: str, layers: int, optimizer: bool = False) -> dict:
    """Returns an entry of `ancestry`; see above."""
    return dict(run=run, step=step, fingerprint=fingerprint, corpus=corpus, layers=layers, optimizer=optimizer)


def ancestor_line(entry: dict) -> str:
    """Returns an entry of `ancestry` as one line to print."""
    fingerprint = f" fingerprint {entry['fingerprint']}" if entry["fingerprint"] else ""
    corpus = f" corpus {entry['corpus'][:16]}" if entry["corpus"] else ""
    optimizer = " and the optimizer" if entry["optimizer"] else ""
    return f"ancestor: {entry['run']} step {entry['step']}{fingerprint}{corpus}: {entry['layers']} layers{optimizer}"


def ignored(settings: Settings, checkpoints: CheckpointReader, step: int) -> str:
    """Returns a warning if a run that resumes from `step` is asked to start from a run that it did not start from;
    otherwise ""."""
    if not settings.init_from:
        return ""
    source, ancestry = source_of(settings.init_from), checkpoints.ancestry(step)
    folder = source.workdir if is_bucket(source.workdir) else os.path.abspath(source.workdir)
    if ancestry and ancestry[0]["run"] == str(epath.Path(folder)) and source.step in (None, ancestry[0]["step"]):
        return ""
    return (
        f"{NAME}={settings.init_from}: only applies to the first start, but this run resumes from its own step {step}; "
        "give another --workdir to start from there"
    )
