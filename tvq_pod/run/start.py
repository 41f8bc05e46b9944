"""The files that a start of a run writes before its first step: its settings, its vocabulary, the packages it uses."""

from etils import epath

from tvq_pod.config import mixture_schedule
from tvq_pod.config.context_schedule import in_words
from tvq_pod.config.settings import Settings
from tvq_pod.data.vocab import Vocab, keep_vocab
from tvq_pod.host.terminal import say
from tvq_pod.run import config_history, packages


def record_start(workdir: epath.Path, settings: Settings, vocab: Vocab, step: int, rate: config_history.Rate) -> None:
    """Prints and records what has changed since the last start, and prints which stages of the schedules of contexts
    and of the mixture hold. Call it on process 0, once the run can no longer be refused.

    step: the step that the run resumes from; 0: it begins. rate: see `config_history.tell`.
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
