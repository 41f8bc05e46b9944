"""Runs before any test module is imported: eight simulated devices, quick compilation, no silent rank promotion."""

import collections
import fcntl
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Fusion emitters compile for twice as long; splitting programs for threads, which find no idle core, takes a
        # seventh. Later versions may not know a flag, and end at it.
        *(
            ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
            if importlib.metadata.version("jaxlib").startswith("0.10.")
            else []
        ),
    ]
)

# Programs that several tests compile, in this process or in those that they start, are compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"tvq_pod-tests-{run}")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # a run has forty small programs besides the step

import jax
import pytest

from tests import command, common

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects that stay: to look through them again and again takes an eighth of the time.
gc.freeze()
gc.set_threshold(20_000, 20, 50)


def _offer(function):
    return pytest.fixture(name=function.__name__)(lambda: function)


@pytest.fixture
def rng_fixture():
    """Tests that request the contract's fixtures run with 64-bit types on, as those of the paper's own code do."""
    with jax.enable_x64(True):
        yield common.rng_fixture


transformer_config_fixture = _offer(common.transformer_config_fixture)
attn_fixture = _offer(common.attn_fixture)
basic_vq_spec_fixture = _offer(common.basic_vq_spec_fixture)


@pytest.fixture(scope="session")
def eight_devices() -> list:
    """Eight devices; fewer are a failure of the set-up, not a reason to skip."""
    devices = jax.devices()
    assert len(devices) == 8, f"XLA_FLAGS came too late: {devices}"
    return devices


def _made_once(tmp_path_factory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A folder that all workers of pytest-xdist share. make: fills it, once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).exists():
            draft = shared / f"{name}.making"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder of 40 text files, to read."""

    def make(folder):
        for i in range(40):
            text = f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i % 7 + 1)
            (folder / f"{i}.txt").write_text(text)

    return _made_once(tmp_path_factory, "corpus", make)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory, corpus) -> pathlib.Path:
    text = command.SMALL.format(source=str(corpus))
    return _made_once(tmp_path_factory, "config", lambda folder: (folder / "small.py").write_text(text)) / "small.py"


@pytest.fixture(scope="session")
def _trained_once(tmp_path_factory, config_file) -> pathlib.Path:
    def make(folder):
        out, err = command.run(f"--config={config_file}", f"--workdir={folder / 'run'}", devices=8)
        (folder / "out").write_text(out)
        (folder / "err").write_text(err)

    return _made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _trained_once) -> tuple[pathlib.Path, str, str]:
    """The folder, output and messages of a run of 40 steps on eight devices; the folder is a copy for this module."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    shutil.copytree(_trained_once / "run", workdir)
    return workdir, (_trained_once / "out").read_text(), (_trained_once / "err").read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a server on loopback whose bucket is gs://bucket."""
    from tests import buckets  # which takes a second to import

    yield from buckets.served()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that all workers of pytest-xdist end together. A slow test counts for
    8 seconds, unless its marker says how many, as slow(40)."""
    seconds = collections.defaultdict(float)
    for item in items:
        slow = item.get_closest_marker("slow")
        seconds[item.path] += (slow.args or (8.0,))[0] if slow else 0.3
    items.sort(key=lambda item: (-seconds[item.path], item.path))


def pytest_sessionfinish(session):
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if cache.name.startswith("tvq_pod-tests-") and not hasattr(session.config, "workerinput"):  # the last to end
        shutil.rmtree(cache, ignore_errors=True)
