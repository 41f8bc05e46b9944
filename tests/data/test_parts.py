"""Stores of several parts: how a corpus is cut depends on the corpus alone, what goes in comes out, and what is not as
it was written is named."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.command import ROOT
from tests.data.made_streams import made_streams
from tests.data.texts import TEXTS, settings_for
from tvq_pod.config.settings import MeshSettings
from tvq_pod.data import cut as cut_module
from tvq_pod.data import groups, part_workers, writer
from tvq_pod.data import text as text_module
from tvq_pod.data.corpora import documents_of
from tvq_pod.data.cut import count_lines, cut, lines_before, numbered, spans_of
from tvq_pod.data.loader import Feed
from tvq_pod.data.open import open_store
from tvq_pod.data.schedule import GROUPED, LISTED
from tvq_pod.data.sources import listing
from tvq_pod.data.store import SPLITS, TokenStore
from tvq_pod.data.streams import read_row
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.errors import UserError
from tvq_pod.parallel.mesh import make_mesh

FUNCTION_SCOPED = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of a few documents, and groups of fewer."""
    monkeypatch.setattr(cut_module, "PART_BYTES", 1500)
    monkeypatch.setattr(writer, "GROUP", 4)


def made(source, folder, **changes) -> TokenStore:
    data = dict(prepare_processes=1, store=str(folder)) | changes
    return open_store(settings_for(source, **data), epath.Path(f"{folder}.run"))


def written(path: pathlib.Path, format: str, texts: list[str]) -> pathlib.Path:
    """One file of documents."""
    if format == "parquet":
        parquet.write_table(pyarrow.table(dict(text=texts)), path, row_group_size=3, compression="none")
    elif format == "jsonl":
        path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    else:
        path.write_text("".join(f"{text}\n" for text in texts))
    return path


def contents(store: TokenStore) -> dict[str, tuple]:
    """Of each split: tokens, starts, doc_bytes and names, read from the arrays."""
    found = {}
    for split in SPLITS:
        if store.meta["splits"][split]["n_documents"]:
            part = store.split(split)
            names = store.names(split) if split != "train" else []
            found[split] = np.asarray(part.tokens), part.starts, part.doc_bytes, names
    return found


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for split in one:
        for a, b in zip(one[split], other[split], strict=True):
            np.testing.assert_array_equal(a, b)


# ------------------------------------------------- cutting
@settings(max_examples=60, **FUNCTION_SCOPED)
@given(
    lines=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    part_bytes=st.integers(1, 60),
    block_bytes=st.integers(1, 60),
    end=st.sampled_from([b"\n", b"\r\n"]),
    ends=st.booleans(),
)
def test_lines_of_a_file_that_is_cut_are_those_of_the_file_with_their_numbers(
    tmp_path, lines, part_bytes, block_bytes, end, ends
):
    path, monkeypatch = tmp_path / "a.txt", pytest.MonkeyPatch()
    texts = [bytes([65 + n % 26]) * length for n, length in enumerate(lines)]
    path.write_bytes(end.join(texts) + end * ends)
    data = settings_for(path, format="lines").data
    if not (ends or texts[-1]):
        texts.pop()
    whole = [(f"a.txt:{number}", text) for number, text in enumerate(texts, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "LINES_BYTES", block_bytes)
        assert [document[:2] for document in documents_of(listing(data), data)] == whole
        patch.setattr(cut_module, "PART_BYTES", part_bytes)
        found = listing(data)
        parts = cut(found)
        before = lines_before(spans := spans_of(parts, "lines"), map(count_lines, spans))
        read = []
        for part in parts:
            found.files[:] = numbered(part, before)
            read += [document[:2] for document in documents_of(found, data)]
    assert read == whole


@settings(max_examples=60, **FUNCTION_SCOPED)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_files_stay_in_their_order_and_no_part_is_small(tmp_path, sizes):
    folder = tmp_path / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number:02d}.txt").write_bytes(b"x" * size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_module, "PART_BYTES", 64)
        parts = cut(listing(settings_for(folder).data))
        assert [file.name for part in parts for file in part] == [f"{n:02d}.txt" for n in range(len(sizes))]
        of_parts = [sum(sizes[int(file.name[:2])] for file in part) for part in parts]
        assert all(n >= 32 for n in of_parts[len(of_parts) == 1 :])
        patch.setattr(cut_module, "MOST_PARTS", 3)
        assert len(cut(listing(settings_for(folder).data))) <= 3


def test_a_compressed_file_is_not_cut(tmp_path):
    import gzip

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(9000).hex().encode()))
    assert len(cut(listing(settings_for(tmp_path, format="lines").data))) == 1


# ------------------------------------------------- what goes in comes out
@pytest.mark.slow(1)
@pytest.mark.parametrize("format", ["lines", "jsonl", "parquet", "text"])
def test_a_store_of_parts_has_the_documents_of_a_store_of_one(tmp_path, monkeypatch, format):
    source = tmp_path / "corpus"
    source.mkdir()
    if format == "text":
        for n, text in enumerate(TEXTS):
            (source / f"{n:02d}.txt").write_text(text)
    else:
        for number, texts in enumerate((TEXTS[:40], TEXTS[40:42], TEXTS[42:])):
            written(source / f"{number}.{dict(lines='txt').get(format, format)}", format, texts)
    parts = made(source, tmp_path / "parts", format=format)
    assert parts.n_parts > 3
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        *(f"part-{n:05d}" for n in range(parts.n_parts)),
        "store.json",
    ]
    monkeypatch.setattr(cut_module, "PART_BYTES", 2**28)
    one = made(source, tmp_path / "one", format=format)
    assert one.meta["format"] == 2
    assert_equal(contents(parts), contents(one))
    assert {split: one.meta["splits"][split]["n_bytes"] for split in SPLITS} == {
        split: parts.meta["splits"][split]["n_bytes"] for split in SPLITS
    }


@pytest.mark.slow(2)
def test_the_store_is_the_same_for_any_number_of_workers(tmp_path, monkeypatch):
    """Byte for byte; with real processes, and a vocabulary that they need."""
    monkeypatch.setattr(writer, "GROUP", groups.GROUP)  # as in other processes
    model = tmp_path / "own.model"
    model.write_bytes(train_sentencepiece([text.encode() for text in TEXTS], 300))
    source = written(tmp_path / "a.jsonl", "jsonl", TEXTS)
    stores = [made(source, tmp_path / f"s{n}", vocab=str(model), prepare_processes=n) for n in (1, 2, 4)]
    assert stores[0].n_parts > 3
    assert len({store.fingerprint for store in stores}) == 1
    for store in stores[1:]:
        assert_equal(contents(store), contents(stores[0]))
        for path in pathlib.Path(store.path).rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (tmp_path / "s1" / path.relative_to(store.path)).read_bytes(), path


def test_a_prepare_that_continues_counts_lines_only_of_files_that_it_has_to_write(tmp_path, monkeypatch):
    source, counted, write = tmp_path / "corpus", [], part_workers.write_part
    source.mkdir()
    for name, texts in dict(a=TEXTS[:30], b=TEXTS[30:]).items():
        written(source / f"{name}.txt", "lines", texts)

    def write_first_file(task, *given):
        if any(file.name == "b.txt" and file.begin for file in task.listing.files):
            raise UserError("no more")
        write(task, *given)

    monkeypatch.setattr(part_workers, "count_lines", lambda span: counted.append(span.name) or count_lines(span))
    monkeypatch.setattr(part_workers, "write_part", write_first_file)
    with pytest.raises(UserError, match=r"^no more$"):
        made(source, tmp_path / "s", format="lines")
    assert set(counted) == {"a.txt", "b.txt"}
    counted.clear()
    monkeypatch.setattr(part_workers, "write_part", write)
    made(source, tmp_path / "s", format="lines")
    assert set(counted) == {"b.txt"}


@pytest.fixture(scope="module")
def parted(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("parted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_module, "PART_BYTES", 1500)
        patch.setattr(writer, "GROUP", 4)
        return made(written(folder / "a.txt", "lines", TEXTS), folder / "store", format="lines")


@pytest.mark.parametrize("version", [LISTED, GROUPED])
def test_an_epoch_reads_every_token_once_and_starts_anywhere(parted, version):
    """Rows, end to end, are documents of the store, each once; a row that is read from the middle is the same."""
    split = parted.split("train")
    batch_size, (tokens, starts, *_) = 3, contents(parted)["train"]
    plan = made_streams(split, batch_size, version=version)
    n = int(starts[-1])
    bounds = [row * n // batch_size for row in range(batch_size + 1)]
    places = []
    for row, (low, high) in enumerate(itertools.pairwise(bounds)):
        segments = [*plan.segments(row, 0, high - low)]
        places += [place for s in segments for place in range(s.start, s.start + s.length)]
        read = read_row(split.tokens, plan, row, 0, high - low)
        np.testing.assert_array_equal(read["targets"], tokens[places[low:high]])
        for begin in (1, 100, high - low - 50):
            part = read_row(split.tokens, plan, row, begin, begin + 50)
            for name, values in part.items():
                np.testing.assert_array_equal(values, read[name][begin : begin + 50])
    assert sorted(places) == list(range(n))
    if version == GROUPED:
        assert split.documents.n_groups > 2 * parted.n_parts


def test_one_two_and_four_hosts_read_the_same_batches(parted):
    split, mesh, steps = parted.split("train"), make_mesh(MeshSettings()), (3, 9)

    def read(n_hosts: int) -> np.ndarray:
        feed = Feed(split, made_streams(split, 4), mesh, 4, 64, threads=2, ahead=2)
        of_hosts = [feed.host_batches(range(4)[host::n_hosts], *steps) for host in range(n_hosts)]
        batches = [np.stack([batch["targets"] for batch in batches]) for batches in zip(*of_hosts, strict=True)]
        return np.stack([batch.swapaxes(0, 1).reshape(4, 64) for batch in batches])

    one = read(1)
    assert len(np.unique(one)) > 10
    for n_hosts in (2, 4):
        np.testing.assert_array_equal(read(n_hosts), one)


def test_no_group_has_documents_of_two_parts(parted):
    found, bounds = parted.split("train").documents, [0]
    for part in parted.parts:
        bounds.append(bounds[-1] + part.splits["train"]["n_documents"])
    assert set(bounds) <= set(found.documents.tolist())
    assert np.diff(found.documents).max() == 4
    starts = found.whole
    for group in range(found.n_groups):
        begin, end = found.documents[group : group + 2]
        np.testing.assert_array_equal(found.of_group(group), starts[begin : end + 1])
        assert found.tokens[group] == starts[begin]
    assert groups.GROUP == 2**14


# ------------------------------------------------- damage
@pytest.fixture
def damaged(parted, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(parted.path, tmp_path / "damaged"))


def opened(path) -> TokenStore:
    store = TokenStore(path)
    store.split("train")
    return store


@pytest.mark.parametrize("damage", ["deleted", "doubled", "swapped", "shortened", "index"])
def test_a_part_that_is_not_as_it_was_is_named_when_the_store_is_opened(damaged, damage):
    two, three = damaged / "part-00002", damaged / "part-00003"
    assert opened(damaged).n_parts > 3
    if damage == "deleted":
        shutil.rmtree(two)
    elif damage == "doubled":
        shutil.rmtree(two)
        shutil.copytree(three, two)
    elif damage == "swapped":
        two.rename(damaged / "x")
        three.rename(two)
        (damaged / "x").rename(three)
    elif damage == "shortened":
        shape = two / "train/tokens/zarr.json"
        shape.write_text(shape.read_text().replace('"shape":[', '"shape":[1'))
    else:
        meta = json.loads((damaged / "store.json").read_text())
        meta["parts"][2] = meta["parts"][3]
        (damaged / "store.json").write_text(json.dumps(meta))
    name = (
        "store.json is damaged" if damage == "index" else "part-0000[23].* (does not exist|is another part|has changed)"
    )
    with pytest.raises(UserError, match=rf"^config.data.store=.*{name}") as raised:
        opened(damaged)
    assert "\n" not in str(raised.value)


def test_a_part_in_the_place_of_another_of_its_size_is_named(tmp_path):
    (tmp_path / "texts").mkdir()
    for n in range(4):
        (tmp_path / f"texts/{n}.txt").write_text(f"{n}" * 1600)
    store = made(tmp_path / "texts", tmp_path / "s", validation_share=0.0, test_share=0.0)
    assert store.n_parts == 4
    shutil.rmtree(store.path / "part-00001")
    shutil.copytree(store.path / "part-00002", store.path / "part-00001")
    with pytest.raises(UserError, match=r"^config.data.store=.*part-00001 is damaged or is another part"):
        opened(store.path)


def test_a_flipped_byte_of_a_part_is_named_when_it_is_read(damaged):
    (shard,) = (damaged / "part-00002/train/tokens/c").iterdir()
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    split = opened(damaged).split("train")
    with pytest.raises(UserError, match=r"config.data.store: is damaged .*part-00002"):
        read_row(split.tokens, made_streams(split, 1), 0, 0, split.documents.n_tokens)


def test_a_folder_of_parts_is_no_text_of_a_corpus(parted):
    data = settings_for(parted.path.parent, exclude="*.run,a.txt").data
    with pytest.raises(UserError, match=r"is empty.*1 stores or runs of this program \(store\)"):
        listing(data)


def test_nor_is_one_that_is_only_begun(tmp_path):
    for name in ("progress.json", "part-00000.lock", "part-00000.preparing/train/tokens/c"):
        (tmp_path / "c/store.preparing" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c/store.preparing" / name).write_text("12345")
    with pytest.raises(UserError, match=r"is empty.*1 stores or runs of this program"):
        listing(settings_for(tmp_path / "c").data)


def test_processes_that_write_parts_do_not_import_jax():
    program = "import sys, tvq_pod.data.part_workers, tvq_pod.data.beam; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
