"""Which paths are taken, and what is said of the others, by their text; tests/run/test_gcs.py has a bucket's server."""

import os
import pathlib

import pytest
from etils import epath

from tests import common
from tvq_pod.config.settings import DataSettings
from tvq_pod.data.corpora import documents
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.store import TokenStore, kvstore
from tvq_pod.errors import UserError
from tvq_pod.host.paths import NAME_BYTES, check_path, check_saving, check_source_paths, is_bucket, may_write

GLOBS = ["a[1]", "[", "a*b", "*", "a?b", "100% sure? [no]*", "[!a]"]
PLAIN = [
    *(
        "with space",
        " lead",
        "trail ",
        "it's",
        'say "hi"',
        "50%",
        "%41",
        "a#b",
        "a]",
        "{a,b}",
        "ünï",
        "日本",
        "émoji😀",
    ),
    *(
        "dot.",
        "..x",
        "tab\there",
        "new\nline",
        "a:b",
        "a=b",
        "a,b",
        "-dash",
        "~",
        "$HOME",
        "a&b;c",
        "|pipe<>",
        "`tick`",
    ),
    *("a.orbax-checkpoint-tmp", "store", "@x", "x.zarr", "n" * NAME_BYTES, "é" * (NAME_BYTES // 2)),
]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """What is said of a path."""
    monkeypatch.chdir(tmp_path)

    def message(path, check=check_path, **options):
        with pytest.raises(UserError) as error:
            check("--workdir", path, **options)
        assert not list(tmp_path.iterdir())
        return str(error.value).removeprefix(f"--workdir={path}: ")

    return message


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", PLAIN + GLOBS)
def test_odd_names_are_as_good_as_others_for_stores_and_corpora(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_path("config.data.store", name)
    corpus = pathlib.Path("corpus", name)
    corpus.mkdir(parents=True)
    (corpus / f"{name}.txt").write_text("of the corpus")
    decoy = pathlib.Path("corpus/a1")  # what a[1] would find, were it a pattern
    decoy.mkdir()
    (decoy / "decoy.txt").write_text("of another corpus")
    assert [d.text for d in documents(DataSettings(source=str(corpus), hidden=True))] == [b"of the corpus"]
    assert [d.text for d in documents(DataSettings(source=str(corpus / f"{name}.txt")))] == [b"of the corpus"]
    made = common.store_of(pathlib.Path("stores", name), [b"some text"] * 3)
    assert TokenStore(f"stores/{name}").fingerprint == made.fingerprint
    assert len(TokenStore(f"stores/{name}").split("train").tokens.read().result()) == 3 * 10
    assert sorted(os.listdir("stores")) == [name]
    if "," not in name:  # which mixtures are parted by
        assert Mixture.open(f"stores/{name}=1").path == epath.Path(f"stores/{name}")


@pytest.mark.parametrize("name", PLAIN)
def test_odd_names_are_as_good_as_others_for_runs(name, tmp_path):
    check_path("--workdir", f"{tmp_path}/{name}")
    check_saving("--workdir", f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", GLOBS)
def test_a_name_that_orbax_takes_for_a_pattern_is_refused(name, refused, tmp_path, monkeypatch):
    check_path("--workdir", name)  # can be read
    said = refused(name, check_saving)
    assert said.startswith(f"the full path {tmp_path}/{name} has ")
    assert set(said.removeprefix(f"the full path {tmp_path}/{name} has ").partition(",")[0].split()) == set(name) & set(
        "*?["
    )
    refused(f"{name}/run", check_saving)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match=r"^--workdir=run: the full path .* has "):
        check_saving("--workdir", "run")


def test_what_is_no_path_of_this_program_is_refused(refused):
    no_scheme = "is not supported; give a local path, or gs://BUCKET/FOLDER"
    for scheme in ("s3", "az", "hf", "hdfs", "http", "https", "S3", "abfs+x"):
        assert refused(f"{scheme}://bucket/run") == f"{scheme.lower()}:// {no_scheme}"
    for path in ("file:///runs/a", "file:/runs/a", "FILE:///runs/a"):
        assert refused(path) == "must be given without file://; give /runs/a"
        assert refused(path, local_only=True) == "must be given without file://; give /runs/a"
    for path in ("gs:/bucket/run", "GS://bucket/run"):
        assert refused(path) == "must be a local path, or gs://BUCKET/FOLDER; give gs://bucket/run"
    for path in ("gs://bucket/x", "s3://bucket/x", "gs:/bucket/x"):
        assert refused(path, local_only=True) == "must be a path on this machine; copy it here"
    for path in ("gs://", "gs:///run"):
        assert refused(path) == "has no bucket; must be gs://BUCKET/FOLDER"
    assert refused("/s3/run").startswith("must not be below /gs, /s3, /az, /hf, which are read as buckets;")
    assert refused("gs://bucket/a#b") == "has '#', which no name in a bucket may have; rename it"
    for name in GLOBS:
        assert "which no name in a bucket may have" in refused(f"gs://bucket/{name}")
    assert refused("a/gs:").startswith("has a name that ends with a colon in its full path")
    assert refused("x:").startswith("has a name that ends with a colon in its full path")
    assert "has a backslash in its full path" in refused("back\\slash")
    assert (
        refused("n" * (NAME_BYTES + 1)) == f"has a name of {NAME_BYTES + 1} bytes in it; must have at most {NAME_BYTES}"
    )
    assert refused("é" * NAME_BYTES).startswith(f"has a name of {2 * NAME_BYTES} bytes")
    assert "must have at most 3800" in refused("/".join(["folder"] * 600))
    assert refused("\udcff").endswith("\\xff': must be UTF-8; rename it")


def test_a_bucket_is_one_whatever_is_in_its_name():
    assert is_bucket("gs://bucket/a")
    assert is_bucket(epath.Path("gs://bucket/a"))
    assert not is_bucket("a://b")
    assert kvstore("gs://bucket/a b%41/c") == {"driver": "gcs", "bucket": "bucket", "path": "a b%41/c/"}
    assert kvstore("gs://bucket") == {"driver": "gcs", "bucket": "bucket", "path": ""}


def test_whether_a_folder_can_be_written_is_asked_of_the_nearest_that_exists(tmp_path):
    assert may_write(epath.Path(tmp_path) / "a/b/c")
    assert not may_write(epath.Path("/proc/self/a/b"))


def test_a_corpus_may_lie_in_several_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:").mkdir()
    (tmp_path / "gs:/a,b").write_text("is there")
    for source in ("", "a.txt,b/*.txt", "hf:user/name:train", "gs:/a,b"):
        check_source_paths("config.data.source", source)
    check_source_paths("config.data.source", "a.txt, gs://one/x/*.txt,hf:x,gs://two")
    for source in ("x,s3://bucket/a", "gs:/bucket/a", "file:///a", "gs:///a", "gs://*/a"):
        with pytest.raises(UserError, match=r"^config.data.source="):
            check_source_paths("config.data.source", source)
