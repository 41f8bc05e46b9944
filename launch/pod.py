"""From gcloud to a pod that trains until it is done.

    python -m launch.pod up --name=RUN --zone=us-west4-a --accelerator=v5litepod-16 --spot
    python -m launch.pod run --name=RUN -- --config=configs/enwik8.py --workdir=gs://BUCKET/RUN
    python -m launch.pod watch --name=RUN
    python -m launch.pod status | logs | ssh | stop | down

Needs gcloud on the PATH and logged in, and nothing else of this project's packages but absl. Every command may be
given again at any time: what is there already stays. --dry_run prints the commands, and does none of them.
"""

import pathlib
import secrets
import shlex
import subprocess
import sys
import time

from absl import app, flags

from launch import slices
from launch.clock import ago
from launch.gcloud import Gcloud, GcloudError
from launch.machines import MISSING, Machines, settings_of
from launch.record import ASKED, DONE, PREPARED, STARTED, STARTING, STOPPED, Gone, Record, Records
from launch.source import pack
from launch.watch import Watch, progress
from tvq_pod.errors import UserError

_NAME = flags.DEFINE_string("name", None, "The run's name, and that of its slice.")
_PROJECT = flags.DEFINE_string("project", None, "up: Google Cloud project; gcloud's default if not given.")
_ZONE = flags.DEFINE_string("zone", None, "up: as us-west4-a; gcloud's default if not given.")
_ACCELERATOR = flags.DEFINE_string("accelerator", None, "up: the slice's type, as v5litepod-256 or v5p-128.")
_SLICES = flags.DEFINE_integer("slices", 1, "up: how many of them, for one job.", lower_bound=1)
_SPOT = flags.DEFINE_bool("spot", False, "up: cheaper, and may be taken back at any time.")
_RESERVED = flags.DEFINE_bool("reserved", False, "up: from the project's reservation.")
_RUNTIME = flags.DEFINE_string("runtime_version", None, "up: what the machines boot; the chip's own if not given.")
_NETWORK = flags.DEFINE_string("network", None, "up: the machines' network.")
_SUBNETWORK = flags.DEFINE_string("subnetwork", None, "up: the machines' subnetwork.")
_ACCOUNT = flags.DEFINE_string("service_account", None, "up: as whom the machines reach the bucket.")
_INTERNAL = flags.DEFINE_bool("internal_ips", False, "up: no external addresses; wants --tunnel_through_iap, mostly.")
_IAP = flags.DEFINE_bool("tunnel_through_iap", False, "up: ssh goes through Identity-Aware Proxy.")
_UNTIL = flags.DEFINE_string("valid_until_duration", None, "up: give up waiting for the slice after this, as 6h.")
_DIRTY = flags.DEFINE_bool("allow_dirty", False, "up: install files that differ from the commit, under another name.")
_ENV_FILE = flags.DEFINE_string("env_file", None, "run: a file of NAME=VALUE for the training, such as keys; mode 600.")
_SHARED = flags.DEFINE_bool("shared_workdir", False, "run: the workdir is a mount that all machines share.")
_POLL = flags.DEFINE_float("poll_seconds", 30.0, "up, watch: how often to look.", lower_bound=0.0)
_RESTARTS = flags.DEFINE_integer("max_restarts", 3, "watch: after failures with no newer checkpoint.", lower_bound=0)
_DOWN = flags.DEFINE_bool("then_down", False, "watch: give the slice back when the run is done.")
_WORKER = flags.DEFINE_integer("worker", 0, "logs, ssh: which machine, counted over all slices.", lower_bound=0)
_LINES = flags.DEFINE_integer("lines", 50, "logs: how many of the last ones.", lower_bound=1)
_FOLLOW = flags.DEFINE_bool("follow", False, "logs: and what comes.")
_YES = flags.DEFINE_bool("yes", False, "down: don't ask.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands and do none of them.")
_RECORDS = flags.DEFINE_string("records", "~/.tvq_pod", "Where this machine keeps what it knows of its runs.")


def _say(line: str) -> None:
    print(line, flush=True)


def _gcloud(record: Record) -> Gcloud:
    return Gcloud(record.project, record.zone, _DRY_RUN.value, tuple(record.ssh_flags), _say)


def _machines(record: Record, records: Records) -> Machines:
    return Machines(record, records, _gcloud(record), _POLL.value, say=_say)


def _own(records: Records) -> Machines:
    return _machines(records.get(slices.check_name(_NAME.value)), records)


# ---------------------------------------------------------------------- up


def up(records: Records) -> None:
    """Asks for the slice, waits for it, and prepares its machines."""
    record = _asked_for(records)
    machines = _machines(record, records)
    source = pack(records.folder / "sources", _DIRTY.value, write=not _DRY_RUN.value)
    if records.load(record.name) is None and not _DRY_RUN.value:
        records.save(record)
    state, why, _ = machines.queue()
    trains = state not in (MISSING, "SUSPENDED", "FAILED") and record.phase in (STARTING, STARTED)
    if trains and not _DRY_RUN.value:
        raise UserError(f"--name={record.name}: has been started; to install another commit, `stop` first")
    machines.note(source=source)
    record.source = source
    if state in ("SUSPENDED", "FAILED"):
        _say(f"{record.name}: {state}{f' ({why})' if why else ''}; deletes the request, and asks again")
        machines.gcloud.delete(record.name)
    if state in (MISSING, "SUSPENDED", "FAILED"):
        machines.ask(again=True)
    machines.wait_until_active()
    machines.prepare()
    _say(f"next: python -m launch.pod run --name={record.name} -- --config=FILE --workdir=gs://BUCKET/{record.name}")


_CREATE_FLAGS = (
    "runtime_version",
    "spot",
    "reserved",
    "network",
    "subnetwork",
    "service_account",
    "valid_until_duration",
    "internal_ips",
)


def _asked_for(records: Records) -> Record:
    """The record of the flags; or the one that is there, if they don't ask for something else."""
    name = slices.check_name(_NAME.value)
    there = records.load(name)
    if _ACCELERATOR.value is None and there is None:
        raise UserError("--accelerator=: must be given, as v5litepod-16, v5p-128 or v6e-256")
    asked = slices.parse(_ACCELERATOR.value or there.accelerator)
    if _SPOT.value and _RESERVED.value:
        raise UserError("--spot --reserved: must be one of them, or none")
    create = [f"--runtime-version={_checked('runtime_version', asked.chip.runtime_version)}"]
    for flag in _CREATE_FLAGS[1:]:
        value = flags.FLAGS[flag].value
        if value:
            create.append(f"--{flag.replace('_', '-')}" + ("" if value is True else f"={_checked(flag)}"))
    record = Record(
        name=name,
        project=_checked("project"),
        zone=_checked("zone"),
        accelerator=asked.accelerator,
        slices=_SLICES.value,
        create_flags=create,
        ssh_flags=["--tunnel-through-iap"] if _IAP.value else [],
        spot=_SPOT.value,
    )
    if there is None:
        return _with_defaults(record)
    present = [flag for flag in flags.FLAGS if flags.FLAGS[flag].present]
    fields = dict(dict.fromkeys(_CREATE_FLAGS, "create_flags"), tunnel_through_iap="ssh_flags")
    fields |= {flag: flag for flag in ("project", "zone", "accelerator", "slices")}
    for flag in present:
        field = fields.get(flag)
        if field and getattr(there, field) != getattr(record, field):
            raise UserError(
                f"--{flag}: the run {name} was asked for with {getattr(there, field)}; give another --name, or `down` "
                "first"
            )
    return there


def _with_defaults(record: Record) -> Record:
    """Project and zone are gcloud's where they are not given, and stay what they are now."""
    gcloud = _gcloud(record)
    record.project = record.project or gcloud.default("core/project") or None
    record.zone = record.zone or gcloud.default("compute/zone") or None
    for flag, value in (("project", record.project), ("zone", record.zone)):
        if not value and not _DRY_RUN.value:
            raise UserError(f"--{flag}=: must be given; gcloud has no default either")
    return record


_PATTERNS = {
    "project": (r"[a-z][-a-z0-9:.]{4,61}[a-z0-9]", "my-project-123"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]+[0-9]*", "us-west4-a"),
    "runtime_version": (r"[a-z0-9][-a-z0-9.]*", "v2-alpha-tpuv5-lite"),
    "network": (r"[-a-zA-Z0-9_./]+", "default"),
    "subnetwork": (r"[-a-zA-Z0-9_./]+", "default"),
    "service_account": (r"[-a-zA-Z0-9_.@]+", "trainer@my-project.iam.gserviceaccount.com"),
    "valid_until_duration": (r"([0-9]+[smhd])+", "6h"),
}


def _checked(flag: str, default: str | None = None) -> str | None:
    value = flags.FLAGS[flag].value
    return default if value is None else slices.check_value(flag, value, *_PATTERNS[flag])


# ---------------------------------------------------------------------- run


def run(records: Records, arguments: list[str]) -> None:
    """Starts the training on all machines."""
    machines = _own(records)
    record = machines.record
    workdir = _workdir(arguments)
    joining = ("multihost", "coordinator_address", "num_processes", "process_id")
    own = [a for a in arguments if a.lstrip("-").partition("=")[0] in joining]
    if own:
        raise UserError(f"{own[0]}: must be left out; the machines find each other by Cloud TPU's metadata")
    environment = str(pathlib.Path(_ENV_FILE.value).expanduser().resolve()) if _ENV_FILE.value else ""
    if environment:
        settings_of(environment)
    if not machines.gcloud.dry_run:
        _check_idle(machines)
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
    """Raises UserError unless all machines are prepared, and all say that nothing runs there."""
    record = machines.record
    queued = machines.queue()
    if queued.state != "ACTIVE":
        raise UserError(f"--name={record.name}: its slice is {queued.state}; `up` first")
    if record.phase == ASKED or not record.machines:
        raise UserError(f"--name={record.name}: its machines are not prepared; `up` first")
    states = machines.states()
    running = [where for where, said in states.items() if said.word == "running"]
    if running:
        raise UserError(f"--name={record.name}: trains already, on {len(running)} machine(s); `stop` first")
    if len(states) < machines.expected:
        answered = f"only {len(states)} of {machines.expected} machine(s) answered"
        raise UserError(f"--name={record.name}: {answered}; try again")


def _workdir(arguments: list[str]) -> str:
    given = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("workdir=")]
    if not given or not given[-1]:
        raise UserError("-- --workdir=: must be given behind --, as --workdir=gs://BUCKET/RUN")
    workdir = given[-1].rstrip("/")
    if not workdir.startswith("gs://") and not (_SHARED.value and workdir.startswith("/")):
        raise UserError(
            f"--workdir={workdir}: is on the machines' own disks, which go with them; give gs://BUCKET/RUN, or the "
            "absolute path of a mount that all share, with --shared_workdir"
        )
    return workdir


# ---------------------------------------------------------------------- watch


def watch(records: Records) -> None:
    """Until the run is done."""
    machines = _own(records)
    name = machines.record.name
    if not machines.record.run_id:
        raise UserError(f"--name={name}: there is nothing to watch; `run` first")
    said = False
    while True:
        with records.held(name) as alone:
            if alone or machines.gcloud.dry_run:
                try:
                    Watch(machines, _RESTARTS.value).run()
                except Gone:
                    _say(f"{name}: was deleted by `down`")
                    return
                break
        if not said:
            _say(f"{name}: another process of this machine watches it; this one waits, and goes on if that one ends")
        said = True
        time.sleep(min(_POLL.value, 5.0) or 0.1)
    record = machines.record
    if machines.gcloud.dry_run:
        return
    if record.phase == STOPPED:
        _say(f"{name}: was stopped by hand; `run` starts it again")
    elif _DOWN.value:
        _say(f"{name}: done")
        _give_back(machines)
    else:
        _say(f"{name}: done. Its slice is still there, and costs: python -m launch.pod down --name={name}")


# ---------------------------------------------------------------------- status, logs, ssh


def status(records: Records) -> None:
    """A line for each run."""
    names = [slices.check_name(_NAME.value)] if _NAME.value else records.names()
    rows = [("run", "slice", "queue", "training", "step", "tokens/s", "loss", "saved")]
    for name in names:
        try:
            rows.append(_row(_machines(records.get(name), records)))
        except UserError as error:
            if _NAME.value:
                raise
            rows.append((name, str(error), *[""] * 6))
    if _DRY_RUN.value:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(machines: Machines) -> tuple[str, ...]:
    record = machines.record
    what = f"{record.slices}x{record.accelerator}" if record.slices > 1 else record.accelerator
    what += " spot" if record.spot else ""
    try:
        queue = machines.queue().state
    except UserError as error:
        queue = error.kind if isinstance(error, GcloudError) else "not ours"
    try:
        seen = machines.status() or {}
    except GcloudError:
        seen = {}
    saved = "-"
    if seen.get("saved_step") is not None:
        saved = f"step {seen['saved_step']}, {ago(max(0.0, time.time() - seen['saved_at']))} ago"
    training = seen.get("state", "-")
    if training == "training":
        training += f" ({ago(max(0.0, time.time() - seen['time']))} ago)"
    step = f"{seen['step']}/{seen['num_steps']}" if "step" in seen else "-"
    number = lambda name, form: form.format(seen[name]) if seen.get(name) is not None else "-"  # noqa: E731
    return (
        record.name,
        what,
        queue.lower(),
        training,
        step,
        number("tokens_per_second", "{:,.0f}"),
        number("loss", "{:.4f}"),
        saved,
    )


def _place(machines: Machines) -> tuple[str, str]:
    """Of --worker: gcloud's numbers of its slice, and of the machine in it."""
    worker = _WORKER.value
    for node, n_machines in enumerate(machines.record.machines or [1]):
        if worker < n_machines:
            return str(node), str(worker)
        worker -= n_machines
    raise UserError(f"--worker={_WORKER.value}: must be 0 .. {machines.expected - 1}")


def logs(records: Records) -> None:
    """The training's own lines: from the machine, or if that is gone, from the bucket."""
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
        raise UserError(f"--name={record.name}: its slice is gone, and there is no {path}")
    _say("\n".join(text.splitlines()[-_LINES.value :]))


def ssh(records: Records, arguments: list[str]) -> None:
    """A shell on a machine, or one command."""
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
    """The training saves and ends; the slice stays, and watch does not start it again."""
    machines = _own(records)
    name = machines.record.name
    if not machines.record.run_id:
        raise UserError(f"--name={name}: there is nothing to stop; `run` first")
    machines.note(phase=STOPPED)  # first: watch must not take what follows for a preemption
    state = machines.queue().state
    if machines.gcloud.dry_run:
        machines.stop()
        return
    if state != "ACTIVE":
        _say(f"{name}: does not run, its slice is {state}; watch will not start it")
        return
    said = machines.stop()
    ended = [answer for answer in said.values() if answer.word in ("exited", "gone", "none")]
    if len(ended) < machines.expected:
        answered = f"only {len(ended)} of {machines.expected} machine(s) said that it ended"
        raise UserError(f"--name={name}: {answered}; try again")
    _say(f"{name}: ended; {progress(machines.status())}. Its slice is still there, and costs")


def down(records: Records) -> None:
    """Deletes the slice, and what this machine knows of the run."""
    machines = _own(records)
    record = machines.record
    state = machines.queue().state
    seen = machines.status() if state != MISSING else None
    what = f"{record.slices} slice(s) {record.accelerator}, {machines.expected} machine(s) and their disks"
    _say(f"deletes {what}, and what this machine knows of {record.name}. {record.workdir or 'No workdir'} stays.")
    waited = f", the last one after {ago(record.waited)}" if record.waited else ""
    kind = "spot capacity, which may not be there" if record.spot else "capacity"
    _say(f"to get it back: up and run again, {kind}{waited}.")
    if seen and seen["state"] == "training":
        _say(f"it trains: {progress(seen)}; it is asked to save first.")
    if not (_YES.value or machines.gcloud.dry_run):
        if not sys.stdin.isatty():
            raise UserError("--yes: must be given where nobody can be asked")
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


# ----------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """argv: the program, the command, and what is for the training or the shell."""
    commands = dict(up=up, run=run, watch=watch, status=status, logs=logs, ssh=ssh, stop=stop, down=down)
    if len(argv) < 2 or argv[1] not in commands:
        raise UserError(f"{' '.join(argv[1:2]) or 'no command'}: must be one of {', '.join(commands)}")
    command, arguments, records = argv[1], argv[2:], Records(_RECORDS.value)
    if command in ("run", "ssh"):
        commands[command](records, arguments)
    elif arguments:
        raise UserError(f"{arguments[0]}: {command} takes flags only, as --name=value")
    else:
        commands[command](records)


def start() -> None:
    """What `python -m launch.pod` calls."""
    try:
        app.run(main)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: nothing is lost; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    start()
