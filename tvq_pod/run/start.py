"""What a start of a run leaves behind before its first step: its settings, its vocabulary, the packages it uses."""

from etils import epath

from tvq_pod.config import mixture_schedule
from tvq_pod.config.context_schedule import in_words
from tvq_pod.config.settings import Settings
from tvq_pod.data.vocab import Vocab, keep_vocab
from tvq_pod.host.terminal import say
from tvq_pod.run import config_history, packages


def record_start(workdir: epath.Path, settings: Settings, vocab: Vocab, step: int, rate: config_history.Rate) -> None:
    """Says what has changed since the last start, and keeps it; and says which stages of the schedules of contexts and
    of the mixture hold. On process 0, once nothing can be refused any more.

    step: that the run resumes from; 0: it begins. rate: see `config_history.tell`.
    """
    config_history.tell(workdir, settings, step, rate)
    is_done = step >= settings.train.num_steps
    lines = in_words(settings.train.context_schedule, step), mixture_schedule.in_words(settings.data, step)
    for line in lines if not is_done else ():
        if line:
            say(line)
    if not is_done or not (workdir / "config.json").exists():
        keep_vocab(vocab, workdir)
        config_history.keep(workdir, settings, step)
        packages.record(workdir, step)
