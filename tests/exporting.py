"""Exported models, and real processes that have nothing but Python, NumPy and safetensors."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from tests.common import model_params
from tvq_pod.config.settings import DataSettings, Settings
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.inference.exported import Origin, write_exported

NO_DATA = DataSettings()
ORIGIN = Origin(7, "a corpus")
SAYS = """
import json, sys
import generate
import numpy as np
model, logits = generate.Model(generate.FOLDER), []
for document in json.load(sys.stdin):
    state = model.start()
    logits += [model.step(state, token) for token in document]
np.save(sys.argv[1], np.stack(logits))
modules = {name.partition(".")[0] for name in sys.modules if not name.startswith("__")}
print(*sorted(modules - set(sys.stdlib_module_names)))
"""


def export_to(folder, config, vocab=None, dtype="float32", data=NO_DATA, **given) -> epath.Path:
    """A folder with the parameters of `model_params`. given: settings that belong to no group."""
    named = {name: jnp.dtype(getattr(config, name)).name for name in ("dtype", "param_dtype")}  # as config files do
    settings = Settings(model=config.replace(**named), data=data, **given)
    write_exported(epath.Path(folder), model_params(config), settings, vocab or ByteVocab(), ORIGIN, dtype)
    return epath.Path(folder)


def bare_environment(folder: pathlib.Path) -> dict[str, str]:
    """Of a process, started with -S, that finds NumPy and safetensors and no other package. folder: to make it in."""
    folder.mkdir()
    for package in (np, safetensors):
        path = pathlib.Path(package.__file__).parent
        for part in path.parent.glob(f"{path.name}*"):  # numpy.libs, too
            if not part.name.endswith(".dist-info"):
                (folder / part.name).symlink_to(part)
    return {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}


def bare(environment: dict[str, str], folder, *arguments, text: str = "") -> subprocess.CompletedProcess:
    """A program of such a process, in an exported folder, which it finds modules in."""
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, input=text, capture_output=True, text=True, timeout=120)


def logits_of(environment, folder, documents) -> tuple[np.ndarray, list[str]]:
    """What generate.py says of documents, one after the other [tokens, n_vocab]; and the packages that it imported."""
    out = pathlib.Path(folder).with_suffix(".npy")
    done = bare(environment, folder, "-c", SAYS, out, text=json.dumps(documents))
    assert done.returncode == 0, done.stderr
    return np.load(out), done.stdout.split()
