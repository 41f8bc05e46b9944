"""Prompts in files: JSON lines, and text."""

import json

import pytest

from tvq_pod.errors import UserError
from tvq_pod.inference.prompts import from_json, given_prompt, read_prompts, to_json


def test_each_line_is_a_prompt_with_its_own_fields(tmp_path):
    rows = [dict(prompt="a\nb"), dict(id=7, prompt="ä", more=[1, None])]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps(rows[0]), "", json.dumps(rows[1], ensure_ascii=False)]), encoding="utf-8")
    prompts = read_prompts(str(path))
    assert [prompt.text for prompt in prompts] == [b"a\nb", "ä".encode()]
    assert [prompt.fields for prompt in prompts] == rows
    assert from_json(to_json(prompts)) == prompts


def test_another_file_is_one_prompt_of_any_bytes(tmp_path):
    (tmp_path / "x.txt").write_bytes(b'{"prompt": 1}\n\xff')
    (prompt,) = read_prompts(str(tmp_path / "x.txt"))
    assert prompt == given_prompt(b'{"prompt": 1}\n\xff')
    assert from_json(to_json([prompt])) == [prompt]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no line with a prompt"),
        (b"\n \n", "has no line with a prompt"),
        (b'{"prompt": "a"}\nplain text\n', "line 2 is not JSON (Expecting value"),
        (b'{"prompt": "a"}\n{"prompt": "b"', "line 2 is not JSON ("),
        (b'{"prompt": "\xff"}', "line 1 is not JSON ("),
        (b"[" * 100_000, "line 1 is not JSON ("),
        (b'{"prompt": "a"}\n\n{"text": "b"}', 'line 3 has no text prompt; each must be an object'),
        (b'{"prompt": 5}', "line 1 has no text prompt"),
        (b'{"prompt": "a", "score": NaN}', "line 1 is not JSON (Out of range float values"),
        (b'{"prompt": "a", "score": [1e999]}', "line 1 is not JSON (Out of range float values"),
        (b'["prompt"]', "line 1 has no text prompt"),
        (b'{"prompt": "a", "tokens": 5}', "line 1 has the field tokens, which the result has, too"),
        (rb'{"prompt": "\ud800"}', "line 1 has a prompt with half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_have_prompts_is_refused_by_its_line(content, message, tmp_path):
    path = tmp_path / "x.JSONL"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(path))
    assert str(error.value).startswith(f"--prompt_file={path}: {message}")
    assert "\n" not in str(error.value)


def test_a_file_that_can_not_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        read_prompts(str(tmp_path))
