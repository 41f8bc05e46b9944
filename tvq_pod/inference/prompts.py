"""Prompts, of the command line, of a text file, or of JSON lines."""

import dataclasses
import json
import pathlib
from typing import Any

from tvq_pod.errors import UserError

RESULT = ("index", "sample", "text", "tokens", "ended_by", "logprobs")  # what a line of a sample has besides


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a document begins with: text, in bytes; and the fields of its line, with the prompt itself."""

    text: bytes
    fields: dict[str, Any]


def given_prompt(text: bytes) -> Prompt:
    """A prompt that is not of JSON lines. Bytes that are not UTF-8 become U+FFFD in its fields."""
    return Prompt(text, dict(prompt=text.decode("utf-8", errors="replace")))


def is_json_lines(path: str | None) -> bool:
    """Whether a file's name says that it has JSON lines."""
    return path is not None and path.lower().endswith(".jsonl")


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: of FILE.jsonl, one of each line that is not blank; of any other file, its text.

    Raises UserError if the file can't be read, and if a line is not a JSON object with a prompt that is text, or has a
    field of RESULT.
    """
    here = f"--prompt_file={path}"
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{here}: can't be read ({error.strerror})") from None
    if not is_json_lines(path):
        return [given_prompt(content)]
    lines = enumerate(content.split(b"\n"), 1)
    prompts = [_prompt_of(line, f"{here}: line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{here}: has no line with a prompt")
    return prompts


def _prompt_of(line: bytes, here: str) -> Prompt:
    try:
        fields = json.loads(line)
        json.dumps(fields, allow_nan=False)  # it is written again, and Python reads NaN, which is not JSON
    except (ValueError, RecursionError) as error:
        raise UserError(f'{here} is not JSON ({error}); each must be an object, as {{"prompt": "..."}}') from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f'{here} has no prompt that is text; each must be an object, as {{"prompt": "..."}}')
    if taken := [name for name in RESULT if name in fields]:
        raise UserError(f"{here} has the field {taken[0]}, which the result has, too; rename it")
    try:
        return Prompt(fields["prompt"].encode(), fields)
    except UnicodeEncodeError:
        raise UserError(f"{here} has a prompt with half of a surrogate pair, which is not text; remove it") from None


def to_json(prompts: list[Prompt]) -> str:
    """Prompts as text, for other processes."""
    return json.dumps([[prompt.text.decode("latin-1"), prompt.fields] for prompt in prompts])


def from_json(text: str) -> list[Prompt]:
    """What `to_json` had."""
    return [Prompt(prompt.encode("latin-1"), fields) for prompt, fields in json.loads(text)]
