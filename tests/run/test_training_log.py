"""Lines of training: which steps a line is about, and when it is fetched from the device."""

import json

import numpy as np
import pytest
from etils import epath

from tvq_pod.config.settings import MetricsSettings
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
    return TrainingLog(writer, Status(workdir, 12), speed, num_steps=12, every_steps=3, tokens_per_byte=0.5)


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
