"""launch.pod doctor: each check, where something is wrong and where nothing is, and the exit code."""

import os
import subprocess

import pytest

from launch import doctor
from launch.slices import parse
from tests.launch.commands import RUN, UP, commands_of, error_of
from tvq_pod.planning.chips import CHIPS

DOCTOR = ("--project=my-project", "--zone=us-central2-b", "--accelerator=v4-16", "--spot", "--bucket=gs://bucket")
V4 = "TPUV4sPreemptiblePodPerProjectPerZoneForTPUAPI"


def quota_info(name, *entries, default=None, locations=("us-central2-b", "us-west4-a")) -> dict:
    """A QuotaInfo: (zone, value) entries, and a default for some locations."""
    infos = [
        dict(dimensions=dict(zone=zone), details={} if value is None else dict(value=value)) for zone, value in entries
    ]
    if default is not None:
        infos.append(dict(details=dict(value=default), applicableLocations=list(locations)))
    return dict(quotaId=name, dimensionsInfos=infos)


def in_region(region: str, value: str) -> dict:
    infos = [dict(dimensions=dict(region=region), details=dict(value=value))]
    return dict(quotaId=V4.replace("PerZone", "PerRegion"), dimensionsInfos=infos)


ENOUGH = [quota_info(V4, ("us-central2-b", "32")), quota_info(V4.replace("Preemptible", ""), default="0")]


@pytest.fixture
def healthy(laptop):
    """A machine and a project where everything is as it should be; its home has no ssh key yet."""
    laptop.set(quotas=ENOUGH)
    home = laptop.folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    laptop.environment |= dict(HOME=str(home))
    laptop.environment.pop("SSH_AUTH_SOCK", None)
    return laptop


def examined(laptop, *flags) -> tuple[int, dict[str, str]]:
    """The exit code, and each line's state by what is behind it."""
    code, out, err = laptop.pod("doctor", *(flags or DOCTOR))
    assert not err, err
    lines = out.splitlines()
    n_bad = sum(line.startswith("FIX ") for line in lines)
    if n_bad:
        assert lines.pop() == f"{n_bad} of {len(lines)} must be fixed"
    assert code == (1 if n_bad else 0)
    assert all(line[:6] in ("ok    ", "FIX   ", "note  ") for line in lines), out
    return code, {line[6:]: line[:6].strip() for line in lines}


def fixes(laptop, *flags) -> list[str]:
    return [text for text, state in examined(laptop, *flags)[1].items() if state == "FIX"]


def test_where_all_is_well_every_check_says_so(healthy):
    code, found = examined(healthy)
    assert (code, set(found.values())) == (0, {"ok"})
    subjects = ("ssh", "gcloud", "login", "project", "services", "accelerator", "runtime", "quota", "bucket")
    assert [next(subject for subject in subjects if text.startswith(subject)) for text in found] == list(subjects)
    assert f"quota {V4}=32, of which v4-16 takes 16" in found
    changes = {"create", "delete", "ssh", "scp", "enable"}
    assert not [call for call in healthy.get("log") if changes & set(call)]


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("state", "flags", "fix"),
    [
        (dict(sdk="400.0.0"), (), "gcloud=400.0.0: is older than 468.0.0; gcloud components update"),
        (dict(logged_in=False), (), "login: no account is active; gcloud auth login"),
        (dict(expired=True), (), "during non-interactive execution. (gcloud auth login)"),
        ({}, ("--project=another",), "--project=another: gcloud projects describe another --format=json: User"),
        (dict(project="DELETE_REQUESTED"), (), "is DELETE_REQUESTED; gcloud projects undelete my-project"),
        (dict(services=["storage.googleapis.com"]), (), "; gcloud services enable tpu.googleapis.com --project="),
        (dict(lacks=["v4-16"]), (), "--accelerator=v4-16: us-central2-b does not offer it; it has v4-8: choose"),
        ({}, ("--accelerator=v6e-8",), "--accelerator=v6e-8: us-central2-b does not offer it; it has no v6e slices"),
        (dict(quotas=[quota_info(V4, ("us-central2-b", "4"))]), (), "=4: us-central2-b needs 16 for v4-16; ask for"),
        (dict(quotas=[quota_info(V4, ("us-central2-b", None), default="64")]), (), f"quota {V4}=0: "),
        (dict(quotas=[quota_info(V4, ("us-west4-a", "64"), default="0")]), (), f"quota {V4}=0: "),
        (dict(quotas=[*ENOUGH, in_region("us-central2", "7")]), (), "PerRegionForTPUAPI=7: us-central2-b needs 16"),
        (dict(quotas=ENOUGH), ("--nospot",), f"quota {V4.replace('Preemptible', '')}=0: "),
        (dict(quotas=ENOUGH), ("--slices=5",), f"quota {V4}=32: us-central2-b needs 80 for 5 x v4-16"),
        (dict(buckets={}), (), "; gcloud storage buckets create gs://bucket --location=us-central2"),
        (dict(buckets=dict(bucket=["EU", "multi-region"])), (), ": is in EU, but --zone=us-central2-b is in "),
        (dict(buckets=dict(bucket=["US-WEST4", "region"])), (), "or choose a zone in us-west4"),
        (dict(buckets=dict(bucket=["NAM4", "dual-region"])), (), "--bucket=gs://bucket: is in NAM4, but"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_fix(healthy, state, flags, fix):
    healthy.set(**state)
    assert [fix in found for found in fixes(healthy, *DOCTOR, *flags)] == [True]


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("state", "flags", "note"),
    [
        (dict(sdk="500.0.0"), (), "gcloud=500.0.0: is older than 528.0.0, which launch is tested with"),
        (dict(lacks=["tpu-ubuntu2204-base"]), (), "--runtime_version=tpu-ubuntu2204-base: us-central2-b does not"),
        (dict(quotas=[]), (), "quota: none for v4 is listed in us-central2-b"),
        (dict(quotas="PERMISSION_DENIED: Cloud Quotas API has not been used"), (), "not checked: gcloud beta quotas"),
        (dict(quotas=[quota_info(V4, ("us-central2-b", "8"))]), (), "enough if it counts chips (8), too little"),
        ({}, ("--nospot", "--reserved"), "quota: not checked; slices of a reservation"),
        (dict(buckets=dict(bucket=["US", "multi-region"])), (), "a multi-region; a bucket in us-central2 alone"),
        ({}, ("--bucket=",), "--bucket=: not given"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_a_note(healthy, state, flags, note):
    healthy.set(**state)
    code, found = examined(healthy, *DOCTOR, *flags)
    assert code == 0
    assert [note in text for text, state in found.items() if state == "note"] == [True]


@pytest.mark.parametrize(
    "state",
    [
        dict(quotas=[quota_info(V4, ("us-central2-b", "-1"))]),
        dict(quotas=[quota_info(V4, ("us-west4-a", "0"), default="16")]),
        dict(quotas=[quota_info(V4, ("us-central2-b", "16")), in_region("us-west4", "9")]),
        dict(buckets=dict(bucket=["US", "dual-region", "US-EAST1", "US-CENTRAL2"])),
    ],
)  # fmt: skip
def test_quotas_and_buckets_that_suffice(healthy, state):
    healthy.set(**state)
    assert set(examined(healthy)[1].values()) == {"ok"}


def test_what_depends_on_a_login_is_not_asked_without_one(healthy):
    healthy.set(logged_in=False)
    _, found = examined(healthy)
    assert "services, zone, quota, bucket: not checked until this is fixed" in found
    assert not [
        call for call in healthy.get("log") if call[0] in ("projects", "services", "compute", "beta", "storage")
    ]


def test_gcloud_and_openssh_that_are_not_installed(healthy):
    (healthy.bin / "gcloud").unlink()
    healthy.environment["PATH"] = str(healthy.bin)
    assert fixes(healthy) == [
        "ssh: ssh-add is not on the PATH; install OpenSSH",
        "gcloud: is not on the PATH; install it from cloud.google.com/sdk, then gcloud auth login",
    ]


@pytest.mark.slow(1)
def test_a_run_is_examined_with_what_it_was_asked_for(healthy):
    healthy.must("up", *UP)
    healthy.must("run", *RUN)
    healthy.set(buckets={}, lacks=["v4-16"])
    assert [text.partition(":")[0] for text in fixes(healthy, "--name=run")] == ["--accelerator=v4-16", "--bucket=gs"]


def test_without_an_accelerator_the_rest_is_examined_with_gcloud_s_defaults(healthy):
    code, found = examined(healthy, "--bucket=bucket/run")
    assert code == 0
    assert found["project my-project"] == "ok"
    assert found["bucket gs://bucket: US-CENTRAL2, as us-central2-b"] == "ok"
    assert any(text.startswith("--accelerator=: not given") for text in found)


def test_a_wrong_flag_is_refused_and_a_dry_run_asks_nothing(healthy):
    assert "--accelerator=v4-7: " in error_of(healthy, "doctor", "--accelerator=v4-7")
    shown = commands_of(healthy.must("doctor", *DOCTOR, "--dry_run"))
    assert not healthy.get("log")
    examined(healthy)
    assert [line.split()[1:] for line in shown] == healthy.get("log")


def test_every_kind_of_slice_whose_quota_is_known_can_be_asked_for():
    assert set(doctor.FAMILIES) <= {chip.accelerator for chip in CHIPS.values()}
    assert all(parse(name).chips <= 8 for name in doctor.SERVING)


# ---------------------------------------------------------------------- ssh, with OpenSSH's own programs


@pytest.fixture
def agent(healthy):
    """A real ssh-agent."""
    socket = healthy.folder / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL) as process:
        while not socket.exists():
            assert process.poll() is None
        healthy.environment["SSH_AUTH_SOCK"] = str(socket)
        yield healthy
        process.terminate()


def make_key(laptop, name="google_compute_engine", passphrase="") -> str:
    path = laptop.folder / "home/.ssh" / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True)
    return str(path)


def ssh_line(laptop, monkeypatch) -> doctor.Found:
    """What the check says; it runs in this process, with the laptop's home and agent."""
    monkeypatch.setenv("HOME", laptop.environment["HOME"])
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    if "SSH_AUTH_SOCK" in laptop.environment:
        monkeypatch.setenv("SSH_AUTH_SOCK", laptop.environment["SSH_AUTH_SOCK"])
    return doctor.ssh_agent()


def add(laptop, key: str) -> None:
    socket = dict(SSH_AUTH_SOCK=laptop.environment["SSH_AUTH_SOCK"])
    subprocess.run(["ssh-add", "-q", key], env=os.environ | socket, check=True)


def test_without_an_agent_a_key_must_have_no_passphrase(healthy, monkeypatch):
    assert ssh_line(healthy, monkeypatch)[0] == "ok"  # gcloud makes one
    key = make_key(healthy)
    assert ssh_line(healthy, monkeypatch).text.endswith("has no passphrase, so no agent is needed")
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", key], check=True, capture_output=True)
    state, text = ssh_line(healthy, monkeypatch)
    assert (state, text.partition("; ")[2]) == ("FIX", "eval $(ssh-agent) && ssh-add ~/.ssh/google_compute_engine")


def test_an_agent_that_has_keys_must_have_gcloud_s(agent, monkeypatch):
    assert ssh_line(agent, monkeypatch)[0] == "ok"  # it has none
    add(agent, make_key(agent, "other"))
    state, text = ssh_line(agent, monkeypatch)
    assert (state, "does not exist, and the agent has other keys; ssh-keygen" in text) == ("FIX", True)
    key = make_key(agent)
    state, text = ssh_line(agent, monkeypatch)
    assert (state, text.partition("; ")[2]) == ("FIX", "ssh-add ~/.ssh/google_compute_engine")
    add(agent, key)
    assert ssh_line(agent, monkeypatch) == ("ok", "ssh: the agent has ~/.ssh/google_compute_engine")
