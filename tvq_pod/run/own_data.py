"""The data that a run reads if its store was added to after the run began."""

from etils import epath

from tvq_pod.config.identity import FINGERPRINT
from tvq_pod.config.settings import Settings
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.store import TokenStore
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.parallel.processes import decided_by_process_zero, text_from_process_zero
from tvq_pod.run.checkpoint_reader import CheckpointReader


def as_the_run_knows_it(
    store: TokenStore | Mixture, settings: Settings, workdir: epath.Path, step: int | None
) -> TokenStore | Mixture:
    """The store as it was when the run's checkpoint was saved, if it was only added to since, and the settings do not
    let the streams start over with other data. step: the checkpoint; None: the newest.

    All processes call this, and get the same data even if the store is being added to at that moment. Raises UserError
    if one of them does not find it.
    """
    fingerprint = store.fingerprint
    keeps_data = settings.train.on_data_change == "refuse"
    if keeps_data and decided_by_process_zero(len(store.versions) > 1):
        fingerprint = _fingerprint_of_run(settings, workdir, step) or fingerprint
        if store.as_of(fingerprint) is None:
            fingerprint = store.fingerprint  # other data: refused later, with its name
    fingerprint = text_from_process_zero(fingerprint)
    found = store.as_of(fingerprint)
    if found is None:
        raise UserError(f"config.data.store={store.path}: differs from the store that process 0 sees; start again")
    if found.fingerprint != store.fingerprint:
        say(
            f"{store.path} was added to since this run began: it continues with {found.n_parts} of {store.n_parts} "
            "parts; config.train.on_data_change=restart_streams reads all of them"
        )
    return found


def _fingerprint_of_run(settings: Settings, workdir: epath.Path, step: int | None) -> str:
    """The fingerprint of the checkpoint's data; "" if there is no checkpoint."""
    if not (workdir / "checkpoints").is_dir():
        return ""
    reader = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    try:
        if not reader.steps_of_process_zero():
            return ""
        return reader.record(reader.pick(step)).get(FINGERPRINT, "")
    finally:
        reader.close()
