"""metrics.jsonl is always lines of JSON, whatever happened to the process before; speed is counted by a clock."""

import importlib.util
import json
import math
import struct
import tempfile

import pytest
from etils import epath

from tests.buckets import reached_at
from tvq_pod.config.settings import MetricsSettings
from tvq_pod.errors import UserError
from tvq_pod.run import metrics
from tvq_pod.run.metrics import MetricsWriter, bits_per_byte, check_packages
from tvq_pod.run.progress import Speed, hours

OFF = MetricsSettings(tensorboard=False)


def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    writer = MetricsWriter(tmp_path, OFF)
    writer.write(3, "train", dict(loss=1.5))
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "lo']
    assert [json.loads(line) for line in lines[2:]] == [dict(step=3, split="train", loss=1.5)]


def test_lines_are_added_and_can_be_read_while_the_run_goes_on(tmp_path):
    for step in (1, 2):
        writer = MetricsWriter(tmp_path, OFF)
        writer.write(step, "train", dict(loss=float("nan"), tokens=7))
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
        writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None  # JSON has no NaN


def test_only_one_process_writes(tmp_path):
    writer = MetricsWriter(tmp_path, MetricsSettings(), enabled=False)
    writer.write(1, "train", dict(loss=1.0))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_wandb_without_its_package_is_one_line(monkeypatch):
    check_packages(MetricsSettings())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.metrics.wandb_project=mine: W&B needs pip install -e '.\[wandb\]'"):
        check_packages(MetricsSettings(wandb_project="mine"))


def records_of(path):
    """What W&B wrote in a file: its log's blocks of 32 KiB have pieces of records, each with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last piece
            yield Record.FromString(record)
            record = b""


def wandb_session(workdir, here, monkeypatch, steps):
    """One session of a run, from a folder that is its own: the run's id, and rows as (row, step, loss)."""
    import wandb

    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr(tempfile, "tempdir", None)
    writer = MetricsWriter(workdir, MetricsSettings(tensorboard=False, wandb_project="mine"), dict(seed=1))
    for step in steps:
        writer.write(step, "train", dict(loss=1 / step, digest="ab"))
        if step % 2 == 0:
            writer.write(step, "validation", dict(loss=2 / step))
    writer.close()
    wandb.teardown()
    path = max((here.parent).glob("**/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    records = list(records_of(path))
    (run_id,) = {record.run.run_id for record in records if record.HasField("run")}
    rows = []
    for record in records:
        if record.HasField("history"):
            values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            assert values.get("validation/loss", 2 / values["step"]) == 2 / values["step"]
            rows.append((values["_step"], values["step"], values["train/loss"]))
    return run_id, rows


@pytest.mark.slow(2)
def test_a_wandb_run_goes_on_from_another_folder_with_all_its_steps(tmp_path, monkeypatch):
    """The run's folder was moved; steps 5 and 6 come again, since the session was killed after its last checkpoint."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    first, rows = wandb_session(tmp_path / "run", tmp_path / "here", monkeypatch, range(1, 7))
    assert rows == [(step, step, 1 / step) for step in range(1, 7)]
    (tmp_path / "run").rename(tmp_path / "moved")
    second, more = wandb_session(tmp_path / "moved", tmp_path / "there", monkeypatch, range(5, 9))
    assert second == first
    assert [row[1:] for row in more] == [(step, 1 / step) for step in range(5, 9)]
    numbers = [row for row, _, _ in rows + more]
    assert numbers == sorted(set(numbers))  # W&B drops a row that does not come after the one before
    assert metrics._wandb_id(tmp_path) != first  # of another run


@pytest.mark.slow(2)
def test_a_wandb_run_of_a_bucket_is_the_same_from_every_host(tmp_path, monkeypatch, server):
    reached_at(monkeypatch, server)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = epath.Path("gs://bucket/wandb")
    first, _ = wandb_session(workdir, tmp_path / "here", monkeypatch, [1, 2])
    second, rows = wandb_session(workdir, tmp_path / "there", monkeypatch, [2, 3])
    assert second == first
    assert [row[1:] for row in rows] == [(2, 1 / 2), (3, 1 / 3)]
    assert not list(tmp_path.glob("*/gs:*"))  # where files were written as if a bucket was a folder


def test_a_wandb_that_can_not_be_reached_does_not_end_the_training(tmp_path, monkeypatch, capfd):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    init = wandb.init

    def unreachable(mode="online", **settings):
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return init(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    (tmp_path / "run").mkdir()
    _, rows = wandb_session(tmp_path / "run", tmp_path / "here", monkeypatch, [1, 2])
    assert [row[1:] for row in rows] == [(1, 1.0), (2, 0.5)]
    assert f"W&B can't be reached (no route to host): its run is kept in {tmp_path}/run/wandb" in capfd.readouterr().err


def test_a_wandb_that_refuses_the_run_is_one_line(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UserError, match=r"config.metrics.wandb_project=mine: W&B refuses .*; set WANDB_API_KEY"):
        MetricsWriter(tmp_path, MetricsSettings(tensorboard=False, wandb_project="mine"))


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 3, 0.5) == pytest.approx(1.5)


def test_speed_and_time_left_by_the_clock():
    now = [0.0]
    sizes = dict(chips=4.0, seconds_at_peak=0.05)
    speed = Speed(first_step=10, num_steps=50, tokens_per_step=100, clock=lambda: now[0], **sizes)
    now[0] = 2.0
    expected = dict(tokens_per_second=500.0, tokens_per_second_per_chip=125.0, mfu=0.25, eta_seconds=6.0)
    assert speed.seen(20) == pytest.approx(expected)
    now[0] = 3.0  # in the middle of the ten steps of a line
    with speed.paused():
        now[0] = 13.0  # ten seconds of evaluation
    now[0] = 14.0
    expected = dict(tokens_per_second=500.0, tokens_per_second_per_chip=125.0, mfu=0.25, eta_seconds=14.0)
    assert speed.seen(30) == pytest.approx(expected)
    assert "mfu" not in Speed(0, 50, 100).seen(1)  # the peak is not known
    assert hours(3661) == "1:01:01"
