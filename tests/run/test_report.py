"""The report of a run, in a real browser; and what it is made of."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.browser import opened
from tests.command import contents, finish, start
from tests.made_run import settings_of
from tvq_pod.config.run_config import to_json
from tvq_pod.errors import UserError
from tvq_pod.host import extras
from tvq_pod.run import report
from tvq_pod.run.curves import MOST_POINTS, series, thinned
from tvq_pod.run.report import write_report

SETTINGS = settings_of(window_bias=4.0)
SCRIPT = '<script>document.title = "taken over"</script>'
IMAGE = '"><img src="http://127.0.0.1:9/x.png" onerror="document.title = 1">'
SAMPLE = "\n  two spaces, </code></pre>" + SCRIPT + "\x00\x1b[31m & ä \u2028 end"
LINES = [
    *(
        dict(step=step, split="train", loss=5 - step / 100, grad_norm=0.5, code_usage_by_unit=[1])
        for step in range(300)
    ),
    dict(step=40, split="detail", gradients=[1.0]),
    dict(step=100, split="validation", loss=4.5, bits_per_byte=6.25, tokens=1234567),
    dict(step=200, split="validation", loss=None, bits_per_byte=5.5, tokens=1234567),
    dict(step=200, split=SCRIPT, answered=0.25),
]


def make_run(workdir: pathlib.Path) -> None:
    """What a run, and evaluations of it, leave behind."""
    (workdir / "eval").mkdir(parents=True)
    (workdir / "samples").mkdir()
    (workdir / "config.json").write_text(to_json(SETTINGS))
    lines = [json.dumps(line) for line in LINES]
    (workdir / "metrics.jsonl").write_text("\n".join([*lines[:7], lines[7][:20], *lines[7:]]) + '\n{"step": 30')
    (workdir / "status.json").write_text(json.dumps(dict(state="failed", error=SCRIPT, goodput=dict(no="record"))))
    table = ["document\tname\tloss", *(f"{n}\t{SCRIPT if n % 2 else IMAGE}\t1.5" for n in range(500))]
    (workdir / "eval/step_9_documents.tsv").write_text("\n".join(table) + "\n")
    (workdir / "eval/step_200_passkey.tsv").write_text("length\tdepth\tanswered\n512\t0.5\t0.25\n")
    Image.fromarray(np.full([30, 50, 3], 200, np.uint8)).save(workdir / "eval/step_200_passkey.png")
    (workdir / "eval/step_9_documents.png").write_text("no picture")
    (workdir / "eval/empty.tsv").write_text("")
    scores = {"own,task": {"alias": SCRIPT, "acc,none": 0.75, "acc_stderr,none": 0.125, "sample_len": 4}}
    (workdir / "eval/lm_eval_step_200_2026.json").write_text(json.dumps(dict(results=scores)))
    (workdir / "eval/lm_eval_step_100_2026.json").write_text("[torn")
    (workdir / "samples/step_200.txt").write_text(SAMPLE)
    (workdir / "samples/step_100.txt").write_bytes(b"\xff\xfe" + b"x" * 30_000)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """Its name is text, too."""
    workdir = tmp_path_factory.mktemp("runs") / "a <b>run & more"
    make_run(workdir)
    assert write_report(SETTINGS, epath.Path(workdir)) == epath.Path(workdir / "eval/report.html")
    return workdir


@pytest.mark.slow(4)
def test_a_browser_shows_the_report_and_asks_for_nothing_else(workdir):
    """Text is shown as it is, whatever it looks like, and every picture is there."""
    path = workdir / "eval/report.html"
    with opened(path) as (page, events):
        assert page.title() == "a <b>run & more: report"
        images = page.locator("img")
        sizes = images.evaluate_all(
            "all => all.map(image => [image.complete, image.naturalWidth, image.src.slice(0, 11)])"
        )
        assert all(complete and width > 0 and source == "data:image/" for complete, width, source in sizes)
        assert [image.get_attribute("alt") for image in images.all()] == [
            "loss, nats per token", "bits per byte", "norm of the gradient", "step_200_passkey",
        ]  # fmt: skip
        assert page.locator("script, iframe, link, b").count() == 0
        assert page.locator("h1").text_content() == "a <b>run & more"
        assert page.locator("h2").all_text_contents() == [
            "Latest evaluations", "Training", "Evaluations", "Tasks of lm-evaluation-harness", "Samples", "Settings",
        ]  # fmt: skip
        names = page.locator("details:has-text('the first 200 of 500') tbody tr td:nth-child(2)").all_text_contents()
        assert names == [IMAGE, SCRIPT] * 100
        texts = page.locator("pre").all_text_contents()
        assert texts[0] == SAMPLE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
        assert texts[1] == "\ufffd\ufffd" + "x" * 19_998
        rows = [row.split("\n") for row in page.locator("table").nth(0).inner_text().splitlines()]
        assert ["state\tfailed"] in rows
        assert [f"error\t{SCRIPT}"] in rows
        assert page.get_by_role("row").filter(has_text="acc").first.locator("td").all_text_contents() == [
            "own,task", "acc", "0.7500", "0.1250",
        ]  # fmt: skip
        shown = page.locator("details:has-text('all settings')")
        assert not shown.locator("table").is_visible()
        shown.locator("summary").click()
        assert shown.locator("table").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    asked = [event for event in events if not event.startswith("data:image/")]
    assert asked == [path.as_uri()]


def test_the_report_has_the_latest_of_each_evaluation_and_what_was_set(workdir):
    text = (workdir / "eval/report.html").read_text()
    row = '<tr><td>validation</td><td class="number">200</td><td></td>'
    assert row in text
    assert "1,234,567" in text
    assert '<td>config.model.window_bias</td><td class="number">4.0</td><td class="number">0.0</td>' in text
    assert text.index("step_200_passkey") < text.index("step_9_documents")


def test_curves_have_the_later_of_two_lines_and_no_more_points_than_can_be_seen():
    def line(step, split, **values):
        return dict(step=step, split=split, **values)

    lines = [
        line(2, "train", loss=3.0), line(1, "train", loss=4.0, mfu=0.5), line(2, "train", loss=5.0),
        line(3, "train", loss=1.0), line(3, "train", loss=None),
        line(1, "validation", loss=2.0), line(1, "other", loss=9.0),
    ]  # fmt: skip
    found = series(lines, ["train", "validation"])
    assert {name: {split: points.tolist() for split, points in own.items()} for name, own in found.items()} == dict(
        loss=dict(train=[[1, 2], [4, 5]], validation=[[1], [2]]), mfu=dict(train=[[1], [0.5]])
    )
    points = np.stack([np.arange(25_000.0), np.arange(25_000) * 2.0])
    assert thinned(points).shape == (2, MOST_POINTS)
    np.testing.assert_allclose(thinned(points)[1], 2 * thinned(points)[0])
    np.testing.assert_allclose(thinned(points).mean(axis=1), points.mean(axis=1))


def test_what_can_not_be_reported_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    with pytest.raises(UserError) as refused:
        write_report(SETTINGS, epath.Path(tmp_path))
    assert str(refused.value) == f"--workdir={tmp_path}: has nothing to report; train or evaluate the run first"
    assert not contents(tmp_path)
    make_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    monkeypatch.setattr(extras, "is_installed", lambda package: False)
    with pytest.raises(UserError, match=r"^--mode=report: drawing curves needs pip install -e '\.\[bench\]'$"):
        write_report(SETTINGS, epath.Path(tmp_path / "run"))
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    with pytest.raises(UserError, match=r"eval/report.html can't be written \(No space left on device\)$"):
        write_report(SETTINGS, epath.Path(tmp_path / "run"))
    assert contents(tmp_path / "run") == before


def test_one_command_makes_the_report_without_jax(workdir):
    """Also of a run that was only trained, and again over the last one."""
    code, out, err = finish(start("--mode=report", f"--workdir={workdir}", "--config.train.num_steps=1000"))
    assert (code, out, err) == (0, f"{workdir}/eval/report.html\n", "")
    assert "of 1,000</td>" in (workdir / "eval/report.html").read_text()
    code, out, err = finish(start("--mode=report", f"--workdir={workdir}", "--step=3"))
    assert (code, out) == (1, "")
    assert err.startswith("error: --step: is for --mode=train or ")
