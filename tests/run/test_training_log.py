"""Lines of training: which steps a line is about, and when it is fetched from the device."""

import json

import numpy as np
import pytest
from etils import epath

from tvq_pod.config.settings import MetricsSettings
from tvq_pod.run import training_log
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.goodput_table import EVALUATION, START
from tvq_pod.run.metrics import LOG_2, MetricsWriter
from tvq_pod.run.progress import Speed
from tvq_pod.run.status import Status
from tvq_pod.run.training_log import TrainingLog


@pytest.fixture
def log(tmp_path):
    """A log with a line every 3 steps, and a clock that counts what it was asked."""
    workdir, ticks = epath.Path(tmp_path), iter(range(1000))
    writer = MetricsWriter(workdir, MetricsSettings(tensorboard=False))
    speed = Speed(0, 12, 100, clock=lambda: float(next(ticks)))
    sizes = dict(num_steps=12, every_steps=3, tokens_per_byte=0.5, detail_every_steps=2)
    return TrainingLog(writer, Status(workdir, 12), speed, **sizes)


def metrics(step, n_bad=0):
    return dict(
        loss=np.float32(step), dead=np.float32([step, 2 * step]), n_bad=n_bad, digest=np.array([step, 1], np.uint32)
    )


def lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_line_is_written_once_the_device_has_its_next_step(log, tmp_path):
    for step in (1, 2, 3):
        log.add(step, metrics(step))
    assert lines(tmp_path) == []
    log.add(4, metrics(4))
    (line,) = lines(tmp_path)
    assert (line["step"], line["split"], line["loss"], line["bad_steps"]) == (3, "train", 2.0, 0)
    assert (line["dead"], line["dead_by_unit"]) == (3.0, [2.0, 4.0])
    assert line["bits_per_byte"] == pytest.approx(2.0 / LOG_2 * 0.5)
    assert line["digest"] == "0000000300000001"
    assert line["tokens_per_second"] == 300  # 3 steps of 100 tokens in one second


def test_a_line_may_be_ended_before_it_is_due_and_no_mean_spans_two(log, tmp_path):
    for step in (1, 2):
        log.add(step, metrics(step))
    log.end_line(2)
    log.write_due()
    for step in (3, 4):
        log.add(step, metrics(step))
    log.write_due()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 1.5), (3, 3.0)]
    log.end_line(4)
    log.end_line(4)  # nothing was added since
    log.write_due()
    log.write_due()
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4]


def test_bad_steps_are_counted_and_left_out_of_means(log, tmp_path):
    for step, n_bad in ((1, 0), (2, 1), (3, 2)):
        log.add(step, metrics(step, n_bad))
    log.write_due()
    for step in (4, 5, 6):  # none of them was applied
        log.add(step, metrics(step, n_bad=step - 1))
    log.write_due()
    first, second = lines(tmp_path)
    assert (first["loss"], first["bad_steps"]) == (1.0, 2)
    assert (second["loss"], second["bad_steps"]) == (5.0, 3)


def test_what_was_collected_before_the_run_went_back_is_forgotten(log, tmp_path):
    for step in (1, 2, 3):
        log.add(step, metrics(step))
    log.restart(0)
    for step in (1, 2, 3):
        log.add(step, metrics(10 * step))
    log.write_due()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(3, 20.0)]


def test_norms_of_a_step_are_a_line_of_their_own_and_in_no_mean(log, tmp_path):
    for step in (1, 2, 3, 4):
        log.add(step, metrics(step) | dict(detail=dict(grad_norm_layers=np.float32([step, step + 0.5]))))
    first, mean = lines(tmp_path)
    assert first == dict(step=2, split="detail", grad_norm_layers=[2.0, 2.5])
    assert (mean["step"], mean["loss"]) == (3, 2.0)
    assert not any("detail" in name or "layers" in name for name in mean)
    log.write_due()  # as before a checkpoint of step 4
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == [(2, "detail"), (3, "train"), (4, "detail")]


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_a_line_says_what_the_devices_and_the_time_were_used_for(tmp_path, monkeypatch, capfd):
    held = [Device(dict(peak_bytes_in_use=n << 30, bytes_in_use=1)) for n in (2, 3)]
    monkeypatch.setattr(training_log.jax, "local_devices", lambda: held)
    now = [0.0]
    goodput = Goodput(0.0, clock=lambda: now[0], now=lambda: 0.0)
    speed = Speed(0, 12, 100, clock=lambda: now[0], chips=2.0, seconds_at_peak=0.9)
    writer = MetricsWriter(epath.Path(tmp_path), MetricsSettings(tensorboard=False))
    sizes = dict(num_steps=12, every_steps=1, tokens_per_byte=0.5)
    log = TrainingLog(writer, Status(epath.Path(tmp_path), 12, goodput=goodput), speed, **sizes)
    now[0] = 7.0  # the start is in no line
    log.restart(0)
    with goodput.on(EVALUATION):
        now[0] = 8.0
    goodput.switch(START)
    now[0] = 11.0
    log.add(1, metrics(1))
    log.write_due()
    (line,) = lines(tmp_path)
    assert (line["tokens_per_second_per_chip"], line["mfu"]) == pytest.approx((12.5, 0.225))
    assert line["peak_memory_bytes"] == 3 << 30
    shares = [line[name] for name in ("share_waiting_for_data", "share_saving", "share_evaluating")]
    assert shares == [0.0, 0.0, 0.25]
    said = capfd.readouterr().err
    assert "  25 tokens/s (12 a chip)  MFU 22.5%  3.00 GiB  data 0% saves 0% eval 25%  ETA 0:00:44" in said


def test_devices_that_do_not_count_their_memory_are_left_out(monkeypatch):
    monkeypatch.setattr(training_log.jax, "local_devices", lambda: [Device(None), Device({})])
    assert training_log.peak_memory() == {}
