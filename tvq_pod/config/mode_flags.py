"""Which flags belong to which modes. A flag that a mode would ignore is refused, so that nobody relies on it."""

from collections.abc import Iterable

from tvq_pod.errors import UserError

MODES_OF = {  # by flag; all other flags are for every mode
    "append": ("prepare",),
    "runner": ("prepare",),
    "beam_options": ("prepare",),
    "split": ("eval",),
    "per_document": ("eval",),
    "suite": ("eval",),
    "step": ("train", "eval", "lm_eval", "sample", "inspect", "export"),
    "prompt": ("sample",),
    "prompt_file": ("sample",),
    "output": ("sample",),
    "tasks": ("lm_eval",),
    "num_fewshot": ("lm_eval",),
    "limit": ("lm_eval",),
    "max_length": ("lm_eval",),
    "topology": ("plan",),
    "slices": ("plan",),
    "tokens": ("plan",),
    "sweep": ("plan",),
    "against": ("bench",),
    "lengths": ("bench",),
    "rounds": ("bench",),
    "profiler_port": ("train", "eval", "sample"),
    "to": ("export",),
    "dtype": ("export",),
    "from": ("import",),
}


def check_flags(mode: str, given: Iterable[str]) -> None:
    """Raises UserError if a flag was given that is for other modes, or for another evaluation.

    given: names of flags on the command line.
    """
    given = list(given)
    for name in ("split", "per_document"):
        if "suite" in given and name in given:
            raise UserError(f"--{name}: is about documents of the store; leave it out with --suite")
    for name in given:
        if mode in MODES_OF.get(name, (mode,)):
            continue
        modes = " or ".join(f"--mode={mode}" for mode in MODES_OF[name])
        raise UserError(f"--{name}: is for {modes}; leave it out with --mode={mode}")
