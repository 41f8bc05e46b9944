"""docs/train_and_sample.ipynb: it runs as it is, and what is committed below its cells came from a run."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.command import ROOT, environment

PATH = ROOT / "docs/train_and_sample.ipynb"
SMALL = """
model = dict(d_model=16, d_k=8, d_v=16, n_code=8, n_layer=1, block_len=8, mem_len=8, head_type="mqa")
train = dict(batch_size=8, update_len=32, log_every_steps=5)
overrides = [f"--config.model.{name}={value}" for name, value in model.items()]
overrides += [f"--config.train.{name}={value}" for name, value in train.items()]
overrides += ["--config.data.validation_share=0.2", "--config.eval.batch_size=8", "--config.sample.length=8"]
"""


def texts(cell) -> str:
    """All that a cell shows below it."""
    found = []
    for output in cell.get("outputs", []):
        found.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(found)


def test_the_outputs_are_those_of_one_run_from_top_to_bottom_and_name_no_machine():
    book = nbformat.read(PATH, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    trained, looked, sampled, scored = map(texts, cells[1:])
    assert '"state": "done"' in trained or "result: " in trained
    assert any("image/png" in output.get("data", {}) for output in cells[2].outputs), looked
    assert sampled.startswith("def ")
    assert scored.count(" bits per byte: ") == 2
    everything = json.dumps([cell.outputs for cell in cells])
    assert not re.findall(r"/(?:home|root|tmp|work|usr|opt|Users)/[^\s\"]*", everything)
    assert "WARNING" not in everything


@pytest.mark.slow(40)
def test_it_runs(monkeypatch, tmp_path, corpus):
    """With a smaller model, on other text, by the cell that is there to be changed."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(PATH, as_version=4)
    (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    settings.source += f"\nsteps = 10\n{SMALL}overrides.append('--source={corpus}')\n"
    NotebookClient(book, timeout=300, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    trained, _, sampled, scored = (texts(cell) for cell in book.cells if cell.cell_type == "code" and cell.outputs)
    assert "result: " in trained
    assert (tmp_path / "runs/notebook/checkpoints").is_dir()
    assert sampled.startswith("def ")
    assert len(re.findall(r"^\d+\.\d\d bits per byte: ", scored, re.MULTILINE)) == 2
