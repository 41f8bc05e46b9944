"""launch.pod: what is refused, in one line, before anything starts."""

import io
import pathlib
import re
import tarfile

import pytest

from tests.launch.commands import RUN, UP, error_of
from tests.launch.conftest import ROOT, write_program
from tvq_pod.errors import UserError


@pytest.mark.slow(2)
def test_a_config_that_the_machines_do_not_have_is_refused_before_anything_starts(laptop, tmp_path):
    laptop.must("up", *UP)
    (tmp_path / "mine.py").write_text("")
    calls, before = laptop.get("calls"), (laptop.folder / "records/run.json").read_text()
    for flags, message in {
        ("--config=configs/stdlb.py",): "--config=configs/stdlb.py: does not exist in tvq_pod-",
        ("--config=stdlb",): "--config=stdlb: does not exist in tvq_pod-",
        ("--config", "nowhere/stdlib.py"): "did you mean configs/stdlib.py?",
        ("--config=configs/stdlib.py", "--config="): "--config=: does not exist in tvq_pod-",
        (f"--config={tmp_path}/mine.py",): f"--config={tmp_path}/mine.py: is not part of tvq_pod-",
        (f"--config={ROOT}/configs/stdlib.py",): "is a path of this machine; give --config=configs/stdlib.py",
        ("--config=gs://bucket/c.py",): "--config=gs://bucket/c.py: does not exist in tvq_pod-",
        ("--config=configs/stdlib.py", "--prompt_file=prompt.txt"): "--prompt_file=prompt.txt: does not exist in",
    }.items():
        assert message in error_of(laptop, "run", "--name=run", "--", "--workdir=gs://bucket/run", *flags)
    assert "does not exist in" in error_of(laptop, "run", "--name=run", "--dry_run", "--", *RUN[3:], "--config=c.py")
    assert laptop.get("calls") == calls
    assert (laptop.folder / "records/run.json").read_text() == before


def test_a_config_that_is_not_committed_is_refused_before_up_too(laptop, tmp_path):
    (tmp_path / "mine.py").write_text("")
    flags = ("--name=run", "--dry_run", "--", f"--config={tmp_path}/mine.py", "--workdir=gs://bucket/run")
    assert "is not part of tvq_pod-" in error_of(laptop, "run", *flags)


def test_a_config_is_the_same_however_its_path_is_written(laptop):
    for config in (
        "./configs//stdlib.py",
        "stdlib",
        "configs/stdlib.py:and its argument",
        "configs/../configs/stdlib.py",
    ):
        laptop.must("run", "--name=run", "--dry_run", "--", f"--config={config}", "--workdir=gs://bucket/run")


@pytest.mark.slow(1)
def test_without_a_config_there_must_be_an_earlier_run(laptop):
    laptop.must("up", *UP)
    run = ("--name=run", "--", "--workdir=gs://bucket/run")
    assert "there is no gs://bucket/run/config.json of an earlier run" in error_of(laptop, "run", *run)
    assert laptop.get("attempts") is None
    (laptop.cloud.folder / "buckets/bucket/run").mkdir(parents=True)
    (laptop.cloud.folder / "buckets/bucket/run/config.json").write_text("{}")
    laptop.must("run", *run)


@pytest.mark.slow(1)
def test_a_config_on_a_mount_that_all_machines_share(laptop, tmp_path):
    laptop.must("up", *UP)
    flags = ("--name=run", "--shared_workdir", "--", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/run")
    assert f"--config={tmp_path}/c.py: does not exist on the machines" in error_of(laptop, "run", *flags)
    assert laptop.get("attempts") is None
    (tmp_path / "c.py").write_text("")
    laptop.must("run", *flags)


def test_a_config_that_was_changed_since_up_is_said(laptop):
    laptop.must("up", *UP)
    assert "WARNING" not in laptop.must("run", "--dry_run", *RUN)
    (path,) = (laptop.folder / "records/sources").glob("*.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/configs/stdlib.py")
        tar.addfile(member, io.BytesIO())
    said = laptop.must("run", "--dry_run", *RUN)
    assert "WARNING: --config=configs/stdlib.py: differs from the installed tvq_pod-" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--accelerator=v4-16",), "--name=: is missing"),
        (("--name=Run;rm", "--accelerator=v4-16"), "--name=Run;rm: is not a valid name; give 1 to 40 of a-z"),
        (("--name=run",), "--accelerator=: is missing"),
        (
            ("--name=run", "--accelerator=h100-8"),
            "--accelerator=h100-8: is not a type of TPU slice; give one of v2, v3",
        ),
        (("--name=run", "--accelerator=tpu7x-9"), "--accelerator=tpu7x-9: '9' is not a number of cores"),
        (("--name=run", "--accelerator=v5p-7"), "--accelerator=v5p-7: '7' is not a number of cores, two per chip"),
        (("--name=run", "--accelerator=v4-16", "--zone=a b"), "--zone=a b: is not valid; give a value like us-west4-a"),
        (("--name=run", "--accelerator=v4-16", "--spot", "--reserved"), "--spot --reserved: exclude each other"),
        (("--name=run", "--accelerator=v4-16", "extra"), "extra: up takes only flags"),
    ],
)
def test_what_can_t_be_is_refused_before_gcloud_is_asked(laptop, flags, message):
    assert message in error_of(laptop, "up", *flags)
    assert not laptop.get("log")


def test_a_workdir_that_goes_with_the_machines_is_refused(laptop):
    laptop.must("up", *UP)
    calls = laptop.get("calls")
    assert "--workdir=: is missing; give" in error_of(laptop, "run", "--name=run", "--", "--config=c.py")
    for workdir in ("runs/x", "/data/x"):
        said = error_of(laptop, "run", "--name=run", "--", f"--workdir={workdir}")
        assert f"--workdir={workdir}: is on the machines' own disks" in said
    assert "--multihost: is set by the machines" in error_of(laptop, "run", *RUN, "--multihost")
    assert laptop.get("calls") == calls


def test_gcloud_that_is_not_there_or_not_logged_in(laptop):
    laptop.set(logged_in=False)
    assert "You do not currently have an active account selected. (gcloud auth login)" in error_of(laptop, "up", *UP)
    (laptop.bin / "gcloud").unlink()
    laptop.environment["PATH"] = f"{laptop.bin}:{path_without_gcloud(laptop)}"
    assert "gcloud: is not on the PATH; install it" in error_of(laptop, "up", *UP)


def path_without_gcloud(laptop) -> str:
    folder = laptop.folder / "only-git"
    folder.mkdir()
    write_program(folder / "git", 'exec /usr/bin/env -i PATH=/usr/bin:/bin git "$@"')
    return str(folder)


@pytest.mark.slow(2)
@pytest.mark.parametrize("text", [None, "no setting", "A B=c"])
def test_an_env_file_that_is_none_is_refused_before_anything_changes(laptop, tmp_path, text):
    laptop.must("up", *UP)
    if text is not None:
        (tmp_path / "env").write_text(text)
    before = (laptop.folder / "records/run.json").read_text()
    said = error_of(laptop, "run", f"--env_file={tmp_path / 'env'}", *RUN)
    assert f"{tmp_path / 'env'}: {'cannot be read' if text is None else 'a line is not NAME=VALUE'}" in said
    assert (laptop.folder / "records/run.json").read_text() == before


def test_what_is_not_committed_is_refused_or_named_by_its_hash(tmp_path):
    from launch import source

    clone = tmp_path / "clone"
    source._git("clone", "--quiet", "--shared", str(source.ROOT), str(clone))
    root, source.ROOT = source.ROOT, clone
    try:
        clean = source.pack(tmp_path, allow_dirty=False)
        (clone / "secret.key").write_text("not tracked")
        assert source.pack(tmp_path, allow_dirty=False) == clean
        (clone / "README.md").write_text("changed")
        with pytest.raises(UserError, match=r"--allow_dirty=False: 1 file\(s\) differ .*README.md"):
            source.pack(tmp_path, allow_dirty=False)
        dirty = source.pack(tmp_path, allow_dirty=True)
        assert dirty.startswith(f"{clean}-dirty-")
        (clone / "README.md").write_text("changed again")
        assert source.pack(tmp_path, allow_dirty=True) != dirty
    finally:
        source.ROOT = root
    assert archived(tmp_path / f"{dirty}.tar.gz", "README.md") == b"changed"
    assert archived(tmp_path / f"{dirty}.tar.gz", "secret.key") is None


def archived(path: pathlib.Path, name: str) -> bytes | None:
    with tarfile.open(path) as tar:
        found = [member for member in tar.getmembers() if member.name.endswith(f"/{name}")]
        return tar.extractfile(found[0]).read() if found else None


def test_help_has_the_flags_of_every_command(laptop):
    """Those of up are defined in another file."""
    code, out, err = laptop.pod("--help")
    assert (code, err) == (1, "")
    defined = re.findall(
        r'DEFINE_\w+\(\s*"(\w+)"',
        "".join(path.read_text() for path in (ROOT / "launch").glob("*.py") if path.stem != "local"),
    )
    assert len(defined) > 20
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+):", out, re.MULTILINE))
    assert set(defined) <= shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["run", "--config=configs/stdlib.py"],
            "--config: is a flag of the training; give it after `run --name=RUN --`",
        ),
        (["run", "--config.model.d_model=8"], "--config.model.d_model: is a flag of the training; give it after"),
        (["up", "--nmae=first"], "--nmae: is not a flag; did you mean --name?"),
        (["up", "--slices=0"], "--slices=0: 0 is not a positive integer; see --help"),
    ],
)
def test_a_wrong_flag_is_one_line(laptop, arguments, line):
    code, out, err = laptop.pod(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_the_status_of_no_runs_says_so(laptop):
    assert laptop.must("status").startswith(f"no runs in {laptop.folder / 'records'}: ")
