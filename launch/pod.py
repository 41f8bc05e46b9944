"""Takes a run from gcloud to a pod that trains until it is done.

    python -m launch.pod doctor --zone=us-west4-a --accelerator=v5litepod-16 --spot --bucket=gs://BUCKET
    python -m launch.pod up --name=RUN --zone=us-west4-a --accelerator=v5litepod-16 --spot
    python -m launch.pod run --name=RUN -- --config=configs/enwik8.py --workdir=gs://BUCKET/RUN
    python -m launch.pod watch --name=RUN
    python -m launch.pod status | logs | ssh | stop | down

gcloud must be on the PATH and logged in; of Python packages, absl-py and filelock are enough. You can repeat every
command at any time: what exists stays, and what would disturb a training is refused. --dry_run prints the gcloud
commands and runs none of them. The help of each flag begins with the commands that it is for.
"""

import pathlib
import secrets
import shlex
import subprocess
import sys
import time

if not __package__:  # python launch/pod.py: modules are imported from the project's folder, not from launch
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
    __package__ = "launch"

from absl import app, flags

from tvq_pod.errors import UserError
from tvq_pod.host.terminal import tell

from . import arguments as training
from . import slices
from .clock import ago
from .doctor import FIX, examine
from .gcloud import Gcloud, GcloudError
from .machines import MISSING, Machines, checked_file
from .record import ASKED, DONE, PREPARED, STARTED, STARTING, STOPPED, Gone, Record, Records
from .request import asked_for, looked_for, planned
from .show import HEADS, goodput, progress, row
from .source import pack
from .watch import Watch

_NAME = flags.DEFINE_string("name", None, "The name of the run and of its slice.")
_DIRTY = flags.DEFINE_bool("allow_dirty", False, "up: install files that differ from the commit, under another name.")
_ENV_FILE = flags.DEFINE_string("env_file", None, "run: a file of NAME=VALUE lines for the training, such as keys.")
_INSTALL_ENV = flags.DEFINE_string("install_env_file", None, "up: a file of NAME=VALUE lines for pip on machines.")
_POLL = flags.DEFINE_float("poll_seconds", 30.0, "up, watch: seconds between two looks at the slice.", lower_bound=0.0)
_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 3, "watch: give up after this many failures with no newer checkpoint.", lower_bound=0
)
_DOWN = flags.DEFINE_bool("then_down", False, "watch: give the slice back when the run is done.")
_WORKER = flags.DEFINE_integer("worker", 0, "logs, ssh: which machine, counted from 0.", lower_bound=0)
_LINES = flags.DEFINE_integer("lines", 50, "logs: how many of the last lines.", lower_bound=1)
_FOLLOW = flags.DEFINE_bool("follow", False, "logs: continue with new lines as they are written.")
_YES = flags.DEFINE_bool("yes", False, "down: delete without asking.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the gcloud commands and run none of them.")
_BUCKET = flags.DEFINE_string("bucket", None, "doctor: the bucket, gs://BUCKET; by default that of the run's workdir.")
_RECORDS = flags.DEFINE_string("records", "~/.tvq_pod", "Folder of what this machine knows of its runs.")
for _name in ("request", "arguments"):  # whose flags --help shows, too
    flags.adopt_module_key_flags(sys.modules[f"{__package__}.{_name}"])


def _say(line: str) -> None:
    print(line, flush=True)


def _gcloud(record: Record) -> Gcloud:
    return Gcloud(record.project, record.zone, _DRY_RUN.value, tuple(record.ssh_flags), _say)


def _machines(record: Record, records: Records) -> Machines:
    return Machines(record, records, _gcloud(record), _POLL.value, say=_say)


def _own(records: Records) -> Machines:
    """Returns the machines of --name. A dry run may come before `up`: it shows what would follow `up`."""
    name = slices.check_name(_NAME.value)
    if _DRY_RUN.value and records.load(name) is None:
        _say(f"# {name} does not exist yet: `up` comes first")
        return _machines(planned(name, pack(records.folder / "sources", allow_dirty=True, write=False)), records)
    return _machines(records.get(name), records)


# ---------------------------------------------------------------------- doctor


def doctor(records: Records) -> None:
    """Prints what would stop the other commands, and how to fix it; exits with 1 if something must be fixed."""
    name = slices.check_name(_NAME.value) if _NAME.value else None
    dry = _DRY_RUN.value

    def connect() -> Gcloud:
        return Gcloud(None, None, dry, say=_say)

    def default(setting: str) -> str:
        try:
            return connect().default(setting)
        except UserError:
            return ""  # the checks below report gcloud's problems

    record = looked_for(name, records.load(name) if name else None, default)
    workdir = _BUCKET.value or (record.workdir if record.workdir.startswith("gs://") else "")
    bucket = "gs://" + workdir.removeprefix("gs://").partition("/")[0] if workdir else None
    n_found = n_bad = 0
    for found in examine(lambda: _gcloud(record), record, bucket):
        n_found, n_bad = n_found + 1, n_bad + (found.state == FIX)
        if not dry:
            _say(f"{found.state:<6}{' '.join(found.text.split())}")
    if n_bad and not dry:
        _say(f"{n_bad} of {n_found} must be fixed")
        sys.exit(1)


# ---------------------------------------------------------------------- up


def up(records: Records) -> None:
    """Requests the slice, waits for it, and prepares its machines."""
    name = slices.check_name(_NAME.value)
    record = asked_for(name, records.load(name), Gcloud(None, None, _DRY_RUN.value, say=_say).default)
    for flag, value in (("project", record.project), ("zone", record.zone)):
        if not value and not _DRY_RUN.value:
            raise UserError(f"--{flag}=: is missing, and gcloud has no default; give --{flag}")
    machines = _machines(record, records)
    installs_with = record.install_env_file if _INSTALL_ENV.value is None else checked_file(_INSTALL_ENV.value)
    source = pack(records.folder / "sources", _DIRTY.value, write=not _DRY_RUN.value)
    if records.load(record.name) is None and not _DRY_RUN.value:
        records.save(record)
    state, why, _ = machines.queue()
    trains = state not in (MISSING, "SUSPENDED", "FAILED") and record.phase in (STARTING, STARTED)
    if trains and not _DRY_RUN.value:
        raise UserError(f"--name={record.name}: is training; to install another commit, `stop` it first")
    machines.note(source=source, install_env_file=installs_with)
    if state in ("SUSPENDED", "FAILED"):
        _say(f"{record.name}: {state}{f' ({why})' if why else ''}; deleting the request, and requesting it again")
        machines.gcloud.delete(record.name)
    if state in (MISSING, "SUSPENDED", "FAILED"):
        machines.ask(again=True)
    machines.wait_until_active()
    machines.prepare()
    _say(f"next: python -m launch.pod run --name={record.name} -- --config=FILE --workdir=gs://BUCKET/{record.name}")


# ---------------------------------------------------------------------- run


def run(records: Records, arguments: list[str]) -> None:
    """Starts the training on all machines."""
    machines = _own(records)
    record = machines.record
    workdir = training.workdir_of(arguments)
    training.check_files(machines, arguments)
    environment = checked_file(_ENV_FILE.value)
    if not machines.gcloud.dry_run:
        _check_idle(machines)
        training.check_elsewhere(machines, arguments, workdir)
    extra = ["--multihost"]
    if record.slices > 1 and not any(a.startswith("--config.mesh.slices") for a in arguments):
        extra.append(f"--config.mesh.slices={record.slices}")
    machines.note(
        again=True,
        run_id=secrets.token_hex(6),
        arguments=[*arguments, *extra],
        workdir=workdir,
        env_file=environment,
        phase=PREPARED,
        attempt=0,
        failures=0,
        restarts=0,
        saved_step=-1,
    )
    machines.start()
    _say(f"next: python -m launch.pod watch --name={record.name}")


def _check_idle(machines: Machines) -> None:
    """Raises UserError unless all machines are prepared, and all report that nothing is running."""
    record = machines.record
    queued = machines.queue()
    if queued.state != "ACTIVE":
        raise UserError(f"--name={record.name}: its slice is {queued.state}; run `up` first")
    if record.phase == ASKED or not record.machines:
        raise UserError(f"--name={record.name}: its machines are not prepared; run `up` first")
    states = machines.states()
    running = [where for where, said in states.items() if said.word == "running"]
    if running:
        raise UserError(f"--name={record.name}: is already training on {len(running)} machine(s); `stop` it first")
    if len(states) < machines.expected:
        answered = f"only {len(states)} of {machines.expected} machine(s) answered"
        raise UserError(f"--name={record.name}: {answered}; try again")


# ---------------------------------------------------------------------- watch


def watch(records: Records) -> None:
    """Keeps the training running until it is done."""
    machines = _own(records)
    name = machines.record.name
    if not machines.record.run_id and not machines.gcloud.dry_run:
        raise UserError(f"--name={name}: there is nothing to watch; start it with `run` first")
    if machines.gcloud.dry_run:
        if not machines.record.run_id:
            _say("# nothing is running yet: `run` comes first, and sets RUN_ID and gs://BUCKET/RUN")
            machines.note(run_id="RUN_ID", workdir="gs://BUCKET/RUN")
        Watch(machines, _RESTARTS.value).run()
        return
    said = False
    while True:
        with records.held(name) as alone:
            if alone:
                try:
                    Watch(machines, _RESTARTS.value).run()
                except Gone:
                    _say(f"{name}: was deleted by `down`")
                    return
                break
        if not said:
            _say(f"{name}: another process of this machine watches it; waiting, to take over if that one ends")
        said = True
        time.sleep(min(_POLL.value, 5.0) or 0.1)
    record = machines.record
    if record.phase == STOPPED:
        _say(f"{name}: was stopped by hand; `run` starts it again")
    elif _DOWN.value:
        _say(f"{name}: done")
        _give_back(machines)
    else:
        _say(f"{name}: done. Its slice still exists and costs money: python -m launch.pod down --name={name}")


# ---------------------------------------------------------------------- status, logs, ssh


def status(records: Records) -> None:
    """Prints a line for each run; with --name, also where its time went."""
    names = [slices.check_name(_NAME.value)] if _NAME.value else records.names()
    rows: list[tuple[str, ...]] = [HEADS]
    time_spent = ""
    for name in names:
        try:
            machines = _own(records) if _NAME.value else _machines(records.get(name), records)
            said = machines.status()
            rows.append(row(machines, said))
            time_spent = goodput(said) if _NAME.value else ""
        except UserError as error:
            if _NAME.value:
                raise
            rows.append((name, str(error), *[""] * (len(HEADS) - 2)))
    if _DRY_RUN.value:
        return
    if not names:
        _say(f"no runs in {_RECORDS.value}: `up` adds one")
        return
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    for cells in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if time_spent:
        _say(time_spent)


def _place(machines: Machines) -> tuple[str, str]:
    """Returns gcloud's numbers for the slice of --worker, and for the machine in it."""
    worker = _WORKER.value
    for node, n_machines in enumerate(machines.record.machines or [1]):
        if worker < n_machines:
            return str(node), str(worker)
        worker -= n_machines
    raise UserError(f"--worker={_WORKER.value}: does not exist; give 0 to {machines.expected - 1}")


def logs(records: Records) -> None:
    """Prints the training's own lines, from the machine, or from the bucket if the machine does not exist."""
    machines = _own(records)
    record, (node, worker) = machines.record, _place(machines)
    follow = " --follow" if _FOLLOW.value else ""
    command = machines.gcloud.ssh_command(record.name, node, worker)
    command.append(f"--command=sudo journalctl --unit=tvq_pod.service --output=cat --lines={_LINES.value}{follow}")
    if machines.gcloud.dry_run:
        _say(shlex.join(command))
        return
    if machines.queue().state == "ACTIVE":
        sys.exit(subprocess.call(command))
    name = record.name if record.slices == 1 else f"{record.name}-{node}"
    path = f"{record.workdir}/logs/{name}-{worker}.attempt-{record.run_id}-{record.attempt}.log"
    text = machines.gcloud.cat(path) if path.startswith("gs://") else None
    if text is None:
        raise UserError(f"--name={record.name}: its slice does not exist, and neither does {path}")
    _say("\n".join(text.splitlines()[-_LINES.value :]))


def ssh(records: Records, arguments: list[str]) -> None:
    """Opens a shell on a machine, or runs one command."""
    machines = _own(records)
    command = machines.gcloud.ssh_command(machines.record.name, *_place(machines))
    command.remove("--quiet")
    if arguments:
        command.append(f"--command={shlex.join(arguments)}")
    if machines.gcloud.dry_run:
        _say(shlex.join(command))
        return
    sys.exit(subprocess.call(command))


# ---------------------------------------------------------------------- stop, down


def stop(records: Records) -> None:
    """Lets the training save and end. The slice is kept, and watch does not start the training again."""
    machines = _own(records)
    name = machines.record.name
    if not machines.record.run_id and not machines.gcloud.dry_run:
        raise UserError(f"--name={name}: there is nothing to stop; start it with `run` first")
    machines.note(phase=STOPPED)  # first, so that watch does not mistake what follows for a preemption
    state = machines.queue().state
    if machines.gcloud.dry_run:
        machines.stop()
        return
    if state != "ACTIVE":
        _say(f"{name}: is not running, its slice is {state}; watch will not start it")
        return
    said = machines.stop()
    ended = [answer for answer in said.values() if answer.word in ("exited", "gone", "none")]
    if len(ended) < machines.expected:
        answered = f"only {len(ended)} of {machines.expected} machine(s) reported that it ended"
        raise UserError(f"--name={name}: {answered}; try again")
    _say(f"{name}: ended; {progress(machines.status())}. Its slice still exists and costs money")


def down(records: Records) -> None:
    """Deletes the slice, and this machine's record of the run."""
    machines = _own(records)
    record = machines.record
    state = machines.queue().state
    seen = machines.status() if state != MISSING else None
    what = f"{record.slices} slice(s) {record.accelerator}, {machines.expected} machine(s) and their disks"
    _say(f"deletes {what}, and what this machine knows of {record.name}. {record.workdir or 'The workdir'} stays.")
    waited = f", the last one after {ago(record.waited)}" if record.waited else ""
    kind = "spot capacity, which may not be available" if record.spot else "capacity"
    _say(f"to get it back: up and run again, {kind}{waited}.")
    if seen and seen["state"] == "training":
        _say(f"it is training: {progress(seen)}; it is asked to save first.")
    if not (_YES.value or machines.gcloud.dry_run):
        if not sys.stdin.isatty():
            raise UserError("--yes=False: there is no terminal to ask on; give --yes")
        if input("delete? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was deleted")
    _give_back(machines, state)


def _give_back(machines: Machines, state: str = "ACTIVE") -> None:
    record = machines.record
    if record.phase not in (DONE, STOPPED):
        machines.note(again=True, phase=STOPPED)
        if state == "ACTIVE" or machines.gcloud.dry_run:
            machines.stop()
    if state != MISSING or machines.gcloud.dry_run:
        try:
            machines.gcloud.delete(record.name, force=True)
        except GcloudError as error:
            if error.kind != "missing":
                raise
    if machines.gcloud.dry_run:
        return
    machines.forget()
    _say(f"{record.name}: deleted")


COMMANDS = ("doctor", "up", "run", "watch", "status", "logs", "ssh", "stop", "down")


def main(argv: list[str]) -> None:
    """Runs a command. argv: the program, the command, and arguments for the training or the shell."""
    commands = dict(doctor=doctor, up=up, watch=watch, status=status, logs=logs, stop=stop, down=down)
    with_arguments = dict(run=run, ssh=ssh)
    if len(argv) < 2 or argv[1] not in COMMANDS:
        what = f"{argv[1]}: is not a command" if argv[1:] else "the command is missing"
        raise UserError(f"{what}; give one of {', '.join(COMMANDS)}")
    command, arguments, records = argv[1], argv[2:], Records(_RECORDS.value)
    if command in with_arguments:
        with_arguments[command](records, arguments)
    elif arguments:
        raise UserError(f"{arguments[0]}: {command} takes only flags, as --name=value")
    else:
        commands[command](records)


def start() -> None:
    """Runs the command line of `python -m launch.pod`."""
    try:
        app.run(main, flags_parser=training.parsed)
    except UserError as error:
        tell("error: " + " ".join(str(error).split()))
        sys.exit(1)
    except KeyboardInterrupt:
        tell("interrupted: nothing is lost; the same command resumes")
        sys.exit(130)


if __name__ == "__main__":
    start()
