"""--mode=prepare: making a token store from a corpus. Training does the same when its store does not exist.

--mode=train_vocab: training only the SentencePiece model, with config.data.vocab=sentencepiece; prepare does the same
if there is none.
"""

from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.data.append import append
from tvq_pod.data.beam import Beam
from tvq_pod.data.open import check_source, describe, open_store
from tvq_pod.data.place import only_one
from tvq_pod.data.store import TokenStore, store_path
from tvq_pod.data.train_vocab import TRAINED, trained_path, vocab_for
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.parallel.processes import on_process_zero


def prepare(settings: Settings, workdir: epath.Path, appends: bool = False, beam: Beam | None = None) -> None:
    """Makes the token store, or says that it already exists. appends: adds new files to the existing store. beam: the
    workers that write the parts; None: processes of this machine."""
    path = store_path(settings, workdir)
    if beam:
        beam.check(settings, workdir)
    if appends:
        on_process_zero(lambda: describe(append(settings, workdir, beam)))
        return
    if TokenStore.exists(path):
        say(f"{path} exists already")
    on_process_zero(lambda: _make(settings, workdir, beam))


def _make(settings: Settings, workdir: epath.Path, beam: Beam | None) -> None:
    store = open_store(settings, workdir, beam=beam)
    describe(store)
    splits = store.meta["splits"]
    if splits["train"]["n_documents"] and not splits["validation"]["n_documents"]:
        share = settings.data.validation_share
        say(
            f"WARNING: config.data.validation_share={share:g}: no document fell into the validation split, so training "
            "would evaluate nothing; give more documents, or a larger share and another config.data.store"
        )


def train_vocab(settings: Settings, workdir: epath.Path) -> None:
    """Trains the vocabulary, or says that it already exists. Raises UserError if the config has another one."""
    if settings.data.vocab != TRAINED:
        raise UserError(f"config.data.vocab={settings.data.vocab}: must be {TRAINED} for --mode=train_vocab")
    path = trained_path(settings, workdir)
    if path.exists():
        say(f"{path} exists already")
    else:
        check_source(settings, workdir)
    with only_one(store_path(settings, workdir)):
        vocab_for(settings, workdir)
