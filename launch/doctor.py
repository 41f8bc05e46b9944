"""Finds what would stop `up` and `run` before a slice is requested: one line for each problem with its fix.

Every check asks once and changes nothing. Only certain problems must be fixed; what gcloud can't tell is a note.
"""

import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tvq_pod.errors import UserError

from . import slices
from .gcloud import Gcloud, GcloudError
from .record import Record

OK, FIX, NOTE = "ok", "FIX", "note"
# The oldest release with queued resources outside of alpha and with --reserved, and the one that launch is tested with.
OLDEST, TESTED = (468, 0, 0), (528, 0, 0)
SERVICES = ("tpu.googleapis.com", "storage.googleapis.com")
QUOTAS_PAGE = "console.cloud.google.com/iam-admin/quotas"
# The name of each kind of slice in the ids of the TPU API's quotas. Ids of spot slices also have "Preemptible". The TPU
# documentation does not list them: these are from error messages of the API. v2 and v3 have several, and the one of
# tpu7x is not known.
FAMILIES = {"v4": "V4sPod", "v5litepod": "V5sLitepod", "v5p": "V5P", "v6e": "V6E"}
SERVING = ("v5litepod-1", "v5litepod-4", "v5litepod-8")  # they count as slices for inference
DUAL_REGIONS = {  # the predefined ones; others list their own regions
    "ASIA1": ("asia-northeast1", "asia-northeast2"),
    "EUR4": ("europe-north1", "europe-west4"),
    "EUR5": ("europe-west1", "europe-west2"),
    "EUR7": ("europe-west2", "europe-west3"),
    "EUR8": ("europe-west3", "europe-west6"),
    "NAM4": ("us-central1", "us-east1"),
}
CONTINENTS = {"US": "us-", "EU": "europe-", "ASIA": "asia-"}  # of multi-regions
SSH_KEY = "~/.ssh/google_compute_engine"  # the key that gcloud uses


class Found(NamedTuple):
    """The result of a check. state: OK, FIX or NOTE."""

    state: str
    text: str


def examine(connect: Callable[[], Gcloud], record: Record, bucket: str | None) -> Iterator[Found]:
    """Yields the results of the checks, in the order in which they should be fixed.

    connect: raises UserError if gcloud is not installed. record: what would be requested; its accelerator may be "".
    bucket: gs://BUCKET, or None if it is not known. In a dry run the commands are printed, and the results are
    meaningless.
    """
    yield ssh_agent()
    try:
        gcloud = connect()
    except UserError as error:
        yield Found(FIX, str(error))
        return
    for check in (lambda: gcloud_version(gcloud), lambda: login(gcloud), lambda: project(gcloud, record.project)):
        found = _asked(check, FIX)
        yield found
        if found.state == FIX and not gcloud.dry_run:
            yield Found(NOTE, "services, zone, quota, bucket: not checked until this is fixed")
            return
    yield _asked(lambda: services(gcloud, record.project), NOTE)
    yield _asked(lambda: accelerator(gcloud, record), FIX)
    if record.accelerator and record.zone:
        yield _asked(lambda: runtime(gcloud, record), NOTE)
        yield _asked(lambda: quota(gcloud, record), NOTE)
    yield _asked(lambda: storage(gcloud, record.zone, bucket), FIX)


def _asked(check: Callable[[], Found], otherwise: str) -> Found:
    """Runs a check. otherwise: the state if gcloud fails, unless because of an expired login or the network."""
    try:
        return check()
    except GcloudError as error:
        state = {"login": FIX, "passing": NOTE}.get(error.kind, otherwise)
        return Found(state, f"not checked: {error}" if state == NOTE else str(error))
    except UserError as error:
        return Found(FIX, str(error))


# ---------------------------------------------------------------------- gcloud and the project


def gcloud_version(gcloud: Gcloud) -> Found:
    """Checks that gcloud has the commands that launch calls."""
    version = gcloud.version()
    numbers = tuple(int(number) for number in re.findall(r"\d+", version))[:3]
    if not numbers:
        return Found(NOTE, "gcloud: does not say which version it is")
    if numbers < OLDEST:
        return Found(FIX, f"gcloud={version}: is older than {_dotted(OLDEST)}; gcloud components update")
    if numbers < TESTED:
        newer = f"{_dotted(TESTED)}, which launch is tested with"
        return Found(NOTE, f"gcloud={version}: is older than {newer}; gcloud components update")
    return Found(OK, f"gcloud {version}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def login(gcloud: Gcloud) -> Found:
    """Checks that an account is active. The next check shows whether its credentials are still valid."""
    account = gcloud.account()
    return Found(OK, f"login: {account}") if account else Found(FIX, "login: no account is active; gcloud auth login")


def project(gcloud: Gcloud, name: str | None) -> Found:
    """Checks that the project exists and the account may see it."""
    if not name:
        return Found(FIX, "--project=: gcloud has no default project; gcloud config set project PROJECT")
    try:
        found = gcloud.project(name)
    except GcloudError as error:
        if error.kind in ("login", "passing"):
            raise
        return Found(FIX, f"--project={name}: {error}; give a project of this account, or ask its owner for access")
    state = (found or {}).get("lifecycleState", "unknown")
    if state != "ACTIVE":
        return Found(FIX, f"--project={name}: its state is {state}; gcloud projects undelete {name}, or give another")
    return Found(OK, f"project {name}")


def services(gcloud: Gcloud, project: str | None) -> Found:
    """Checks that the APIs that launch needs are enabled."""
    enabled = gcloud.services()
    missing = [name for name in SERVICES if name not in enabled]
    if missing:
        fix = f"gcloud services enable {' '.join(missing)} --project={project}"
        return Found(FIX, f"--project={project}: {' and '.join(missing)} not enabled; {fix}")
    return Found(OK, f"services: {', '.join(SERVICES)}")


# ---------------------------------------------------------------------- the slice


def accelerator(gcloud: Gcloud, record: Record) -> Found:
    """Checks that the zone has slices of this type."""
    if not record.zone:
        return Found(FIX, "--zone=: gcloud has no default zone; give --zone=us-west4-a, or the zone of your quota")
    if not record.accelerator:
        return Found(NOTE, "--accelerator=: not given, so what the zone offers and the quota are not checked")
    offered = gcloud.offered("accelerator-types")
    if record.accelerator in offered:
        return Found(OK, f"accelerator: {record.zone} has {record.accelerator}")
    kind = record.accelerator.rpartition("-")[0]
    others = sorted((name for name in offered if name.startswith(f"{kind}-")), key=lambda name: (len(name), name))
    has = f"it has {', '.join(others)}" if others else f"it has no {kind} slices"
    return Found(FIX, f"--accelerator={record.accelerator}: {record.zone} does not offer it; {has}: choose another")


def runtime(gcloud: Gcloud, record: Record) -> Found:
    """Checks that the zone lists the runtime version that the machines would boot."""
    wanted = next(flag for flag in record.create_flags if flag.startswith("--runtime-version=")).partition("=")[2]
    if wanted in gcloud.offered("versions"):
        return Found(OK, f"runtime version: {wanted}")
    where = f"gcloud compute tpus tpu-vm versions list --zone={record.zone}"
    return Found(NOTE, f"--runtime_version={wanted}: {record.zone} does not list it; choose from {where}")


def quota(gcloud: Gcloud, record: Record) -> Found:
    """Checks that the project's quota allows this many chips or cores, whether or not some are in use."""
    kind, _, number = record.accelerator.rpartition("-")
    needed, chips = int(number) * record.slices, slices.parse(record.accelerator).chips * record.slices
    if "--reserved" in record.create_flags:
        return Found(NOTE, "quota: not checked; slices of a reservation count against the reservation")
    if kind not in FAMILIES:
        return Found(NOTE, f"quota: which one counts {kind} is not known here; look at {QUOTAS_PAGE}")
    family = FAMILIES[kind] + ("Serving" if record.accelerator in SERVING else "")
    zone = record.zone or ""
    region = zone.rpartition("-")[0]
    limits = {}
    for info in gcloud.quotas():
        name = info.get("quotaId", "")
        of_spot, plain = "Preemptible" in name, name.replace("Preemptible", "")
        for where, place in (("Zone", zone), ("Region", region)):
            if plain == f"TPU{family}PerProjectPer{where}ForTPUAPI" and of_spot == record.spot:
                limit = _limit(info, where.lower(), place)
                if limit is not None:
                    limits[name] = limit
    if not limits:
        return Found(NOTE, f"quota: none for {kind} is listed in {zone}; look at {QUOTAS_PAGE}")
    name, limit = min(limits.items(), key=lambda item: item[1])
    if limit < chips:
        fix = f"ask for more at {QUOTAS_PAGE}, or choose another zone"
        return Found(FIX, f"quota {name}={limit:.0f}: {zone} needs {needed} for {_what(record)}; {fix}")
    if limit < needed:
        unit = f"enough if it counts chips ({chips}), too little if it counts cores ({needed})"
        return Found(NOTE, f"quota {name}={limit:.0f}: for {_what(record)} this is {unit}; look at {QUOTAS_PAGE}")
    return Found(OK, f"quota {name}={limit:.0f}, of which {_what(record)} takes {needed}")


def _what(record: Record) -> str:
    return f"{record.slices} x {record.accelerator}" if record.slices > 1 else record.accelerator


def _limit(info: dict, dimension: str, place: str) -> float | None:
    """The limit of a QuotaInfo in a zone or region. An entry without a value is 0, and -1 is no limit. An entry without
    the dimension is the default for the locations that it lists; None if no entry is for the place."""
    default = None
    for entry in info.get("dimensionsInfos", []):
        value = float(entry.get("details", {}).get("value") or 0)
        value = float("inf") if value < 0 else value
        named = entry.get("dimensions", {}).get(dimension)
        if named == place:
            return value
        if named is None and place in entry.get("applicableLocations", [place]):
            default = value
    return default


# ---------------------------------------------------------------------- the bucket


def storage(gcloud: Gcloud, zone: str | None, bucket: str | None) -> Found:
    """Checks that the bucket exists and is in the slice's region."""
    if not bucket:
        return Found(NOTE, "--bucket=: not given, so its region is not checked")
    region = (zone or "").rpartition("-")[0]
    try:
        found = gcloud.bucket(bucket) or {}
    except GcloudError as error:
        if error.kind != "missing":
            raise
        fix = f"gcloud storage buckets create {bucket} --location={region or 'REGION'}"
        return Found(FIX, f"--bucket={bucket}: does not exist; {fix}")
    location, kind = found.get("location", "").upper(), found.get("location_type", "region")
    if not region:
        return Found(OK, f"bucket {bucket}: {location}")
    listed = found.get("data_locations") or DUAL_REGIONS.get(location) or (location,)
    if region in [name.lower() for name in listed]:
        return Found(OK, f"bucket {bucket}: {location}, as {zone}")
    if kind != "region" and region.startswith(CONTINENTS.get(location, "no continent")):
        better = f"a bucket in {region} alone is faster and its reads cost nothing"
        return Found(NOTE, f"--bucket={bucket}: is in {location}, a {kind}; {better}")
    fix = f"gcloud storage buckets create gs://ANOTHER --location={region}, or choose a zone in {location.lower()}"
    return Found(FIX, f"--bucket={bucket}: is in {location}, but --zone={zone} is in {region}; {fix}")


# ---------------------------------------------------------------------- ssh


def ssh_agent() -> Found:
    """Checks that ssh to several machines at once will work: gcloud refuses a key that the agent lacks, and waits
    forever for a key with a passphrase."""
    key = pathlib.Path(SSH_KEY).expanduser()
    try:
        listed = _run("ssh-add", "-l")
        has_keys = listed.returncode == 0
        if not key.exists():
            if not has_keys:
                return Found(OK, f"ssh: gcloud makes {SSH_KEY} when it is first needed")
            make = f"ssh-keygen -t rsa -f {SSH_KEY} && ssh-add {SSH_KEY}"
            return Found(FIX, f"ssh: {SSH_KEY} does not exist, and the agent has other keys; {make}")
        fingerprint = _run("ssh-keygen", "-lf", str(key)).stdout.split()[1:2]
        if fingerprint and fingerprint[0] in listed.stdout.split():
            return Found(OK, f"ssh: the agent has {SSH_KEY}")
        if has_keys:
            return Found(FIX, f"ssh: the agent has other keys, but not {SSH_KEY}; ssh-add {SSH_KEY}")
        if _run("ssh-keygen", "-y", "-P", "", "-f", str(key)).returncode == 0:
            return Found(OK, f"ssh: {SSH_KEY} has no passphrase, so no agent is needed")
    except FileNotFoundError as error:
        return Found(FIX, f"ssh: {error.filename} is not on the PATH; install OpenSSH")
    return Found(FIX, f"ssh: no agent has {SSH_KEY}, which has a passphrase; eval $(ssh-agent) && ssh-add {SSH_KEY}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
