"""A run that continues without its store is refused before a new one is made, if that can't be the same."""

import dataclasses
import json

import pytest

from tvq_pod.config.identity import run_record
from tvq_pod.config.settings import DataSettings, Settings
from tvq_pod.errors import UserError
from tvq_pod.run import config_history
from tvq_pod.run.continued import check_continues

SETTINGS = Settings(data=DataSettings(source="a.jsonl", store="stores/a"))


@pytest.fixture
def workdir(tmp_path):
    """A run with checkpoints of steps 9 and 10, and no store."""
    config_history.keep(tmp_path, SETTINGS, 0)
    for step in (9, 10):
        (tmp_path / f"checkpoints/{step}/record").mkdir(parents=True)
        record = run_record(SETTINGS, "bytes", f"corpus of {step}")
        (tmp_path / f"checkpoints/{step}/record/metadata").write_text(json.dumps(record))
    return tmp_path


def data(**changes):
    return dataclasses.replace(SETTINGS, data=dataclasses.replace(SETTINGS.data, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            data(source="b.jsonl"),
            r"config.data.source=b.jsonl: .*/10 was trained on a corpus with a.jsonl, and there is no ",
        ),
        (data(text_field="body"), "config.data.text_field=body: .* with text, .* no store at stores/a"),
        (data(validation_share=0.1), "config.data.validation_share=0.1: .* with 0.02"),
        (data(vocab="pieces.model"), "config.data.vocab=pieces.model: .* with bytes"),
        (dataclasses.replace(SETTINGS, seed=3), "config.seed=3: the checkpoint .*/10 was made with 0"),
        (dataclasses.replace(SETTINGS, model=SETTINGS.model.replace(d_k=8)), "config.model.d_k=8: .* made with 64"),
    ],
)
def test_another_corpus_or_model_is_refused(workdir, settings, message):
    with pytest.raises(UserError, match=message):
        check_continues(settings, workdir)


def test_what_may_be_the_same_is_not_refused(workdir, tmp_path_factory):
    check_continues(SETTINGS, workdir)
    # a store at another place, settings that no store depends on
    check_continues(data(store="", prepare_processes=3, vocab_size=5, num_threads=9), workdir)
    check_continues(data(source="b.jsonl"), tmp_path_factory.mktemp("new"))  # no run
    (workdir / "checkpoints/10/record/metadata").write_text("{")  # damage is for others to find
    check_continues(dataclasses.replace(SETTINGS, seed=3), workdir)
    (workdir / "checkpoints/10/record/metadata").unlink()
    check_continues(dataclasses.replace(SETTINGS, seed=3), workdir)


def allowed(**changes):
    other = data(**changes)
    return dataclasses.replace(other, train=dataclasses.replace(other.train, on_data_change="restart_streams"))


def test_other_data_is_allowed_on_request_and_another_vocabulary_is_not(workdir):
    check_continues(allowed(source="b.jsonl", text_field="body"), workdir)
    with pytest.raises(UserError, match=r"^config.data.vocab=sentencepiece: would be .* vocabulary bytes;"):
        check_continues(allowed(source="b.jsonl", vocab="sentencepiece"), workdir)
    record = workdir / "checkpoints/10/record/metadata"
    record.write_text(json.dumps(run_record(SETTINGS, "pieces", "corpus")))
    with pytest.raises(UserError, match=r"^config.data.vocab=bytes: the checkpoint .* made with pieces; give that"):
        check_continues(allowed(source="b.jsonl"), workdir)
