"""A prepare in which kill -9 strikes at a given moment. The command line: PREPARE or APPEND, SOURCE, STORE, and before
how many calls it lives; then it tells how many there were in all."""

import os
import signal
import sys

from etils import epath

from tests.data.texts import settings_for
from tvq_pod.data import build_parts, cut, part, part_workers, writer
from tvq_pod.data.append import append
from tvq_pod.data.open import open_store

CALLS = (  # where a prepare may be broken off: between any two of these
    (build_parts, "write_whole"),  # the index, and what says that a folder is ours
    (build_parts, "keep_vocab"),
    (part_workers, "count_lines"),
    (part, "write_batch"),
    (writer, "write_whole"),  # a part's store.json and files.json
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (epath.Path(".").__class__, "unlink"),
)


def main(mode: str, source: str, store: str, n_calls: int) -> None:
    called = 0

    def counted(function):
        def call(*given, **more):
            nonlocal called
            called += 1
            if called == n_calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **more)

        return call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))
    cut.PART_BYTES = 1500
    settings = settings_for(source, store=store, prepare_processes=1, format="lines")
    work = dict(prepare=open_store, append=append)[mode]
    work(settings, epath.Path(f"{store}.run"))
    print(called)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
