"""A manifest: no change of any file goes unnoticed."""

import itertools
import os
import shutil

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from tvq_pod.run import manifest

SIZES = {"params/d/0": 5000, "params/d/1": 1, "train/manifest.ocdbt": 300, "record/metadata": 77, "empty": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> epath.Path:
    path = epath.Path(tmp_path_factory.mktemp("step"))
    for name, size in SIZES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(os.urandom(size))
    (path / "commit_success.txt").write_text("not ours")
    manifest.write_manifest(path)
    return path


def changed(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("changed") / "step"
    shutil.copytree(folder, copy)
    return epath.Path(copy)


def test_what_was_not_changed_is_good(folder):
    assert manifest.problems(folder) == []


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(folder, tmp_path_factory, data):
    copy = changed(folder, tmp_path_factory)
    name = data.draw(st.sampled_from([name for name, size in SIZES.items() if size] + [manifest.NAME]))
    content = bytearray((copy / name).read_bytes())
    end = len(content) - (name == manifest.NAME)  # not its last newline
    content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (copy / name).write_bytes(bytes(content))
    # a bit in the manifest may turn a file's name into another: then that one is missing
    (problem, *_) = manifest.problems(copy)
    assert name in problem
    shutil.rmtree(copy.parent)


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size])
def test_a_file_cut_off_zeroed_or_gone_is_found(folder, tmp_path_factory, name):
    copy = changed(folder, tmp_path_factory)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    assert manifest.problems(copy) == [f"{copy / name}: has {len(content) - 1} bytes of {len(content)}"]
    (copy / name).write_bytes(bytes(len(content)))
    if content.strip(b"\0"):
        assert "its content has changed" in manifest.problems(copy)[0]
    (copy / name).unlink()
    assert manifest.problems(copy) == [f"{copy / name}: is missing"]


def test_a_manifest_gone_or_empty_is_a_problem(folder, tmp_path_factory):
    copy = changed(folder, tmp_path_factory)
    (copy / manifest.NAME).write_text("")
    assert "is damaged" in manifest.problems(copy)[0]
    (copy / manifest.NAME).unlink()
    assert "is missing" in manifest.problems(copy)[0]


@pytest.mark.parametrize("of", [2, 3, 7])
def test_processes_that_share_the_work_look_at_every_file_once(folder, tmp_path_factory, of):
    copy = changed(folder, tmp_path_factory)
    for name, size in SIZES.items():
        if size:
            (copy / name).write_bytes(bytes(size + 1))
    found = itertools.chain.from_iterable(manifest.problems(copy, part, of) for part in range(of))
    assert sorted(line.split(":")[0] for line in found) == sorted(
        str(copy / name) for name, size in SIZES.items() if size
    )
