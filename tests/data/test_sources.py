"""What config.data.source stands for: kinds by names, several paths, globs, and what is held out."""

import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from tests.data.texts import settings_for
from tvq_pod.config.settings import DataSettings
from tvq_pod.data.corpora import documents, files_of
from tvq_pod.data.kinds import kind_of, suffix_of
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.open import open_store
from tvq_pod.data.splits import splits_by_name
from tvq_pod.data.store import SPLITS
from tvq_pod.data.text import parts
from tvq_pod.errors import UserError

ROW = '{"text": "a text"}\n'


def found(source, **settings) -> list[tuple]:
    data = DataSettings(source=str(source), **settings)
    return [(document.name, bytes(document.text).decode(), document.split) for document in documents(data)]


def texts(source, **settings) -> list[str]:
    return [text for _, text, _ in found(source, **settings)]


def write(root, **files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# ------------------------------------------------- kinds
@pytest.mark.parametrize(("name", "kind", "suffix"), [
    ("a.jsonl", "jsonl", ".jsonl"), ("A.JSONL", "jsonl", ".jsonl"), ("a.ndjson", "jsonl", ".ndjson"),
    ("a.JSONL.GZ", "jsonl", ".jsonl.gz"), ("c4-train.00000-of-01024.json.gz", "json", ".json.gz"),
    ("a.jsonl-00000-of-00003", "jsonl", ".jsonl"), ("a.jsonl-00000-of-00003.zst", "jsonl", ".jsonl.zst"),
    ("train-0-of-2.parquet", "parquet", ".parquet"), ("a.array_record-01-of-09", "arrayrecord", ".array_record"),
    ("a.txt.xz", "text", ".txt.xz"), ("gz", "text", ""), (".gz", "text", ""), ("a.tar.gz", "binary", ".tar.gz"),
    ("a.PNG", "binary", ".png"), ("README", "text", ""), ("a.py", "text", ".py"),
])  # fmt: skip
def test_a_name_says_what_a_file_is(name, kind, suffix):
    assert (kind_of(name), suffix_of(name)) == (kind, suffix)


@pytest.mark.parametrize("name", ["a.NDJSON", "b.JSONL", "c.json", "d.Json.gz"])
def test_json_lines_have_several_names(tmp_path, name):
    (tmp_path / name).write_text(ROW * 2)
    for source in (tmp_path / name, tmp_path):
        assert texts(source) == ["a text"] * 2


@pytest.mark.parametrize(("text", "why"), [
    ('[{"text": "a"},\n {"text": "b"}]\n', "it is one JSON array"), ('{\n "text": "a"\n}\n', "its first line is no"),
    ("\n\n  [1]", "it is one JSON array"), ('"text"\n', "its first line is not a JSON object"),
])  # fmt: skip
def test_json_that_is_not_in_lines_is_told_what_would_be_right(tmp_path, text, why):
    write(tmp_path, **{"a.json": ROW, "b.json": text})
    with pytest.raises(UserError, match=rf"source=.*b.json: is not JSON lines: {why}.*; write one object per line"):
        texts(tmp_path)
    assert texts(tmp_path, format="folder") == [ROW, text]
    assert texts(tmp_path, exclude="b.*") == ["a text"]


def test_json_among_source_code_is_text(tmp_path):
    write(tmp_path, **{"main.py": "import this\n", "package.json": '{\n "name": 1\n}\n', "README.md": "read\n"})
    assert texts(tmp_path) == ["read\n", "import this\n", '{\n "name": 1\n}\n']


def test_json_lines_with_text_in_them_are_not_read_as_text_because_of_a_text_beside_them(tmp_path):
    write(tmp_path, **{"c4.0.json": ROW, "c4.1.json": ROW, "stats.txt": "2 rows\n"})
    with pytest.raises(UserError, match=r"has files of several formats \(jsonl, text\)"):
        texts(tmp_path)
    assert texts(tmp_path, exclude="*.txt") == ["a text"] * 2
    assert texts(tmp_path, text_field="body") == [ROW, ROW, "2 rows\n"]  # they have no text of that name


def test_a_folder_of_files_that_are_no_text_is_not_read_for_what_is_about_them(tmp_path):
    write(tmp_path, **{"data-00000-of-00001.arrow": "x", "state.json": "{}", "dataset_info.json": "{}"})
    with pytest.raises(UserError, match=rf"\(data-00000-of-00001.arrow\), and besides them.*; give hf:{tmp_path}$"):
        texts(tmp_path)
    assert texts(tmp_path, format="text") == ["{}", "{}"]


def test_what_is_about_a_corpus_of_records_is_no_part_of_it(tmp_path):
    write(
        tmp_path,
        **{"README.md": "about", "LICENSE": "MIT", "dataset_infos.json": "{\n}", "_SUCCESS": "", "a.jsonl": ROW},
    )
    assert texts(tmp_path) == ["a text"]
    said = "\n".join(files_of(DataSettings(source=str(tmp_path))).lines())
    assert "leaves out 4 about the corpus, by their names: LICENSE, README.md, _SUCCESS, ..." in said
    write(tmp_path, **{"b.txt": "text"})
    with pytest.raises(UserError, match=r"has files of several formats \(jsonl, text\)"):
        texts(tmp_path)


# ------------------------------------------------- several paths
def test_several_paths_and_globs_are_read_in_their_order_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **{"b/2.txt": "b2", "b/1.txt": "b1", "a.txt": "a", "c1.txt": "c1", "c2.txt": "c2", "c,d": "cd"})
    assert found("b, a.txt,c[12].*") == [
        ("b/1.txt", "b1", None), ("b/2.txt", "b2", None), ("a.txt", "a", None), ("c1.txt", "c1", None),
        ("c2.txt", "c2", None),
    ]  # fmt: skip
    assert texts("**/*.txt") == ["a", "b1", "b2", "c1", "c2"]
    assert texts("c2.txt,c*.txt,./c1.txt,.") == ["c2", "c1", "a", "b1", "b2", "cd"]
    assert texts(f"{tmp_path}/b,{tmp_path}/a.txt") == ["b1", "b2", "a"]
    assert texts("c,d", holdout="hash") == ["cd"]  # what is there is no list
    for source, message in (
        ("a.txt,nowhere", r"config.data.source=a.txt,nowhere: nowhere does not exist"),
        ("a.txt,x*.txt", r"no file or folder matches x\*.txt"), (",", "does not exist"),
        ("a.txt,b.py", "b.py does not"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            texts(source)


def test_a_store_of_several_paths_is_made_and_known_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path, **{f"{folder}/{n}.jsonl": json.dumps(dict(text=f"{folder}{n}")) for folder in "ab" for n in range(9)}
    )
    store = open_store(settings_for("a/*.jsonl,b"), epath.Path("run"))
    assert sum(store.meta["splits"][split]["n_documents"] for split in SPLITS) == 18
    assert open_store(settings_for("a/*.jsonl,b"), epath.Path("run")).fingerprint == store.fingerprint


# ------------------------------------------------- held out by position
LINES = "".join(f"line {n}\n" for n in range(1000))


def test_a_single_text_file_is_one_document_whose_last_lines_are_held_out(tmp_path):
    write(tmp_path, **{"book.txt": LINES})
    cut = found(tmp_path / "book.txt", validation_share=0.1, test_share=0.05)
    assert [split for _, _, split in cut] == ["train", "validation", "test"]
    assert "".join(text for _, text, _ in cut) == LINES
    assert all(text.endswith("\n") and text.startswith("line ") for _, text, _ in cut)
    sizes = [len(text) / len(LINES) for _, text, _ in cut]
    assert sizes == pytest.approx([0.85, 0.1, 0.05], abs=0.003)
    assert found(tmp_path / "book.txt", holdout="hash") == [("book.txt", LINES, None)]
    assert len(found(tmp_path / "book.txt", format="lines")) == 1000
    write(tmp_path, **{"folder/one.txt": LINES})
    assert [split for _, _, split in found(tmp_path / "folder")] == ["train", "validation", "test"]
    write(tmp_path, **{"tests/test.txt": LINES})
    assert [split for _, _, split in found(tmp_path / "tests")] == ["test"]  # its name says so
    write(tmp_path, **{"folder/two.txt": LINES})
    assert [split for _, _, split in found(tmp_path / "folder")] == [None, None]
    assert [split for _, _, split in found(tmp_path / "folder", holdout="position")] == [
        "train",
        "validation",
        "test",
    ] * 2
    write(tmp_path, **{"a.jsonl": ROW})
    with pytest.raises(UserError, match=r"config.data.holdout=position: is for text files, but .* as jsonl"):
        found(tmp_path / "a.jsonl", holdout="position")


SHARES = st.sampled_from([0.0, 0.02, 0.3, 0.49])


@given(st.text("ab\né漢", max_size=300), SHARES, SHARES)
def test_parts_are_the_text_in_order_and_cut_no_character(text, validation_share, test_share):
    data = text.encode()
    for given_text in (data, memoryview(data)):
        cut = list(parts(given_text, validation_share, test_share))
        assert b"".join(bytes(part) for _, part in cut) == data
        assert [split for split, _ in cut] == sorted({split for split, _ in cut}, key=SPLITS.index)
        for _, part in cut:
            bytes(part).decode()


def test_a_long_last_line_is_not_held_out_with_all_before_it():
    cut = dict(parts(b"head\n" + b"x" * 1000, 0.1, 0.1))
    assert [len(part) for part in cut.values()] == pytest.approx([804, 100, 101], abs=1)


# ------------------------------------------------- own splits
@pytest.mark.parametrize(("name", "split"), [
    ("train/a.txt", "train"), ("data/Valid/x/test/b", "validation"), ("dev/a", "validation"),
    ("wiki.test.tokens", "test"),
    ("c4-validation.00000-of-00008.json.gz", "validation"), ("train-00000-of-00002.parquet", "train"),
    ("training.txt", None), ("test_train.txt", None), ("a/b.txt", None), ("VAL.jsonl", "validation"),
])  # fmt: skip
def test_names_say_splits(name, split):
    assert splits_by_name([name]) == [split]


def test_words_of_names_say_splits_only_where_names_differ_in_nothing_else():
    assert splits_by_name(["x.train.0.txt", "x.test.1.txt", "x.train.12.txt"]) == ["train", "test", "train"]
    assert splits_by_name(["train.py", "test_all.py"]) == [None, None]
    assert splits_by_name(["x.train.txt", "x.test.md"]) == [None, None]


def test_names_that_differ_in_shards_and_compression_say_splits():
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation.parquet"]
    assert splits_by_name(names) == ["train", "train", "validation"]
    assert splits_by_name(["train.jsonl.gz", "val.jsonl", "test.JSONL.zst"]) == ["train", "validation", "test"]
    assert splits_by_name(["train.txt-00000-of-00001", "test.txt"]) == ["train", "test"]


OWN = {"train/a.txt": "a", "train/b.txt": "b", "valid/c.txt": "c", "test/x/d.txt": "d"}


@pytest.mark.parametrize("files", [
    OWN, {"wiki.train.tokens": "a", "wiki.valid.tokens": "c", "wiki.test.tokens": "d"},
    {"data/train.jsonl": '{"text": "a"}', "data/dev.jsonl": '{"text": "c"}', "data/test.jsonl": '{"text": "d"}'},
])  # fmt: skip
def test_a_folder_with_its_own_splits_keeps_them(tmp_path, files):
    write(tmp_path / "corpus", **files)
    splits = {split: text for _, text, split in found(tmp_path / "corpus") if text != "b"}
    assert splits == dict(train="a", validation="c", test="d")
    store = open_store(settings_for(tmp_path / "corpus"), epath.Path(tmp_path / "run"))
    n_train = sum(name.startswith("train/") for name in files) or 1
    assert [store.meta["splits"][split]["n_documents"] for split in SPLITS] == [n_train, 1, 1]
    assert {split for _, _, split in found(tmp_path / "corpus", holdout="hash")} == {None}


def test_several_paths_may_be_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, **OWN))
    for source in ("train,valid,test", "train/*.txt,valid/*,test/x/*.txt", f"{tmp_path}/*"):
        assert [split for _, _, split in found(source)] == ["train", "train", "validation", "test"] or (
            source == f"{tmp_path}/*"
        )
    assert {split for _, _, split in found("test/x/d.txt,test/x/../../train/b.txt")} == {"test", "train"}
    (tmp_path / "test/x/e.txt").write_text("e")
    assert {split for _, _, split in found("test/x/*.txt")} == {None}  # a folder that all are in says nothing


def test_a_folder_of_which_some_files_have_no_split_is_held_out_by_hash_and_says_so(tmp_path):
    write(tmp_path, **OWN, **{"notes.txt": "n"})
    assert {split for _, _, split in found(tmp_path)} == {None}
    said = "\n".join(files_of(DataSettings(source=str(tmp_path))).lines())
    assert "held out by hash, since the names of 1 files give no split (notes.txt), although others do" in said
    assert {split for _, _, split in found(tmp_path, exclude="notes.txt")} == set(SPLITS)
    with pytest.raises(UserError, match=r"config.data.holdout=names: the names of 1 files give no split \(notes.txt\)"):
        found(tmp_path, holdout="names")


def test_a_readme_beside_splits_of_text_is_left_out(tmp_path):
    write(tmp_path, **OWN, **{"README.md": "about"})
    assert {split for _, _, split in found(tmp_path)} == set(SPLITS)
    said = "\n".join(files_of(DataSettings(source=str(tmp_path))).lines())
    assert "leaves out 1 about the corpus, by their names: README.md" in said
    assert "about" in texts(tmp_path, holdout="hash")


def test_a_folder_of_training_and_other_files_says_that_it_is_held_out_by_hash(tmp_path):
    write(tmp_path, **{"train/a.txt": "a", "eval/b.txt": "b"})
    said = "\n".join(files_of(DataSettings(source=str(tmp_path))).lines())
    assert "held out by hash, since the names of 1 files give no split (eval/b.txt)" in said


def test_a_package_with_tests_in_it_has_no_splits(tmp_path):
    write(tmp_path, **{"tests/test_a.py": "x", "test/b.py": "y", "src/train.py": "z"})
    assert {split for _, _, split in found(tmp_path)} == {None}
    write(tmp_path / "only", **{"train/a.txt": "x", "train/b.txt": "y"})
    assert {split for _, _, split in found(tmp_path / "only")} == {None}  # else nothing would be held out


@pytest.mark.parametrize(("files", "settings"), [
    ({"test.jsonl": '{"text": "d"}\n{"text": "e"}'}, dict(holdout="test")), ({"test/a": "d", "test/b": "e"}, {}),
    ({"any.txt": "d", "other.txt": "e"}, dict(holdout="test")),
])  # fmt: skip
def test_a_store_may_be_for_evaluation_only_and_is_not_trained_on(tmp_path, files, settings):
    write(tmp_path / "corpus", **files)
    given = settings_for(tmp_path / "corpus", **settings)
    store = open_store(given, epath.Path(tmp_path / "run"))
    assert [store.meta["splits"][split]["n_documents"] for split in SPLITS] == [0, 0, 2]
    assert len(store.split("test").lengths) == 2
    with pytest.raises(UserError, match=r"config.data.store=.*run/store: is for evaluation only, since"):
        store.split("train")
    with pytest.raises(UserError, match=r"is for evaluation only"):
        Mixture.open(f"{store.path}=1").split("train")


def test_a_mixture_takes_stores_with_splits_of_their_own_whatever_their_shares(tmp_path):
    write(tmp_path / "one", **OWN)
    write(tmp_path / "two", **{f"{n}.txt": str(n) for n in range(60)})
    one = open_store(settings_for(tmp_path / "one"), epath.Path(tmp_path / "run1"))
    data = DataSettings(source=str(tmp_path / "two"), validation_share=0.3, test_share=0.3)
    two = open_store(settings_for("").__class__(model=settings_for("").model, data=data), epath.Path(tmp_path / "run2"))
    assert Mixture.open(f"{one.path}=1,{two.path}=1").meta["splits"]["test"]["n_documents"] > 1
