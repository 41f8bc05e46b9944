"""Corpora that Hugging Face's `datasets` reads: local folders in its formats, and names, without a network."""

import http.server
import json
import threading

import datasets
import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.utils
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from tests.command import finish, start
from tests.data.test_parts import assert_equal, contents, made, written
from tests.data.texts import TEXTS, settings_for
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import cut as cut_module
from tvq_pod.data import hub, retry
from tvq_pod.data.append import append
from tvq_pod.data.corpora import documents, files_of
from tvq_pod.data.open import check_source, open_store
from tvq_pod.data.store import SPLITS
from tvq_pod.errors import UserError
from tvq_pod.host import extras

ROWS = {"train": ["a", "b", "c"], "validation": ["v"], "test": ["t", "u"]}
CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/train.jsonl
  - split: test
    path: en/test.jsonl
- config_name: de
  data_files:
  - split: train
    path: de/train.jsonl
---
# About
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub._loaded.cache_clear()


def jsonl(path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(text=text, id=n)) + "\n" for n, text in enumerate(texts)))


@pytest.fixture
def folder(tmp_path):
    for split, texts in ROWS.items():
        jsonl(tmp_path / f"stories/{split}.jsonl", *texts)
    return tmp_path / "stories"


@pytest.fixture
def with_card(tmp_path):
    jsonl(tmp_path / "pile/en/train.jsonl", "one", "two")
    jsonl(tmp_path / "pile/en/test.jsonl", "three")
    jsonl(tmp_path / "pile/de/train.jsonl", "eins")
    (tmp_path / "pile/README.md").write_text(CARD)
    return tmp_path / "pile"


def found(source, **settings) -> list[tuple]:
    data = DataSettings(source=str(source), **settings)
    return [(document.name, bytes(document.text).decode(), document.split) for document in documents(data)]


def texts(source, **settings) -> list[str]:
    return [text for _, text, _ in found(source, **settings)]


# ------------------------------------------------- splits
def test_a_dataset_with_its_own_splits_keeps_them(folder, tmp_path):
    assert found(f"hf:{folder}") == [
        ("stories/train:1", "a", "train"), ("stories/train:2", "b", "train"), ("stories/train:3", "c", "train"),
        ("stories/validation:1", "v", "validation"), ("stories/test:1", "t", "test"), ("stories/test:2", "u", "test"),
    ]  # fmt: skip
    said = "\n".join(files_of(DataSettings(source=f"hf:{folder}")).lines())
    assert "reads 3 splits as hf: 3 of datasets (stories/train, stories/validation, stories/test)" in said
    assert "by their names, 1 for train, 1 for validation, 1 for test" in said
    store = open_store(settings_for(f"hf:{folder}"), epath.Path(tmp_path / "run"))
    assert [store.meta["splits"][split]["n_documents"] for split in SPLITS] == [3, 1, 2]
    assert {split for _, _, split in found(f"hf:{folder}", holdout="hash")} == {None}
    assert {split for _, _, split in found(f"hf:{folder}", holdout="test")} == {"test"}


def test_a_split_that_is_asked_for_is_held_out_by_hash(folder):
    for split, expected in ROWS.items():
        assert found(f"hf:{folder}:{split}") == [
            (f"stories/{split}:{n}", text, None) for n, text in enumerate(expected, 1)
        ]
    assert [split for _, _, split in found(f"hf:{folder}:train,hf:{folder}:test")] == ["train"] * 3 + ["test"] * 2
    with pytest.raises(UserError, match=rf"source=hf:{folder}:dev: this split does not exist; give one of train, v"):
        texts(f"hf:{folder}:dev")
    with pytest.raises(UserError, match=r"must be hf:NAME_OR_FOLDER, optionally followed by :SPLIT or :CONFIG:SPLIT"):
        texts("hf:a:b:c:d")


def test_a_dataset_of_one_split_is_held_out_by_hash(tmp_path):
    jsonl(tmp_path / "any/stories.jsonl", "a", "b")
    assert found(f"hf:{tmp_path}/any") == [("any/train:1", "a", None), ("any/train:2", "b", None)]


def test_splits_of_other_names_are_held_out_by_hash_and_that_is_said(tmp_path):
    for split in ("train", "extra"):
        jsonl(tmp_path / f"any/{split}.jsonl", split)
    (tmp_path / "any/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: extra\n    path: extra.jsonl\n---\n"
    )
    assert found(f"hf:{tmp_path}/any") == [("any/train:1", "train", None), ("any/extra:1", "extra", None)]
    said = "\n".join(files_of(DataSettings(source=f"hf:{tmp_path}/any")).lines())
    assert "held out by hash, since the names of 1 files give no split (any/extra)" in said


def test_a_configuration_is_chosen_by_its_name(with_card):
    assert texts(f"hf:{with_card}") == ["one", "two", "three"]
    assert texts(f"hf:{with_card}:de:") == texts(f"hf:{with_card}:de:train") == ["eins"]
    assert found(f"hf:{with_card}:en:test") == [("pile/en/test:1", "three", None)]
    with pytest.raises(UserError, match=r"^config.data.source=hf:.*pile:fr:: can't be read \(BuilderConfig 'fr' not"):
        texts(f"hf:{with_card}:fr:")


def test_lists_have_datasets_and_files(folder, tmp_path):
    jsonl(tmp_path / "more.jsonl", "m")
    assert texts(f"hf:{folder}:train, {tmp_path}/more.jsonl,hf:{folder}:test") == ["a", "b", "c", "m", "t", "u"]
    assert texts(f"hf:{folder},hf:{folder}:train") == ["a", "b", "c", "v", "t", "u"]  # given twice


# ------------------------------------------------- formats and rows
@pytest.mark.parametrize("kind", ["parquet", "dataset", "datasets"])
def test_folders_of_parquet_and_of_save_to_disk_are_read(tmp_path, kind):
    rows = datasets.Dataset.from_dict(dict(text=[f"text {n}" for n in range(700)]))
    path = tmp_path / "any"
    if kind == "parquet":
        path.mkdir()
        rows.to_parquet(path / "train-00000-of-00001.parquet")
    elif kind == "dataset":
        rows.save_to_disk(path, num_shards=3)
    else:
        datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(path)
    expected = [f"text {n}" for n in range(700)]
    assert texts(f"hf:{path}") == expected + (["text 0", "text 1"] if kind == "datasets" else [])
    if kind != "parquet":
        with pytest.raises(UserError, match=rf"; give hf:{path}$"):
            texts(path)


def test_rows_without_text_are_bad_as_those_of_parquet_are(tmp_path):
    table = pyarrow.table(dict(
        text=["a", None, "b"], meta=[dict(text="x"), dict(text=None), None], n=[1, 2, 3],
        kind=pyarrow.array(["k", "k", "l"]).dictionary_encode(), raw=[b"caf\xe9", b"", None],
    ))  # fmt: skip
    (tmp_path / "any").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "any/a.parquet")
    source = f"hf:{tmp_path}/any"
    with pytest.raises(UserError, match=r"^config.data.text_field=text: row 2 of hf:.*/any:train has null there;"):
        texts(source)
    for field, expected in (("text", "a,,b"), ("meta.text", "x,,"), ("kind", "k,k,l"), ("n", ",,"), ("other", ",,")):
        assert ",".join(texts(source, text_field=field, bad_rows="skip")) == expected
        problems = [document.problem for document in documents(
            DataSettings(source=source, text_field=field, bad_rows="skip")
        )]  # fmt: skip
        assert [not problem for problem in problems] == [bool(text) for text in expected.split(",")]
    with pytest.raises(UserError, match=r"config.data.text_field=other: hf:.* does not have this column, only text"):
        texts(source, text_field="other")
    data = DataSettings(source=source, text_field="raw", bad_rows="skip")
    assert [bytes(document.text) for document in documents(data)] == [b"caf\xe9", b"", b""]


def test_a_run_inside_the_folder_is_refused(folder):
    with pytest.raises(UserError, match=r"source=hf:.*: contains the token store .*stories/run/store"):
        check_source(settings_for(f"hf:{folder}"), epath.Path(folder / "run"))


# ------------------------------------------------- what is not there
@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "/no/such/folder", "nobody/nothing:en:train"])
def test_a_name_that_can_not_be_had_is_one_line(name):
    source = f"hf:{name.removesuffix('train')}"
    with pytest.raises(UserError, match=rf"^config.data.source={source}: can't be read \(.*\); give hf:NAME"):
        texts(f"hf:{name}")


def test_a_folder_that_is_empty_or_damaged_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^config.data.source=hf:.*empty: can't be read \("):
        texts(f"hf:{tmp_path}/empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"^config.data.source=hf:.*bad:?\w*: can't be read \("):
        texts(f"hf:{tmp_path}/bad")


def test_a_hub_that_is_out_of_reach_for_a_while_is_asked_again(folder, monkeypatch, capfd):
    tries, load = [], datasets.load_dataset

    def fails_twice(*args, **kwargs):
        tries.append(args)
        if len(tries) < 3:
            raise ConnectionError("out of reach")
        return load(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", fails_twice)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    assert len(texts(f"hf:{folder}")) == 6
    assert f"WARNING: hf:{folder} can't be read (out of reach): trying again" in capfd.readouterr().err
    tries.clear()
    hub._loaded.cache_clear()
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)
    with pytest.raises(UserError, match=rf"^config.data.source=hf:{folder}: can't be read after 0 seconds of trying"):
        texts(f"hf:{folder}")


@pytest.mark.parametrize(("status", "may_pass"), [(429, True), (503, True), (401, False), (404, False)])
def test_a_busy_hub_is_asked_again_and_one_that_refuses_is_not(folder, monkeypatch, status, may_pass):
    """By errors that the library makes of a server's answers."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        response = huggingface_hub.utils.get_session().get(f"http://127.0.0.1:{server.server_port}/api")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as error:
        huggingface_hub.utils.hf_raise_for_status(response)
    assert hub._may_pass(error.value) is may_pass


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda package: package != "datasets")
    with pytest.raises(UserError, match=rf"source=hf:{folder}: a Hugging Face dataset needs pip install -e '.\[hf\]'"):
        texts(f"hf:{folder}")


@pytest.mark.slow
def test_the_program_prepares_from_a_dataset_and_refuses_a_name_without_a_network(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    flags = ["--mode=prepare", "--config=configs/stdlib.py", f"--workdir={tmp_path}/run"]
    code, out, err = finish(start(*flags, f"--source=hf:{folder}"))
    assert code == 0, err
    assert out == ""
    assert "by their names, 1 for train, 1 for validation, 1 for test" in err
    code, out, err = finish(start(*flags, "--source=hf:nobody/nothing", f"--config.data.store={tmp_path}/2"))
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert "error: config.data.source=hf:nobody/nothing: can't be read (" in err


def test_datasets_lie_in_one_part_beside_files_that_are_cut_and_are_added_once(folder, tmp_path, monkeypatch):
    one, source = f"{written(tmp_path / 'a.jsonl', 'jsonl', TEXTS)}", f"hf:{folder}"
    settings = dict(format="jsonl", holdout="hash", prepare_processes=1)
    whole = made(f"{one},{source}", tmp_path / "whole", **settings)
    monkeypatch.setattr(cut_module, "PART_BYTES", 1500)
    parts = made(f"{one},{source}", tmp_path / "parts", **settings)
    assert (whole.n_parts, parts.n_parts > 3) == (1, True)
    assert_equal(contents(parts), contents(whole))
    files = made(one, tmp_path / "store", **settings)
    fingerprints = [files.fingerprint]
    monkeypatch.chdir(tmp_path)
    for again in (source, source, f"hf:{folder.name}"):
        given = settings_for(again, **settings | dict(store=str(tmp_path / "store")))
        now = append(given, epath.Path(tmp_path / "run"))
        fingerprints.append(now.fingerprint)
    assert len(set(fingerprints)) == 2
    assert_equal(*({split: part[:3] for split, part in contents(store).items()} for store in (now, whole)))
