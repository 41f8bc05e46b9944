"""A run whose store is added to: it continues with the data that it began with, and says so, unless it may take others.

Digests are computed here from the store as it was, and as it is.
"""

import pytest
from etils import epath

from tests.run.test_other_data import B, T, digest_of, made_up, settings_of, trained  # noqa: F401 (a fixture)
from tvq_pod.data.append import append
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.store import TokenStore
from tvq_pod.errors import UserError
from tvq_pod.run import own_data


def test_a_run_goes_on_with_what_it_began_with(corpus, tmp_path, capsys, monkeypatch):
    workdir, store = tmp_path / "run", tmp_path / "store"
    settings = settings_of(corpus, 5, store=str(store))
    trained(settings, workdir)
    before = TokenStore(store)
    for n in range(25):
        (corpus / f"more{n}.txt").write_text(f"something new, number {n}. " * (3 + n % 5))
    now = append(settings, epath.Path(workdir))
    assert now.n_parts == 2
    assert "runs that began earlier continue with the old parts" in capsys.readouterr().err

    begun = DataSchedule.begin(B, T)
    found = trained(settings_of(corpus, 9, store=str(store)), workdir)
    assert found[9] == digest_of(settings, (before, begun, 0, 9))
    said = capsys.readouterr().err
    assert "was added to since this run began: it continues with 1 of 2 parts" in said
    assert "streams start over" not in said

    # With leave to take other data, it reads all that is there now, and so do its later starts.
    found = trained(settings_of(corpus, 12, "restart_streams", store=str(store)), workdir)
    of_all = begun.changed(9, B, T, data=now.fingerprint)
    assert found[12] == digest_of(settings, (before, begun, 0, 9), (now, of_all, 0, 3))
    assert "other data is read from step 9 on" in capsys.readouterr().err
    found = trained(settings_of(corpus, 14, store=str(store)), workdir)
    assert found[14] == digest_of(settings, (before, begun, 0, 9), (now, of_all, 0, 5))
    assert "was added to since" not in capsys.readouterr().err

    # A new run reads all of it.
    found = trained(settings_of(corpus, 4, store=str(store)), tmp_path / "new")
    assert found[4] == digest_of(settings, (now, begun, 0, 4))
    # A host that sees the store as it was, where process 0 sees what was added, does not read something else.
    monkeypatch.setattr(own_data, "text_from_process_zero", lambda _: "f" * 64)
    with pytest.raises(UserError, match=r"config.data.store=.*: is another one here than where process 0 is"):
        trained(settings_of(corpus, 6, store=str(store)), tmp_path / "new")
