"""--mode=prepare: a corpus becomes a token store. Training does the same when its store does not exist.

--mode=train_vocab: only trains the SentencePiece model, where config.data.vocab=sentencepiece; prepare does the same
when there is none.
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
    """Makes the token store, or says that it is there. appends: adds new files to the store that is there. beam: whose
    workers write the parts; None: processes of this machine."""
    path = store_path(settings, workdir)
    if beam:
        beam.check(settings, workdir)
    if appends:
        on_process_zero(lambda: describe(append(settings, workdir, beam)))
        return
    if TokenStore.exists(path):
        say(f"{path} is there already")
    on_process_zero(lambda: describe(open_store(settings, workdir, beam=beam)))


def train_vocab(settings: Settings, workdir: epath.Path) -> None:
    """Trains the vocabulary, or says that it is there. Raises UserError if the config has another one."""
    if settings.data.vocab != TRAINED:
        raise UserError(f"config.data.vocab={settings.data.vocab}: must be {TRAINED} for --mode=train_vocab")
    path = trained_path(settings, workdir)
    if path.exists():
        say(f"{path} is there already")
    else:
        check_source(settings, workdir)
    with only_one(store_path(settings, workdir)):
        vocab_for(settings, workdir)
