"""config.init_from: the run and the checkpoint that another run takes its first weights from.

    runs/a        the newest good checkpoint of the run in runs/a
    runs/a@500    its checkpoint of step 500

training/warm_start.py says what is taken, and what must match.
"""

import os
import re
from typing import NamedTuple

from tvq_pod.errors import UserError
from tvq_pod.host.paths import check_path, is_bucket

NAME = "config.init_from"


class Source(NamedTuple):
    """A run to start from."""

    workdir: str
    step: int | None  # the checkpoint's; None: the newest


def source_of(text: str) -> Source:
    """The run that the setting names. The text after an @ is a step if it is a number, and otherwise part of the
    name."""
    found = re.fullmatch("(.+)@([0-9]{1,18})", text, re.DOTALL)
    return Source(found[1], int(found[2])) if found else Source(text, None)


def check_init_from(text: str, workdir: str) -> None:
    """Raises UserError if the setting names no path, or the run's own folder. Looks at the text, and follows links."""
    source = source_of(text)
    check_path(NAME, source.workdir)
    if _same(source.workdir, workdir):
        back = f"--step={source.step} goes back" if source.step is not None else "a run resumes by itself"
        raise UserError(f"{NAME}={text}: is this run's own folder (--workdir={workdir}); leave it out: {back}")


def _same(one: str, other: str) -> bool:
    if is_bucket(one) or is_bucket(other):
        return re.sub("/+", "/", one).rstrip("/") == re.sub("/+", "/", other).rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)
