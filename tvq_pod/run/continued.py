"""Checks that a run whose token store is missing may continue, before a new store is prepared."""

from etils import epath

from tvq_pod.config.identity import FINGERPRINT, differing, run_record
from tvq_pod.config.settings import Settings
from tvq_pod.data.store import MADE_WITH, RECALL_MADE_WITH, store_path
from tvq_pod.data.train_vocab import TRAINED
from tvq_pod.data.vocab import SentencePieceVocab, load_vocab
from tvq_pod.errors import UserError
from tvq_pod.run import config_history
from tvq_pod.run.step_folders import newest_record

# Settings that determine a store's content; `mixture` takes the store's place.
OF_CORPUS = tuple(f"config.data.{name}" for name in (*MADE_WITH, *RECALL_MADE_WITH, "vocab", "vocab_size", "mixture"))
LATER_KNOWN = ("config.data.vocab", FINGERPRINT)  # entries of the record that are known once there is a store


def check_continues(settings: Settings, workdir: epath.Path) -> None:
    """Checks a run without its store. Raises UserError if there is a checkpoint whose record differs from the settings,
    or if the last start had another corpus. Reads two small files, and writes nothing.

    A model that was imported and has not been trained since may be trained on any corpus."""
    found = newest_record(workdir)
    if found is None:
        return
    step, saved = found
    record = run_record(settings, vocab_name="", fingerprint="")
    known = {name: value for name, value in record.items() if name not in LATER_KNOWN}
    if other := differing(known, saved):
        name, value, made_with = other
        raise UserError(
            f"{name}={value}: the checkpoint {step} was made with {made_with}; give that, or another --workdir"
        )
    if FINGERPRINT not in saved:
        return
    changed = config_history.changes(config_history.last_start(workdir), settings)
    if settings.data.vocab != TRAINED:
        changed.pop("config.data.vocab_size", None)
    may_change = settings.train.on_data_change == "restart_streams"
    if may_change and any(name in changed for name in OF_CORPUS):
        _check_vocab(settings, workdir, step, saved)
    for name in OF_CORPUS if not may_change else ():
        if name in changed:
            before, now = changed[name]
            raise UserError(
                f"{name}={now}: the checkpoint {step} was trained on a corpus with {before}, and there is no store at "
                f"{store_path(settings, workdir)}; give {before}, or the config.data.store of that corpus, or another "
                "--workdir; if it is the same text in another place, run --mode=prepare first; for other text, give "
                "config.train.on_data_change=restart_streams"
            )


def _check_vocab(settings: Settings, workdir: epath.Path, step: epath.Path, saved: dict) -> None:
    """Raises UserError if other data would have another vocabulary. step, saved: the checkpoint and its record."""
    name, has = settings.data.vocab, saved.get("config.data.vocab")
    if name == TRAINED:
        raise UserError(
            f"config.data.vocab={name}: would be trained again on the other data, and the checkpoint {step} has the "
            f"vocabulary {has}; give its file, {workdir / SentencePieceVocab.file_name}"
        )
    if has not in (None, load_vocab(name).name):
        raise UserError(f"config.data.vocab={name}: the checkpoint {step} was made with {has}; give that")
