"""Trainings that are killed, signalled, hung, damaged and starved of disk at random, until they are done; each is then
compared with the run that was left alone.

    python -m tests.chaos --runs=50 --seed=0 --workdir=DIR

Every process is real, and so is every signal. A run suffers some faults, each in a session of its own, and is started
again with the same command, half of the runs with the same number of processes, the others with another at random. In
the end an exact run must have the bits of the undisturbed run of as many processes, and every line of metrics.jsonl its
losses; an elastic one must have read the same tokens and come to the same numbers up to the order of sums. In between,
every process must end by itself in time, with a reason. Exit code 1 if anything was lost.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from absl import logging
from etils import epath

from launch import local
from tvq_pod.config.resolve import resolve
from tvq_pod.config.run_config import read_run_config
from tvq_pod.config.settings import MeshSettings
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run import manifest
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.hashes import sha256_of
from tvq_pod.training.step import abstract_train_state

STEPS, DEVICES = 60, 4
TRAIN = [
    "--config=configs/stdlib.py",
    *(f"--config.model.{name}={value}" for name, value in dict(
        d_model=16, d_k=8, d_v=16, n_layer=1, n_code=8, block_len=8, mem_len=8, p_dropres=0.2, p_droplyr=0.1).items()),
    "--config.data.format=folder", "--config.data.validation_share=0.3",
    "--config.train.log_every_steps=1", "--config.train.batch_size=4", "--config.train.update_len=64",
    "--config.checkpoint.every_steps=10", "--config.checkpoint.grace_seconds=20", "--config.eval.every_steps=20",
    "--config.checkpoint.timeout_seconds=20", "--config.eval.batch_size=4", "--config.eval.max_tokens=2000",
    "--config.sample.length=0",
]  # fmt: skip
PEER_TIMEOUT, JOIN_TIMEOUT = 8, 40
LIMIT = 90.0  # seconds within which every process must have ended by itself
FLOAT_ERROR = 2e-3  # of elastic runs' parameters


@dataclasses.dataclass
class Job:
    """The processes of one session."""

    processes: list[subprocess.Popen]
    texts: list[list[str]]  # what each has said so far

    @property
    def step(self) -> int:
        """The last that process 0 has logged."""
        found = [re.match(r"step +(\d+)/", line) for line in self.texts[0][-20:]]
        return max((int(match[1]) for match in found if match), default=0)

    def alive(self) -> list[subprocess.Popen]:
        return [process for process in self.processes if process.poll() is None]

    def signal(self, number: int, some: list[subprocess.Popen]) -> None:
        for process in some:
            if process.poll() is None:
                process.send_signal(number)


class Fault:
    """Something that goes wrong. strike happens to a job at a random moment; afterwards to the folder that it left."""

    def __init__(self, strike, afterwards=None):
        self.strike, self.afterwards = strike, afterwards


def _one(job: Job, rng: random.Random) -> list[subprocess.Popen]:
    return [rng.choice(job.processes)]


def _starve(job: Job, rng: random.Random) -> None:
    """No file may grow, for a while; then there is room again."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    for limits in ((100, resource.RLIM_INFINITY), unlimited):
        for process in job.alive():
            try:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
            except ProcessLookupError:
                continue
        if limits != unlimited:
            time.sleep(rng.uniform(0.2, 1.5))


def _term_twice(job: Job, rng: random.Random) -> None:
    some = _one(job, rng)
    job.signal(signal.SIGTERM, some)
    time.sleep(rng.uniform(0.0, 0.2))
    job.signal(signal.SIGTERM, some)


def _kill_all(job: Job, rng: random.Random) -> None:
    job.signal(signal.SIGKILL, job.processes)


def _newest(workdir: pathlib.Path) -> pathlib.Path | None:
    steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, key=lambda path: int(path.name), default=None)


def _file(workdir: pathlib.Path, rng: random.Random, least: int = 1) -> pathlib.Path | None:
    """One of the newest checkpoint's files, of those that its manifest speaks for."""
    step = _newest(workdir)
    if step is None:
        return None
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.name not in manifest.LEFT_OUT)
    return rng.choice([path for path in files if path.stat().st_size >= least])


def _flip_bit(workdir: pathlib.Path, rng: random.Random) -> bool:
    if path := _file(workdir, rng):
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return bool(path)


def _zero_page(workdir: pathlib.Path, rng: random.Random) -> bool:
    if path := _file(workdir, rng):
        content = bytearray(path.read_bytes())
        begin = rng.randrange(0, len(content), 4096)
        page = content[begin : begin + 4096]
        content[begin : begin + 4096] = bytes(len(page))
        if not any(page):
            return False
        path.write_bytes(content)
    return bool(path)


def _truncate(workdir: pathlib.Path, rng: random.Random) -> bool:
    if path := _file(workdir, rng):
        os.truncate(path, rng.randrange(path.stat().st_size))
    return bool(path)


def _remove(workdir: pathlib.Path, rng: random.Random) -> bool:
    if path := _file(workdir, rng):
        path.unlink()
    return bool(path)


def _break_manifest(workdir: pathlib.Path, rng: random.Random) -> bool:
    step = _newest(workdir)
    if step:
        path = step / manifest.NAME
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content) - 2)] ^= 1 << rng.randrange(7)
        path.write_bytes(content)
    return bool(step)


def _half_save(workdir: pathlib.Path, rng: random.Random) -> bool:
    """What a kill in the middle of a save leaves behind."""
    step = _newest(workdir)
    if step:
        half = step.with_name(f"{int(step.name) + 10}.orbax-checkpoint-tmp")
        if not half.exists():
            shutil.copytree(step / "params", half / "params.orbax-checkpoint-tmp")
    return False


FAULTS = {
    "kill -9, one process": Fault(lambda job, rng: job.signal(signal.SIGKILL, _one(job, rng))),
    "kill -9, all": Fault(_kill_all),
    "SIGTERM, one process": Fault(lambda job, rng: job.signal(signal.SIGTERM, _one(job, rng))),
    "SIGTERM, all": Fault(lambda job, rng: job.signal(signal.SIGTERM, job.processes)),
    "SIGTERM twice": Fault(_term_twice),
    "hung (SIGSTOP), one process": Fault(lambda job, rng: job.signal(signal.SIGSTOP, _one(job, rng))),
    "disk full for a while": Fault(_starve),
    "half a save left": Fault(_kill_all, _half_save),
    "a bit flipped": Fault(_kill_all, _flip_bit),
    "a page zeroed": Fault(_kill_all, _zero_page),
    "a file cut off": Fault(_kill_all, _truncate),
    "a file gone": Fault(_kill_all, _remove),
    "manifest damaged": Fault(_kill_all, _break_manifest),
}


class Lost(Exception):
    """A promise was not kept."""


def start(workdir: pathlib.Path, cache: pathlib.Path, corpus: pathlib.Path, n_processes: int) -> Job:
    """The command that every session is started with, on n_processes."""
    arguments = [*TRAIN, f"--config.data.source={corpus}", f"--workdir={workdir}", f"--config.compile_cache={cache}"]
    arguments += [f"--config.train.num_steps={STEPS}"]
    arguments += [f"--peer_timeout_seconds={PEER_TIMEOUT}", f"--join_timeout_seconds={JOIN_TIMEOUT}"]
    job = Job(local.start(n_processes, DEVICES // n_processes, arguments), [[] for _ in range(n_processes)])
    for process, text in zip(job.processes, job.texts, strict=True):
        local.in_background(lambda process=process, text=text: text.extend(map(_decoded, process.stderr)))
        local.in_background(lambda process=process: collections.deque(process.stdout, maxlen=0))
    return job


def _decoded(line: bytes) -> str:
    return line.decode(errors="replace")


def end(job: Job) -> list[int]:
    """The exit codes, once all processes have ended by themselves. Raises Lost if they don't, or give no reason."""
    deadline = time.monotonic() + LIMIT
    while awake := [process for process in job.alive() if not _is_stopped(process)]:
        if time.monotonic() > deadline:
            raise Lost(f"{len(awake)} processes did not end within {LIMIT:g} s: {''.join(job.texts[0][-3:])}")
        time.sleep(0.02)
    for process in job.processes:  # those that were stopped can't end by themselves
        process.kill()
        process.wait()
    codes = [process.returncode for process in job.processes]
    time.sleep(0.2)  # the last lines are being read
    for code, text in zip(codes, job.texts, strict=True):
        if code not in (0, -signal.SIGKILL, -signal.SIGTERM) and not text:
            raise Lost(f"a process ended with {code} and no reason")
    return codes


def _is_stopped(process: subprocess.Popen) -> bool:
    return pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def suffer(job: Job, fault: Fault, rng: random.Random, typical: float) -> None:
    """Strikes at a random moment: of start-up and restore, or of the steps, evaluation and saves."""
    began, at_step = time.monotonic(), rng.choice([None, rng.randrange(1, STEPS + 1)])
    at_time = rng.uniform(0.0, 1.1 * typical)
    while job.alive() and len(job.alive()) == len(job.processes):
        if time.monotonic() > began + (at_time if at_step is None else LIMIT):
            break
        if at_step is not None and job.step >= at_step:
            time.sleep(rng.uniform(0.0, 0.05))
            break
        time.sleep(0.01)
    fault.strike(job, rng)


def one_run(workdir: pathlib.Path, setting: "Setting", names: list[str], rng: random.Random, exact: int | None) -> None:
    """A run with these faults. exact: the number of processes; None: another one every time. Raises Lost."""

    def begin() -> Job:
        return start(workdir, setting.cache, setting.corpus, exact or rng.choice([1, 2, 4]))

    for name in names:
        fault, job = FAULTS[name], begin()
        suffer(job, fault, rng, setting.typical_seconds)
        codes = end(job)
        if name.startswith("SIGTERM,") and not set(codes) <= {0, 75, -signal.SIGTERM, 1, -signal.SIGABRT}:
            raise Lost(f"after {name}: exit codes {codes}")
        if name == "disk full for a while" and set(codes) != {0} and not _started_full(job):
            raise Lost(f"after {name}: exit codes {codes}: {''.join(job.texts[0][-3:])}")
        if fault.afterwards:
            _damage(workdir, fault, rng, begin)
    codes = end(begin())
    if set(codes) != {0}:
        raise Lost(f"the last session ended with {codes}")
    setting.compare(workdir, exact)


def _started_full(job: Job) -> bool:
    """Whether the disk was full before there was anything to go on with: then it is right to end."""
    return not any("compiled in" in line for line in job.texts[0])


def _damage(workdir: pathlib.Path, fault: Fault, rng: random.Random, begin) -> None:
    """Damages the newest checkpoint. If it is the only one, the run must refuse to start over; then it is brought back
    from a copy."""
    newest = _newest(workdir)
    if newest is None:
        return
    copy = workdir / "copy"
    shutil.copytree(newest, copy)
    is_damaged = fault.afterwards(workdir, rng)
    steps = [path for path in newest.parent.iterdir() if path.name.isdecimal()]
    if is_damaged and len(steps) == 1:
        job = begin()
        codes = end(job)
        if set(codes) != {1} or not any("has no good checkpoint left" in line for line in job.texts[0]):
            raise Lost(f"with its only checkpoint damaged: {codes}, {''.join(job.texts[0][-3:])}")
        os.rename(copy, newest)
    else:
        shutil.rmtree(copy)


class Setting:
    """What the runs share, and what they are compared with."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True)
        self.corpus, self.cache, self.folder = folder / "corpus", folder / "cache", folder
        self.corpus.mkdir()
        for n in range(40):
            (self.corpus / f"{n}.txt").write_text(f"the {n}th document says {n * n} and no more. " * 20)
        self.typical_seconds, self._states, self._lines = 0.0, {}, {}

    def leave_alone(self, n_processes: int, warm_up: bool = True) -> None:
        """The run that nothing happens to: twice, the second one to know how long it takes once all is compiled."""
        for name in ("warm-up", "alone") if warm_up else ("alone",):
            workdir = self.folder / f"{name}-{n_processes}"
            began = time.monotonic()
            codes = end(job := start(workdir, self.cache, self.corpus, n_processes))
            assert set(codes) == {0}, "".join(job.texts[0])
        self.typical_seconds = max(self.typical_seconds, time.monotonic() - began)
        self._states[n_processes], self._lines[n_processes] = final_state(workdir), lines_of(workdir)

    def compare(self, workdir: pathlib.Path, exact: int | None) -> None:
        """Raises Lost if a run has not come to where it would have come undisturbed."""
        like = exact or 1
        found, expected = final_state(workdir), self._states[like]
        lines = lines_of(workdir)
        if lines.keys() != self._lines[like].keys():
            raise Lost(f"lines of metrics.jsonl: {sorted(self._lines[like].keys() ^ lines.keys())}")
        for key, line in lines.items():
            then = self._lines[like][key]
            if line.get("digest") != then.get("digest"):
                raise Lost(f"{key}: other tokens were read")
            if abs(line["loss"] - then["loss"]) > (0.0 if exact else 1e-3 * then["loss"]):
                raise Lost(f"{key}: loss {line['loss']}, undisturbed {then['loss']}")
        if exact and sha256_of(found) != sha256_of(expected):
            raise Lost("the final state has other bits")
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            if not np.allclose(a, b, rtol=FLOAT_ERROR, atol=FLOAT_ERROR):
                raise Lost(f"the final state differs at {jax.tree_util.keystr(path)}")


def final_state(workdir: pathlib.Path):
    """The whole train state of the last checkpoint, as NumPy arrays."""
    settings = resolve(read_run_config(workdir))
    mesh = make_mesh(MeshSettings(), jax.local_devices()[:1])
    checkpoints = CheckpointReader(epath.Path(workdir))
    if checkpoints.steps()[-1:] != [STEPS]:
        raise Lost(f"the last checkpoint is of step {checkpoints.steps()[-1:]}")
    state = checkpoints.restore(checkpoints.pick(None), abstract_train_state(settings, mesh))
    checkpoints.close()
    return jax.device_get(state)


def lines_of(workdir: pathlib.Path) -> dict:
    """The lines of metrics.jsonl by split and step; of several, the last."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {(line["split"], line["step"]): line for line in lines}


def chaos(n_runs: int, seed: int, folder: pathlib.Path, names: list[str]) -> bool:
    """Runs, and prints a table. Whether nothing was lost."""
    setting = Setting(folder)
    rng = random.Random(seed)
    for n_processes in (1, 2):
        setting.leave_alone(n_processes)
        say(f"left alone, {n_processes} process(es): {setting.typical_seconds:.1f} s")
    tried, lost = collections.Counter(), collections.Counter()
    deck = []
    for index in range(n_runs):
        faults = []
        for _ in range(rng.choice([1, 1, 2])):
            if not deck:  # all faults are tried equally often
                deck = rng.sample(names, len(names))
            faults.append(deck.pop())
        exact = rng.choice([1, 2, None, None])
        workdir, began = folder / f"run-{index}", time.monotonic()
        tried.update(faults)
        try:
            one_run(workdir, setting, faults, rng, exact)
            verdict = "survived"
            shutil.rmtree(workdir)
        except Lost as error:
            lost.update(faults)
            verdict = f"LOST: {error}"
        kind = f"exact, {exact} process(es)" if exact else "elastic"
        say(f"run {index}: {kind}; {', '.join(faults)}: {verdict} ({time.monotonic() - began:.0f} s)")
    print("| fault | tried | survived | lost |\n| --- | --- | --- | --- |")
    for name in names:
        print(f"| {name} | {tried[name]} | {tried[name] - lost[name]} | {lost[name]} |")
    print(f"\n{n_runs} runs with {tried.total()} faults, seed {seed}: {'none' if not lost else 'SOME'} lost")
    return not lost


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50, help="how many, apart from those that are left alone")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for everything; must not exist")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this one; may be given again")
    given = parser.parse_args()
    if given.workdir.exists():
        parser.error(f"--workdir={given.workdir}: exists; give a folder that does not")
    logging.set_verbosity(logging.FATAL)
    sys.exit(not chaos(given.runs, given.seed, given.workdir.absolute(), given.fault or list(FAULTS)))


if __name__ == "__main__":
    main()
