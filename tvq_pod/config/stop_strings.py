"""Stop strings, as written in config.sample.stop."""

import re

from tvq_pod.errors import UserError

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
SEPARATOR = r"\,"


def stop_strings(spelled: str) -> tuple[str, ...]:
    r"""The strings in a setting's text: `\,` separates two of them, `\n` is a newline, `\t` a tab and `\\` a backslash.
    () for an empty text. Raises UserError for another escape, and for an empty string among several."""
    if not spelled:
        return ()
    here, strings = f"config.sample.stop={spelled}", [""]
    parts: list[str] = re.findall(r"\\.|\\$|[^\\]+", spelled, re.DOTALL)
    for part in parts:
        if part == SEPARATOR:
            strings.append("")
        elif part.startswith("\\") and part not in ESCAPES:
            known = ", ".join([*ESCAPES, SEPARATOR])
            raise UserError(f"{here}: {part} is not an escape; the escapes are {known}")
        else:
            strings[-1] += ESCAPES.get(part, part)
    if "" in strings:
        raise UserError(f"{here}: has an empty stop string; leave out the {SEPARATOR} next to it")
    return tuple(strings)
