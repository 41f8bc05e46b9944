"""What a start of a run leaves behind before its first step: its settings, its vocabulary, the packages it uses."""

from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.data.vocab import Vocab, keep_vocab
from tvq_pod.run import config_history, packages


def record_start(workdir: epath.Path, settings: Settings, vocab: Vocab, step: int, rate: config_history.Rate) -> None:
    """Says what has changed since the last start, and keeps it. On process 0, once nothing can be refused any more.

    step: that the run goes on from; 0: it begins. rate: see `config_history.tell`.
    """
    config_history.tell(workdir, settings, step, rate)
    if step < settings.train.num_steps or not (workdir / "config.json").exists():
        keep_vocab(vocab, workdir)
        config_history.keep(workdir, settings, step)
        packages.record(workdir, step)
