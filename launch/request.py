"""The request that the flags of `up` describe, as the record of a run. An existing run may be requested again, but not
with other values."""

from collections.abc import Callable

from absl import flags

from tvq_pod.errors import UserError

from . import slices
from .record import Record

_PROJECT = flags.DEFINE_string("project", None, "up, doctor: the Google Cloud project; by default gcloud's own.")
_ZONE = flags.DEFINE_string("zone", None, "up, doctor: the zone, such as us-west4-a; by default gcloud's own.")
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", None, "up, doctor: the type of the slice, such as v5litepod-256 or v5p-128."
)
_SLICES = flags.DEFINE_integer("slices", 1, "up, doctor: how many slices one job gets.", lower_bound=1)
_SPOT = flags.DEFINE_bool(
    "spot", False, "up, doctor: request spot capacity, which costs less and may be taken back at any time."
)
_RESERVED = flags.DEFINE_bool("reserved", False, "up, doctor: take the slice from the project's reservation.")
_RUNTIME = flags.DEFINE_string(
    "runtime_version", None, "up, doctor: the software that the machines boot; by default that of the chip."
)
_NETWORK = flags.DEFINE_string("network", None, "up: the machines' network.")
_SUBNETWORK = flags.DEFINE_string("subnetwork", None, "up: the machines' subnetwork.")
_ACCOUNT = flags.DEFINE_string(
    "service_account", None, "up: the service account with which the machines reach the bucket."
)
_INTERNAL = flags.DEFINE_bool(
    "internal_ips", False, "up: machines without external addresses; most need --tunnel_through_iap."
)
_IAP = flags.DEFINE_bool("tunnel_through_iap", False, "up: use Identity-Aware Proxy for ssh.")
_UNTIL = flags.DEFINE_string(
    "valid_until_duration", None, "up: give up waiting for the slice after this time, such as 6h."
)

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


def asked_for(name: str, there: Record | None, default: Callable[[str], str]) -> Record:
    """Returns the record for the flags; or the existing one, `there`, if the flags request the same. Raises UserError.

    default: returns gcloud's own value of a setting, such as core/project: project and zone are fixed to their current
    values.
    """
    accelerator = _ACCELERATOR.value or (there.accelerator if there else None)
    if not accelerator:
        raise UserError("--accelerator=: is missing; give a type of slice, such as v5litepod-16, v5p-128 or v6e-256")
    asked = slices.parse(accelerator)
    if _SPOT.value and _RESERVED.value:
        raise UserError("--spot --reserved: exclude each other; give one of them, or neither")
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
        record.project = record.project or default("core/project") or None
        record.zone = record.zone or default("compute/zone") or None
        return record
    present = [flag for flag in flags.FLAGS if flags.FLAGS[flag].present]
    fields = dict(dict.fromkeys(_CREATE_FLAGS, "create_flags"), tunnel_through_iap="ssh_flags")
    fields |= {flag: flag for flag in ("project", "zone", "accelerator", "slices")}
    for flag in present:
        field = fields.get(flag)
        if field and getattr(there, field) != getattr(record, field):
            raise UserError(
                f"--{flag}: the run {name} was requested with {getattr(there, field)}; give another --name, or `down` "
                "first"
            )
    return there


def looked_for(name: str | None, there: Record | None, default: Callable[[str], str]) -> Record:
    """Like asked_for, for `doctor`: the type of the slice may be missing, and is then "". Raises UserError."""
    if there is not None or _ACCELERATOR.value:
        return asked_for(name or "doctor", there, default)
    project, zone = _checked("project") or default("core/project"), _checked("zone") or default("compute/zone")
    return Record(name or "doctor", project or None, zone or None, "", _SLICES.value, spot=_SPOT.value)


def planned(name: str, source: str) -> Record:
    """Returns the record that `up` would make with these flags, for a dry run before `up`. Values in capitals are
    unknown.

    source: the name of the source that `up` would install.
    """
    if _ACCELERATOR.value is not None:
        record = asked_for(name, None, lambda setting: "")
    else:
        unknown = ["--runtime-version=RUNTIME_VERSION"]
        record = Record(name, _checked("project"), _checked("zone"), "ACCELERATOR", _SLICES.value, unknown)
    record.source, record.label = source, "LABEL"
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
