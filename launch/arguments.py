"""The flags after `run --`, which are for the training. Errors that can be found before anything starts are found
here."""

import difflib
import pathlib
import posixpath

from absl import flags

from tvq_pod.errors import UserError

from .machines import Machines
from .source import ROOT, files

TRAINING = (
    "config",
    "workdir",
    "mode",
    "source",
    "split",
    "prompt",
    "prompt_file",
)  # flags that people forget the -- of

_SHARED = flags.DEFINE_bool("shared_workdir", False, "run: the workdir is on a mount that all machines share.")


def parsed(argv: list[str]) -> list[str]:
    """What is left of the command line without the flags of launch.pod. Raises UserError for a flag that it lacks."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name in TRAINING or name.startswith("config."):
            raise UserError(f"--{name}: is a flag of the training; give it after `run --name=RUN --`") from error
        near = difflib.get_close_matches(name, flags.FLAGS, n=1)
        raise UserError(
            f"--{name}: is not a flag{f'; did you mean --{near[0]}?' if near else '; see --help'}"
        ) from error
    except flags.Error as error:
        raise UserError(f"{str(error).removeprefix('flag ')}; see --help") from error


def _given(arguments: list[str], name: str) -> str | None:
    """Returns the value of a flag for the training, as --name=value or --name value; the last counts, as in absl."""
    found = None
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            found = value if equals else [*arguments, ""][place + 1]
    return found


def _file_flags(arguments: list[str]) -> dict[str, str]:
    """Returns the paths in flags that name files which the machines must have."""
    given = {flag: _given(arguments, flag) for flag in ("config", "prompt_file")}
    if given["config"] and "://" not in given["config"]:
        given["config"] = given["config"].partition(":")[0]  # the rest is an argument of the file's get_config
    return {flag: path for flag, path in given.items() if path is not None}


def _on_mount(path: str) -> bool:
    return _SHARED.value and path.startswith("/")


def check_files(machines: Machines, arguments: list[str]) -> None:
    """Raises UserError if a flag names a file that is not part of what is installed on the machines."""
    source = machines.record.source
    if not source:
        raise UserError(f"--name={machines.record.name}: its machines are not prepared; run `up` first")
    for flag, path in _file_flags(arguments).items():
        if _on_mount(path):
            continue
        known = files(machines.tarball, may_lack=machines.gcloud.dry_run)
        if flag == "config" and f"configs/{path}.py" in known:  # a bundled config, by its name
            path = f"configs/{path}.py"
        inside = posixpath.normpath(path)
        if inside in known:
            if (ROOT / inside).exists() and known[inside] not in (None, (ROOT / inside).read_bytes()):
                machines.say(f"WARNING: --{flag}={path}: differs from the installed {source}; `up` installs it again")
            continue
        here = pathlib.Path(path).resolve()
        if here.is_relative_to(ROOT) and (name := here.relative_to(ROOT).as_posix()) in known:
            raise UserError(f"--{flag}={path}: is a path of this machine; give --{flag}={name}")
        what = f"is not part of {source}, which is installed on the machines; commit it, and run `up` again"
        if not here.is_file():
            near = difflib.get_close_matches(inside, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "give the path of one of its files"
            what = f"does not exist in {source}, which is installed on the machines; {remedy}"
        raise UserError(f"--{flag}={path}: {what}")


def check_elsewhere(machines: Machines, arguments: list[str], workdir: str) -> None:
    """Raises UserError if a file that must be on the shared mount or in the bucket certainly does not exist."""
    named = _file_flags(arguments)
    for flag, path in named.items():
        if _on_mount(path) and machines.lacks(path):
            raise UserError(f"--{flag}={path}: does not exist on the machines; give a file of the mount")
    if "config" not in named and machines.lacks(f"{workdir}/config.json"):
        raise UserError(
            f"-- --config=: is missing, and there is no {workdir}/config.json of an earlier run; give --config"
        )


def workdir_of(arguments: list[str]) -> str:
    """Returns the run's folder. Raises UserError if it is missing or would be deleted with the machines, or if a flag
    is given that `run` adds itself."""
    given = _given(arguments, "workdir")
    if not given:
        raise UserError("-- --workdir=: is missing; give --workdir=gs://BUCKET/RUN after --")
    workdir = given.rstrip("/")
    if not workdir.startswith("gs://") and not (_SHARED.value and workdir.startswith("/")):
        raise UserError(
            f"--workdir={workdir}: is on the machines' own disks, which are deleted with them; give gs://BUCKET/RUN, "
            "or the absolute path of a mount that all share, with --shared_workdir"
        )
    joining = ("multihost", "coordinator_address", "num_processes", "process_id")
    own = [a for a in arguments if a.lstrip("-").partition("=")[0] in joining]
    if own:
        raise UserError(f"{own[0]}: is set by the machines, from Cloud TPU's metadata; leave it out")
    return workdir
