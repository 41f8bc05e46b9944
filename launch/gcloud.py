"""Calls gcloud as a program: its commands, and the meaning of its errors. Only this file starts it.

Flags are those of the GA commands `gcloud compute tpus queued-resources` and `gcloud compute tpus tpu-vm`; the tests
hold a table of them. Values are arguments of a process and never pass through a local shell; commands for a worker do
pass through a shell there, and the caller quotes them.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable

from tvq_pod.errors import UserError

ANSWER_SECONDS, WORK_SECONDS = 120.0, 1800.0  # time limits for gcloud, for a question and for work
ALIVE = ("-oServerAliveInterval=15", "-oServerAliveCountMax=4")  # ssh to a machine that is gone ends within a minute
TRIES = 3  # for a question that fails temporarily; gcloud also retries by itself

# Parts of gcloud's messages, by kind of error. The first match counts. (After "denied" or "not found" it names the
# "active account", which is not a sign of a missing login.)
_SIGNS = {
    "missing": ("NOT_FOUND", "matched no objects", "not found: 404"),
    "login": ("not currently have an active account", "UNAUTHENTICATED", "gcloud auth login", "Reauthentication"),
    "exists": ("ALREADY_EXISTS",),
    "capacity": ("no more capacity", "stockout", "ZONE_RESOURCE_POOL_EXHAUSTED"),
    "quota": ("RESOURCE_EXHAUSTED", "Quota limit", "QUOTA_EXCEEDED"),
    "denied": ("PERMISSION_DENIED", "SERVICE_DISABLED", "has not been used in project", "HTTPError 403"),
    "passing": (
        "UNAVAILABLE",
        "HttpError",
        "DEADLINE_EXCEEDED",
        "ABORTED",
        "INTERNAL",
        "ConnectionError",
        "Connection reset",
        "timed out",
        "network connectivity",
        "cannot be currently connected to",
    ),
}


class GcloudError(UserError):
    """gcloud failed. kind: one of missing, login, exists, capacity, quota, denied, passing, other. output: what it
    printed before it failed."""

    def __init__(self, command: list[str], code: int, said: str):
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        begin = next((i for i, line in enumerate(lines) if line.startswith("ERROR:")), max(len(lines) - 1, 0))
        message = re.search(r'"message": "((?:[^"\\\\]|\\\\.)*)"', said)  # from a failed operation
        self.output = ""
        self.kind = next((kind for kind, signs in _SIGNS.items() if any(sign in said for sign in signs)), "other")
        n_lines = 1 if self.kind == "login" else 3
        text = message[1] if message else " ".join(lines[begin : begin + n_lines]) or f"exit code {code}"
        text = re.sub(r"^ERROR: \([\w.-]+\) ", "", text)
        super().__init__(f"{' '.join(command[:5])}: {text}{_HELP.get(self.kind, '')}")


_HELP = {
    "login": " (gcloud auth login)",
    "quota": " (the project's quota: ask for more at console.cloud.google.com/iam-admin/quotas, or take fewer chips)",
    "denied": " (gcloud services enable tpu.googleapis.com, and the role roles/tpu.admin)",
}


class Gcloud:
    """gcloud's commands, for one project and zone. In a dry run they are printed and not run."""

    def __init__(
        self,
        project: str | None,
        zone: str | None,
        dry_run: bool = False,
        ssh_flags: tuple[str, ...] = (),
        say: Callable[[str], None] = print,
    ):
        """project: gcloud's own default if None. ssh_flags: flags for every ssh and scp, such as
        --tunnel-through-iap."""
        self._where = [f"--{name}={value}" for name, value in (("project", project), ("zone", zone)) if value]
        self._project = self._where[: 1 if project else 0]
        self.dry_run, self._ssh_flags, self._say = dry_run, list(ssh_flags), say
        self.warning = ""  # of the last command: gcloud may miss some of several machines and still return 0
        if not dry_run and not shutil.which("gcloud"):
            raise UserError("gcloud: is not on the PATH; install it from cloud.google.com/sdk, then gcloud auth login")

    # ------------------------------------------------------------------ queued resources and their nodes

    def create(self, name: str, flags: list[str]) -> None:
        """Requests slices; returns when the request is in the queue. Raises GcloudError."""
        self._do(["queued-resources", "create", name, *flags, *self._where, "--quiet"])

    def describe(self, name: str) -> dict | None:
        """Returns the queued resource, or None if it does not exist or in a dry run. Raises GcloudError."""
        return self._ask(["queued-resources", "describe", name, *self._where, "--format=json"])

    def node(self, name: str) -> dict | None:
        """Returns one TPU VM, which is all machines of one slice, or None as above. Raises GcloudError."""
        return self._ask(["tpu-vm", "describe", name, *self._where, "--format=json"])

    def delete(self, name: str, force: bool = False) -> None:
        """Deletes the queued resource; with force, also the nodes of an ACTIVE one. Returns when it is gone. Raises
        GcloudError."""
        self._do(["queued-resources", "delete", name, *self._where, "--quiet", *(["--force"] if force else [])])

    # ------------------------------------------------------------------ machines

    def ssh(self, name: str, command: str, node: str = "all", worker: str = "all") -> str:
        """Returns the command's output on all machines. Raises GcloudError if it failed on any: the output of the
        others is in its `output`."""
        return self._do([*self.ssh_command(name, node, worker)[3:], f"--command={command}"])

    def ssh_command(self, name: str, node: str, worker: str) -> list[str]:
        """Returns the command that opens a terminal; with --command added, it runs one command."""
        to = [f"--node={node}", f"--worker={worker}", *self._where, *self._ssh_flags, "--quiet"]
        to += [f"--ssh-flag={flag}" for flag in ALIVE]
        return ["gcloud", "compute", "tpus", "queued-resources", "ssh", name, *to]

    def scp(self, name: str, files: list[str], folder: str) -> None:
        """Copies files to all machines. Raises GcloudError."""
        to = ["--node=all", "--worker=all", *self._where, *self._ssh_flags, "--quiet"]
        to += [f"--scp-flag={flag}" for flag in ALIVE]
        self._do(["queued-resources", "scp", *files, f"{name}:{folder}", *to])

    # ------------------------------------------------------------------ gcloud's own settings, and buckets

    def default(self, name: str) -> str:
        """Returns a setting, such as core/project; "" if it is not set or in a dry run. Raises GcloudError."""
        return (self._run(["gcloud", "config", "get-value", name, "--quiet"]) or "").strip()

    def version(self) -> str:
        """Returns the version of the Google Cloud SDK, such as 528.0.0; "" in a dry run. Raises GcloudError."""
        return self._json(["version"], {}).get("Google Cloud SDK", "")

    def account(self) -> str:
        """Returns the active account; "" if there is none or in a dry run. Raises GcloudError."""
        found = self._json(["auth", "list", "--filter=status:ACTIVE"], [])
        return found[0].get("account", "") if found else ""

    def project(self, project: str) -> dict | None:
        """Returns the project, or None in a dry run. Raises GcloudError."""
        return self._json(["projects", "describe", project], None)

    def services(self) -> set[str]:
        """Returns the APIs enabled in the project; none in a dry run. Raises GcloudError."""
        found = self._json(["services", "list", "--enabled", *self._project], [])
        return {service.get("config", {}).get("name", "") for service in found}

    def offered(self, what: str) -> set[str]:
        """Returns the names that the zone offers. what: accelerator-types or versions. Raises GcloudError."""
        found = self._json(["compute", "tpus", "tpu-vm", what, "list", *self._where], [])
        return {entry.get("name", "").rpartition("/")[2] for entry in found}

    def quotas(self) -> list[dict]:
        """Returns the quotas of the TPU API (QuotaInfo of the Cloud Quotas API). Raises GcloudError."""
        return self._json(["beta", "quotas", "info", "list", "--service=tpu.googleapis.com", *self._project], [])

    def bucket(self, url: str) -> dict | None:
        """Returns gcloud's description of a bucket, or None in a dry run. Raises GcloudError."""
        return self._json(["storage", "buckets", "describe", url, *self._project], None)

    def cat(self, url: str) -> str | None:
        """Returns a text object, or None if it does not exist or in a dry run. Raises GcloudError."""
        try:
            return self._run(["gcloud", "storage", "cat", url, *self._project])
        except GcloudError as error:
            if error.kind == "missing":
                return None
            raise

    # ------------------------------------------------------------------ running gcloud

    def _json(self, arguments: list[str], otherwise):
        """Returns a command's answer; `otherwise` in a dry run."""
        text = self._run(["gcloud", *arguments, "--format=json"])
        try:
            return otherwise if text is None else json.loads(text)
        except ValueError:
            raise UserError(f"gcloud {' '.join(arguments[:3])}: its answer is not JSON; update gcloud") from None

    def _ask(self, arguments: list[str]):
        """Runs a command that only asks, and retries after a temporary failure."""
        for attempt in range(TRIES):
            try:
                text = self._run(["gcloud", "compute", "tpus", *arguments])
                return None if text is None else json.loads(text or "null")
            except GcloudError as error:
                if error.kind == "missing":
                    return None
                if error.kind != "passing" or attempt == TRIES - 1:
                    raise
            except ValueError:
                raise UserError(f"gcloud compute tpus {' '.join(arguments[:2])}: its answer is not JSON") from None

    def _do(self, arguments: list[str]) -> str:
        return self._run(["gcloud", "compute", "tpus", *arguments], WORK_SECONDS) or ""

    def _run(self, command: list[str], seconds: float = ANSWER_SECONDS) -> str | None:
        if self.dry_run:
            self._say(shlex.join(command))
            return None
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        try:
            out, said = process.communicate(timeout=seconds)
        except BaseException as error:  # ssh, which gcloud started, would hold the pipes
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise GcloudError(command, -signal.SIGKILL, f"timed out after {seconds:.0f} s") from None
            raise
        warnings = [line for line in said.splitlines() if line.startswith(("WARNING:", "ERROR:"))]
        self.warning = warnings[-1] if warnings else ""
        if process.returncode:
            error = GcloudError(command, process.returncode, said)
            error.output = out
            raise error
        return out
