"""metrics.jsonl is always lines of JSON, whatever happened to the process before; speed is counted by a clock."""

import importlib.util
import json
import math

import pytest

from tvq_pod.config import MetricsSettings
from tvq_pod.errors import UserError
from tvq_pod.metrics import MetricsWriter, bits_per_byte, check_packages
from tvq_pod.progress import Speed, hours

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
    with pytest.raises(UserError, match=r"config.metrics.wandb_project=mine: needs pip install -e '.\[wandb\]'"):
        check_packages(MetricsSettings(wandb_project="mine"))


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 3, 0.5) == pytest.approx(1.5)


def test_speed_and_time_left_by_the_clock():
    now = [0.0]
    speed = Speed(first_step=10, num_steps=50, tokens_per_step=100, clock=lambda: now[0])
    now[0] = 2.0
    assert speed.seen(20) == pytest.approx(dict(tokens_per_second=500.0, eta_seconds=6.0))
    now[0] = 12.0  # ten seconds of evaluation
    speed.skip()
    now[0] = 13.0
    assert speed.seen(30) == pytest.approx(dict(tokens_per_second=1000.0, eta_seconds=13.0))
    assert hours(3661) == "1:01:01"
