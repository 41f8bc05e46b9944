"""Stores whose parts the workers of an Apache Beam pipeline write are those that local processes write."""

import pathlib
import sys
import threading
import time
import types

import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from gcsfs.core import GCSFileSystem

from tests.buckets import reached_at
from tests.command import finish, start
from tests.data.test_parts import made, written
from tests.data.texts import TEXTS, settings_for
from tvq_pod.config.settings import Settings
from tvq_pod.data import beam as beam_module
from tvq_pod.data import bucket
from tvq_pod.data import cut as cut_module
from tvq_pod.data.append import append
from tvq_pod.data.beam import Beam
from tvq_pod.data.open import open_store
from tvq_pod.data.store import TokenStore
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.host import extras
from tvq_pod.modes.prepare import prepare

HERE = Beam("DirectRunner", "")  # in this process


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of a few documents."""
    monkeypatch.setattr(cut_module, "PART_BYTES", 2000)
    monkeypatch.setattr(beam_module, "LOOK_SECONDS", 0.05)


def settings_of(source, store, **changes) -> Settings:
    return settings_for(source, store=str(store), prepare_processes=1, **changes)


def beamed(source, store, beam: Beam = HERE, **changes) -> TokenStore:
    found = open_store(settings_of(source, store, **changes), epath.Path("unused"), beam=beam)
    assert isinstance(found, TokenStore)
    return found


def files_of(folder) -> dict[str, bytes]:
    folder = pathlib.Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def lines(tmp_path) -> pathlib.Path:
    """A large file, which is cut, and a small one."""
    (tmp_path / "corpus").mkdir()
    written(tmp_path / "corpus/a.jsonl", "jsonl", TEXTS[:50])
    written(tmp_path / "corpus/b.jsonl", "jsonl", TEXTS[50:])
    return tmp_path / "corpus"


# ------------------------------------------------- the same store
@pytest.mark.slow(40)
def test_the_store_of_several_processes_is_the_local_one_byte_for_byte(lines, tmp_path, capfd):
    local = made(lines, tmp_path / "local")
    capfd.readouterr()
    options = "--direct_num_workers=2 --direct_running_mode=multi_processing"
    store = beamed(lines, tmp_path / "beam", Beam("DirectRunner", options))
    out, err = capfd.readouterr()
    assert store.n_parts == local.n_parts > 3
    assert store.fingerprint == local.fingerprint
    assert files_of(store.path) == files_of(local.path)
    assert out == ""
    assert [line for line in err.splitlines() if line and "B/s]" not in line] == [
        f"preparing {store.path} from {lines}",
        "  reads 2 files as jsonl: 2 .jsonl (a.jsonl, b.jsonl)",
        f"  {store.n_parts} parts are written by DirectRunner",
    ]


@pytest.mark.slow(2)
def test_a_vocabulary_reaches_the_workers_and_files_are_added(lines, tmp_path, capsys):
    model = tmp_path / "own.model"
    model.write_bytes(train_sentencepiece([text.encode() for text in TEXTS], 300))
    made(lines, tmp_path / "local", vocab=str(model))
    capsys.readouterr()
    beamed(lines, tmp_path / "beam", vocab=str(model))
    assert " parts are written by DirectRunner\n" in capsys.readouterr().err
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "local")
    written(lines / "c.jsonl", "jsonl", [text.upper() for text in TEXTS])
    for name, beam in dict(local=None, beam=HERE).items():
        append(settings_of(lines, tmp_path / name, vocab=str(model)), epath.Path("unused"), beam)
    assert len(TokenStore(tmp_path / "beam").versions) == 2
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "local")


def test_a_corpus_of_one_part_is_prepared_by_this_process_which_says_so(lines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cut_module, "PART_BYTES", 2**27)
    monkeypatch.setattr(Beam, "pipeline", lambda beam: pytest.fail("a pipeline"))
    made(lines, tmp_path / "local")
    beamed(lines, tmp_path / "beam")
    assert f"--runner=DirectRunner: {lines} is one part, and this process writes it\n" in capsys.readouterr().err
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "local")


def reached_now(monkeypatch, server) -> GCSFileSystem:
    """The bucket, which nothing of this process knows yet."""
    bucket.filesystem.cache_clear()
    GCSFileSystem.clear_instance_cache()
    fsspec_backend._get_filesystem.cache_clear()
    return reached_at(monkeypatch, server)


@pytest.mark.slow(3)
def test_what_an_attempt_has_left_in_a_bucket_is_kept_or_written_again(lines, tmp_path, server, monkeypatch, capsys):
    files = reached_now(monkeypatch, server)
    local, write, n_written = made(lines, tmp_path / "local"), beam_module.write_part, []

    def write_three(task, *given):
        if len(n_written) == 3:
            raise UserError("config.data.source=a.jsonl: line 9 is no good; correct it")
        n_written.append(task)
        write(task, *given)

    monkeypatch.setattr(beam_module, "write_part", write_three)
    with pytest.raises(UserError, match=r"^config.data.source=a.jsonl: line 9 is no"):
        beamed(lines, "gs://bucket/s")
    monkeypatch.setattr(beam_module, "write_part", write)
    there = {name.split("/")[2]: files.info(name)["generation"] for name in files.glob("bucket/s/*/store.json")}
    assert len(there) == 3
    (part, *_) = sorted(entry.folder for entry in local.parts if entry.folder not in there)
    files.pipe({f"bucket/s/{part}/train/tokens/c/9": b"of an attempt with other files"})
    capsys.readouterr()
    store = beamed(lines, "gs://bucket/s")
    assert f"3 of {store.n_parts} parts are complete" in capsys.readouterr().err
    found = {name.removeprefix("bucket/s/"): files.cat(name) for name in files.find("bucket/s")}
    assert found == files_of(local.path)
    assert there == {name: files.info(f"bucket/s/{name}/store.json")["generation"] for name in there}


def test_what_workers_elsewhere_have_written_in_a_bucket_is_seen(server, monkeypatch):
    """Though this process has listed the folder before, and gcsfs remembers that."""
    files = reached_now(monkeypatch, server)
    folder, part = epath.Path("gs://bucket/seen"), types.SimpleNamespace(folder="gs://bucket/seen/part-00000")
    files.pipe({"bucket/seen/progress.json": b"{}"})
    assert [path.name for path in folder.iterdir()] == ["progress.json"]
    workers = HERE.workers(folder, ByteVocab(), lambda n_bytes: None)
    monkeypatch.setattr(workers, "_run", lambda *given: files.pipe({"bucket/seen/failed.txt": b"a line of a worker"}))
    with pytest.raises(UserError, match=r"^a line of a worker$"):
        workers.write([part], [])  # pyright: ignore[reportArgumentType]


# ------------------------------------------------- what goes wrong
@pytest.mark.slow(1)
def test_a_worker_s_error_is_the_line_of_a_local_prepare_which_then_goes_on(lines, tmp_path, capsys):
    good = (lines / "a.jsonl").read_text()
    expected = made(lines, tmp_path / "expected")
    bad = good.splitlines(keepends=True)
    bad[40] = bad[40].replace('"text"', '"twxt"')
    (lines / "a.jsonl").write_text("".join(bad))
    said = []
    for name, beam in dict(local=None, beam=HERE).items():
        with pytest.raises(UserError) as refused:
            open_store(settings_of(lines, tmp_path / name), epath.Path("unused"), beam=beam)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "line 41" in said[1]
    assert "\n" not in said[1]
    draft = tmp_path / "beam.preparing"
    assert sorted(path.name for path in draft.iterdir() if not path.name.startswith("part-")) == ["progress.json"]
    assert 0 < len(list(draft.glob("part-*/store.json"))) < expected.n_parts


@pytest.mark.slow(1)
def test_a_local_prepare_goes_on_with_the_parts_of_workers(lines, tmp_path, monkeypatch, capsys):
    """And the other way round."""
    expected, write = made(lines, tmp_path / "expected"), beam_module.write_part
    for first, then in ((HERE, None), (None, HERE)):
        store = tmp_path / f"{bool(first)}"
        n_written = 0

        def write_three(*given):
            nonlocal n_written
            if (n_written := n_written + 1) > 3:
                raise UserError("no more")
            write(*given)

        with monkeypatch.context() as patch:
            patch.setattr("tvq_pod.data.part_workers.write_part", write_three)
            patch.setattr(beam_module, "write_part", write_three)
            with pytest.raises(UserError, match=r"^no more$"):
                open_store(settings_of(lines, store), epath.Path("unused"), beam=first)
        capsys.readouterr()
        open_store(settings_of(lines, store), epath.Path("unused"), beam=then)
        assert f"3 of {expected.n_parts} parts are complete" in capsys.readouterr().err
        assert files_of(store) == files_of(expected.path)


def test_a_pipeline_that_fails_is_one_line(lines, tmp_path, monkeypatch):
    def fails(*given):
        raise KeyError("a name")

    monkeypatch.setattr(beam_module, "write_part", fails)
    with pytest.raises(
        UserError, match=r"^--runner=DirectRunner: the pipeline failed after \d+ s \(.*a name.*\); "
    ) as no:
        beamed(lines, tmp_path / "store")
    assert "\n" not in str(no.value)


def test_a_worker_process_that_is_killed_does_not_leave_the_prepare_hanging():
    """Beam itself waits for ever: only a thread of its own says that the process has ended."""

    def never() -> None:
        def says() -> None:
            raise RuntimeError("Worker subprocess exited with return code 137")

        threading.Thread(target=says).start()
        time.sleep(600)

    hook = threading.excepthook
    with beam_module._ended(never) as ended:
        assert "return code 137" in str(ended.get(timeout=60))
    assert threading.excepthook is hook


# ------------------------------------------------- refused before anything is written
IN_BUCKET = dict(store="gs://b/s", corpus="gs://b/texts,hf:nobody/nothing:train")
CLOUD = "--project=p --region=us-central1 --temp_location=gs://bucket/temp"
REFUSED = [
    ("DirectRunner", "--foo=3", {}, r"^--beam_options=--foo=3: foo is not an option of Apache Beam here; "),
    ("DirectRunner", "--runner=Other", {}, r"^--beam_options=--runner=Other: runner is not an option of "),
    ("DirectRunner", "--direct_running_mode=x", {}, r"^--beam_options=.*: argument --direct_running_mode: invalid "),
    ("DirectRunner", "'--foo", {}, r"^--beam_options='--foo: No closing quotation; "),
    ("DirectRunner", "", dict(mixture="a=1,b=1"), r"^--runner=DirectRunner: prepares one store; leave config.data"),
    (
        "DataflowRunner",
        "",
        {},
        r"^config.data.store=.*/run/store: workers of DataflowRunner can't reach a local path; ",
    ),
    ("DataflowRunner", "", dict(store="gs://b/s"), r"^config.data.source=.*corpus: workers of DataflowRunner can't "),
    ("DataflowRunner", "", IN_BUCKET, r"^--beam_options=: DataflowRunner needs --project, --region, --temp_location; "),
    ("DataflowRunner", CLOUD, IN_BUCKET, r"^--runner=DataflowRunner: needs pip install 'apache-beam\[gcp\]'$"),
]


@pytest.mark.parametrize(("runner", "options", "changes", "says"), REFUSED)
def test_what_can_t_work_is_refused_before_anything_is_written(
    lines, tmp_path, capfd, monkeypatch, runner, options, changes, says
):
    monkeypatch.setitem(sys.modules, "google.cloud.dataflow", None)  # it is not installed
    with pytest.raises(UserError, match=says) as refused:
        prepare(settings_for(**dict(corpus=lines) | changes), epath.Path(tmp_path / "run"), beam=Beam(runner, options))
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]
    assert capfd.readouterr() == ("", "")


def test_a_beam_that_is_not_installed_is_asked_for(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda package: package != "apache_beam")
    with pytest.raises(UserError, match=r"^--runner=DirectRunner: Apache Beam needs pip install -e '.\[beam\]'$"):
        prepare(settings_for(lines), epath.Path(tmp_path / "run"), beam=HERE)


def test_options_without_a_runner_are_refused():
    assert Beam.of(None, "") is None
    assert Beam.of("DirectRunner", "") == HERE
    with pytest.raises(UserError, match=r"^--beam_options=--a: is for an Apache Beam runner; give --runner=Direct"):
        Beam.of(None, "--a")


def test_another_runner_or_mode_is_refused(tmp_path):
    """By the program, as a user starts it."""
    flags = ["--config=configs/stdlib.py", f"--workdir={tmp_path}"]
    said = [
        (["--mode=prepare", "--runner=Other"], "--runner=Other: must be one of DirectRunner, "),
        (["--mode=train", "--runner=DirectRunner"], "--runner: is for --mode=prepare; leave it out with --mode=train"),
    ]
    for given, line in said:
        code, out, err = finish(start(*flags, *given))
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"error: {line}")
    assert not list(tmp_path.iterdir())
