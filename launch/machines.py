"""One run's slices and their machines: requests, prepares, starts, stops and releases them. Every step may be repeated,
run twice at once, or run by another process after this one was killed."""

import json
import os
import pathlib
import re
import shlex
import shutil
from collections.abc import Callable
from typing import NamedTuple

from tvq_pod.errors import UserError

from . import libtpu, slices
from .clock import Clock, ago
from .gcloud import Gcloud, GcloudError
from .record import ASKED, PREPARED, STARTED, STARTING, STOPPED, Record, Records
from .source import ROOT

MISSING = "MISSING"  # a queued resource that does not exist; all other states are gcloud's
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LABEL = "tvq_pod"
PASSING_CODES = (4, 8, 10, 13, 14)  # of a failed request (google.rpc.Code): no capacity, or gcloud's own problems
TRIES = 3  # attempts to prepare or start all machines
FOLDER = "tvq_pod"  # in the user's home on a machine

_SAID = re.compile(r"^tvq_pod@(\S+): (\w+) ?(.*)$", re.MULTILINE)


class Queued(NamedTuple):
    """A request for slices: its state and, if it failed, the reason, and whether another request may succeed."""

    state: str
    why: str = ""
    may_help: bool = True


class Said(NamedTuple):
    """A machine's answer: installed, running, exited, gone, none or failed, with details."""

    word: str
    rest: str


class Machines:
    """The machines of one run. Changes of the record are saved immediately."""

    def __init__(
        self,
        record: Record,
        records: Records,
        gcloud: Gcloud,
        poll_seconds: float = 30.0,
        clock: Clock | None = None,
        say: Callable[[str], None] = print,
    ):
        """poll_seconds: how often to check while waiting."""
        self.record, self.records, self.gcloud, self.say = record, records, gcloud, say
        self.poll_seconds, self.clock = poll_seconds, clock or Clock()
        self._said_of_status = ""

    @property
    def expected(self) -> int:
        """The number of machines."""
        return sum(self.record.machines)

    def note(self, again: bool = False, **changes) -> None:
        """Changes the record, here and on disk (see Records.change); in a dry run only here."""
        if not self.gcloud.dry_run:
            self.records.change(self.record, changes, again)
            return
        for name, value in changes.items():  # so that the next output shows what would be done next
            setattr(self.record, name, value)

    # ------------------------------------------------------------------ the slices

    def queue(self) -> Queued:
        """Returns gcloud's state of the request. Raises UserError if it belongs to somebody else, and GcloudError."""
        found = self.gcloud.describe(self.record.name)
        if found is None:
            return Queued(MISSING)
        if self.record.label not in _labels(found):
            raise UserError(
                f"--name={self.record.name}: is taken by a queued resource that this machine did not request; give "
                f"another name, or copy {self.records.path(self.record.name)} from the machine that did"
            )
        state = found.get("state", {})
        error = state.get("failedData", {}).get("error", {})
        may_help = error.get("code", PASSING_CODES[0]) in PASSING_CODES
        return Queued(state.get("state", "STATE_UNSPECIFIED"), " ".join(error.get("message", "").split()), may_help)

    def ask(self, again: bool = False) -> None:
        """Queues the request; for a run that was stopped or is done, only if `again`. Raises GcloudError."""
        record = self.record
        nodes = [f"--node-id={record.name}"]
        if record.slices > 1:
            nodes = [f"--node-count={record.slices}", f"--node-prefix={record.name}"]
        self.note(again, phase=ASKED, asked_at=self.clock.now())
        label = f"--labels={LABEL}={record.label}"
        flags = [*nodes, f"--accelerator-type={record.accelerator}", *record.create_flags, label]
        if self.record.phase != ASKED and not self.gcloud.dry_run:  # stopped meanwhile
            return
        try:
            self.gcloud.create(record.name, flags)
        except GcloudError as error:
            if error.kind != "exists":
                raise
            self.queue()  # refuses a request of somebody else

    def wait_until_active(self) -> None:
        """Waits for the slices, with a line at every change and every ten minutes. Raises UserError if the request
        failed."""
        said, said_at = None, 0.0
        while not self.gcloud.dry_run:
            try:
                state, why, _ = self.queue()
            except GcloudError as error:
                if error.kind != "passing":
                    raise
                state, why = "unknown", str(error)
            now = self.clock.now()
            if state == "ACTIVE":
                break
            if state not in (*WAITING, "unknown"):
                raise UserError(f"--name={self.record.name}: its slice is {state} {f'({why})' if why else ''}")
            if state != said or now - said_at > 600:
                self.say(
                    f"{self.record.name}: {state} since {ago(now - self.record.asked_at)}{f': {why}' if why else ''}"
                )
                said, said_at = state, now
            self.clock.sleep(self.poll_seconds)
        if self.gcloud.dry_run:
            self.queue()
        self.granted()

    def granted(self) -> None:
        """Records that the slices exist, and how many machines they have. Raises GcloudError."""
        now, record = self.clock.now(), self.record
        machines = [len(node.get("networkEndpoints", [])) for node in self.nodes().values()]
        if not all(machines) and not self.gcloud.dry_run:
            raise UserError(f"--name={record.name}: not all slices have their machines yet; try again")
        self.note(machines=machines, waited=now - record.asked_at, refusals=0)
        what = f"{record.slices} x {record.accelerator}" if record.slices > 1 else record.accelerator
        self._tell(f"{record.name}: {what} is ready, {self.expected} machine(s), after {ago(record.waited)}")

    def nodes(self) -> dict[str, dict]:
        """Returns gcloud's description of each slice; {} for one that does not exist. Raises GcloudError."""
        record = self.record
        names = [record.name] if record.slices == 1 else [f"{record.name}-{i}" for i in range(record.slices)]
        return {name: self.gcloud.node(name) or {} for name in names}

    # ------------------------------------------------------------------ the machines

    def prepare(self) -> None:
        """Installs the source and its packages on all machines. Raises UserError with the names of machines that
        failed."""
        said = self._until_all("installed", f"bash {FOLDER}/worker.sh install {shlex.quote(self.record.source)}")
        self.note(phase=PREPARED)
        self._tell(f"{self.record.name}: {self.record.source} is installed on {self.expected} machine(s)")
        self._tell_versions({where: answer.rest.partition(": ")[2] for where, answer in said.items()})

    def start(self) -> None:
        """Starts the training on all machines: the next attempt, or the one whose start was interrupted."""
        record = self.record
        if record.phase != STARTING:
            self.note(phase=STARTING, attempt=record.attempt + 1)
        if record.phase != STARTING and not self.gcloud.dry_run:  # stopped meanwhile, or another command was first
            return
        attempt = f"{record.run_id}-{record.attempt}"
        logs = shlex.quote(f"{record.workdir}/logs")
        self._until_all(("running", "exited"), f"bash {FOLDER}/worker.sh start {attempt} {logs}")
        self.note(phase=STARTED)
        if record.phase == STOPPED:  # meanwhile
            self.stop()
            return
        self._tell(f"{record.name}: started on {self.expected} machine(s), attempt {record.attempt}")

    def states(self, node: str = "all", worker: str = "all") -> dict[str, Said]:
        """Returns the state of the training on each machine. Machines that can't be reached are left out."""
        return self._on(f"bash {FOLDER}/worker.sh state", node, worker)[0]

    def stop(self) -> dict[str, Said]:
        """Asks the training on all machines to save and end, and waits for it."""
        return self._on(f"bash {FOLDER}/worker.sh stop")[0]

    def _tell(self, line: str) -> None:
        if not self.gcloud.dry_run:
            self.say(line)

    def _tell_versions(self, versions: dict[str, str]) -> None:
        """Prints the versions of Python and of the packages that matter, and a warning if machines differ."""
        for found in sorted(set(versions.values())):
            on = sorted(where for where, its in versions.items() if its == found)
            some = f"WARNING: machines differ: {len(on)} of them ({', '.join(on[:3])}) have "
            self._tell(f"{self.record.name}: {some if len(on) < len(versions) else ''}{found}")

    def lacks(self, path: str) -> bool:
        """Returns whether a file certainly does not exist, at gs:// or on a mount that all machines share. False if no
        machine answers, and in a dry run."""
        try:
            if path.startswith("gs://"):
                return self.gcloud.cat(path) is None and not self.gcloud.dry_run
            said = self.gcloud.ssh(self.record.name, f"test -e {shlex.quote(path)} || echo tvq_pod lacks it", "0", "0")
        except GcloudError:
            return False
        return "tvq_pod lacks it" in said

    def forget(self) -> None:
        """Deletes everything that this machine keeps for the run, and the tarball if no other run uses it."""
        self.records.forget(self.record.name)
        others = [self.records.load(name) for name in self.records.names()]
        if all(other.source != self.record.source for other in others if other):
            self.tarball.unlink(missing_ok=True)
        shutil.rmtree(self._upload_folder, ignore_errors=True)

    @property
    def _upload_folder(self) -> pathlib.Path:
        return self.records.folder / f"{self.record.name}.upload"

    def _until_all(self, wanted: str | tuple[str, ...], command: str) -> dict[str, Said]:
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        bad, lost, why = [], 0, ""
        for attempt in range(TRIES):
            said, error = {}, None
            try:
                self._upload()
                said, error = self._on(command)
            except GcloudError as raised:
                error = raised
            bad = [f"{where}: {a.word} {a.rest}".rstrip() for where, a in said.items() if a.word not in wanted]
            if self.gcloud.dry_run or (not bad and len(said) == self.expected):
                return said
            lost = self.expected - len(said)
            why = "; ".join(bad[:3]) or (
                str(error) if error else f"{lost} machine(s) did not answer {self.gcloud.warning}"
            )
            if attempt < TRIES - 1:
                self.say(f"{self.record.name}: {why}; trying again")
                self.clock.sleep(min(self.poll_seconds, 10.0))
        n_bad = len(bad) + max(lost, 0)
        raise UserError(f"--name={self.record.name}: {n_bad} of {self.expected} machine(s) failed: {why}")

    def _on(self, command: str, node: str = "all", worker: str = "all") -> tuple[dict[str, Said], GcloudError | None]:
        error = None
        try:
            output = self.gcloud.ssh(self.record.name, command, node, worker)
        except GcloudError as raised:
            error, output = raised, raised.output
        return {where: Said(word, rest) for where, word, rest in _SAID.findall(output)}, error

    def _upload(self) -> None:
        """Uploads a folder with everything that a machine needs; the command is in a file, so no shell reads its
        arguments."""
        record = self.record
        stage = self._upload_folder / FOLDER
        if not self.gcloud.dry_run:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True, mode=0o700)
            shutil.copy(ROOT / "launch" / "worker.sh", stage)
            try:
                shutil.copy(self.tarball, stage)
            except OSError as error:
                raise UserError(f"--name={record.name}: {self.tarball}: {error.strerror}; `up` makes it") from None
            if record.run_id:
                (stage / "run.sh").write_text(run_script(record))
            for name, env_file in (("env", record.env_file), ("install_env", record.install_env_file)):
                environment = settings_of(env_file) if env_file else {}
                with open(os.open(stage / name, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                    file.writelines(f"export {key}={shlex.quote(value)}\n" for key, value in environment.items())
        self.gcloud.scp(record.name, ["--recurse", str(stage)], "")

    @property
    def tarball(self) -> pathlib.Path:
        """The path of the source on this machine."""
        return self.records.folder / "sources" / f"{self.record.source}.tar.gz"

    # ------------------------------------------------------------------ the run

    def status(self) -> dict | None:
        """Returns the run's own status file (tvq_pod/run/status.py), or None if it has none, or that of another run."""
        record = self.record
        if not record.run_id:
            return None
        path = f"{record.workdir}/status.json"
        try:
            if path.startswith("gs://"):
                text = self.gcloud.cat(path)
            else:
                text = self.gcloud.ssh(record.name, f"cat {shlex.quote(path)}", "0", "0")
        except GcloudError as error:  # the slice's state is enough to continue
            if path.startswith("gs://") and str(error) != self._said_of_status:
                self.say(f"{record.name}: {path} cannot be read ({error})")
            self._said_of_status, text = str(error), None
        try:
            status = json.loads(text or "null")
        except ValueError:
            return None
        return status if isinstance(status, dict) and status.get("run_id") == record.run_id else None


def run_script(record: Record) -> str:
    """Returns the script that a machine's systemd unit runs. Its secrets, if any, are in a file beside it."""
    chip, several = slices.parse(record.accelerator).chip.name, record.slices > 1
    lines = [
        "#!/bin/bash",
        f'cd "$HOME/{FOLDER}/source" || exit 1',
        f'. "$HOME/{FOLDER}/env"',
        f"export TVQ_POD_RUN_ID={shlex.quote(record.run_id)}",
        f'export LIBTPU_INIT_ARGS={shlex.quote(" ".join(libtpu.flags(chip, several)))}" ${{LIBTPU_INIT_ARGS:-}}"',
        f'exec "$HOME/{FOLDER}/venv/bin/python" -m tvq_pod.main {shlex.join(record.arguments)}',
    ]
    return "\n".join(lines) + "\n"


def settings_of(env_file: str) -> dict[str, str]:
    """Returns the settings in a file of NAME=VALUE lines, without any shell syntax. Raises UserError."""
    try:
        lines = pathlib.Path(env_file).expanduser().read_text().splitlines()
    except OSError as error:
        raise UserError(f"{env_file}: cannot be read ({error.strerror}); give a file of NAME=VALUE lines") from None
    settings = [line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for name, equals, _ in settings:
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{env_file}: a line is not NAME=VALUE; give one setting per line, without export")
    return {name: value for name, _, value in settings}


def checked_file(path: str | None) -> str:
    """Returns the absolute path of a file of NAME=VALUE lines; "" for no file. Raises UserError if it is not one."""
    if not path:
        return ""
    settings_of(path)
    return str(pathlib.Path(path).expanduser().resolve())


def _labels(found: dict) -> set[str]:
    specs = found.get("tpu", {}).get("nodeSpec", [])
    return {spec.get("node", {}).get("labels", {}).get(LABEL, "") for spec in specs}
