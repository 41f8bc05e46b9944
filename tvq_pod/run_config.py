"""The config file that main takes when none is given: the config.json of the run in --workdir."""

import ml_collections

from tvq_pod.config import read_run_config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """The run's settings. Raises UserError if there is no run."""
    return read_run_config(workdir)
