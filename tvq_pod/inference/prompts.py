"""Prompts from the command line, a text file, or JSON lines."""

import dataclasses
import json
import pathlib
from typing import Any

from tvq_pod.errors import UserError

RESULT = ("index", "sample", "text", "tokens", "ended_by", "logprobs")  # fields that a sample's line adds


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The beginning of a document: its text, in bytes; and the fields of its line, including the prompt itself."""

    text: bytes
    fields: dict[str, Any]


def given_prompt(text: bytes) -> Prompt:
    """Makes a prompt that does not come from JSON lines. Bytes that are not UTF-8 become U+FFFD in its fields."""
    return Prompt(text, dict(prompt=text.decode("utf-8", errors="replace")))


def is_json_lines(path: str | None) -> bool:
    """Whether a file has JSON lines, by its name."""
    return path is not None and path.lower().endswith(".jsonl")


def read_prompts(path: str) -> list[Prompt]:
    """Reads the prompts of a file: one from each line of FILE.jsonl that is not blank; from any other file, its text.

    Raises UserError if the file can't be read, or if a line is not a JSON object with a text prompt, or has a field of
    RESULT.
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
        json.dumps(fields, allow_nan=False)  # it will be written again, and Python reads NaN, which is not JSON
    except (ValueError, RecursionError) as error:
        raise UserError(f'{here} is not JSON ({error}); each must be an object, as {{"prompt": "..."}}') from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f'{here} has no text prompt; each must be an object, as {{"prompt": "..."}}')
    if taken := [name for name in RESULT if name in fields]:
        raise UserError(f"{here} has the field {taken[0]}, which the result has, too; rename it")
    try:
        return Prompt(fields["prompt"].encode(), fields)
    except UnicodeEncodeError:
        raise UserError(f"{here} has a prompt with half of a surrogate pair, which is not text; remove it") from None


def to_json(prompts: list[Prompt]) -> str:
    """Encodes prompts as text, for other processes."""
    return json.dumps([[prompt.text.decode("latin-1"), prompt.fields] for prompt in prompts])


def from_json(text: str) -> list[Prompt]:
    """Decodes the prompts in a text of `to_json`."""
    return [Prompt(prompt.encode("latin-1"), fields) for prompt, fields in json.loads(text)]
