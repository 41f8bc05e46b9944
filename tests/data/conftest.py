import pytest

from tests.data.texts import TEXTS


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / f"corpus/{n:02d}.txt").write_text(text)
    return tmp_path / "corpus"
