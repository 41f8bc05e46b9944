"""The report of a run, WORKDIR/eval/report.html: one file with curves, tables, figures, samples and settings.

It shows what is in the run's folder, including the results of --mode=eval, lm_eval and sample, and computes nothing.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence

from etils import epath

from tvq_pod.config.resolve import tree_of
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.host.files import write_whole
from tvq_pod.host.html import Element, element, page, picture, preformatted, table
from tvq_pod.run.curves import CURVES, draw, series
from tvq_pod.run.goodput_table import table as goodput_table
from tvq_pod.run.metrics import all_lines

MOST_ROWS = 200  # of a table
MOST_TABLES = 40  # of evaluations, the newest steps first
MOST_SAMPLES = 8
MOST_CHARACTERS = 20_000  # of a sample
PNG = b"\x89PNG"
NOT_EVALUATIONS = ("train", "detail")  # splits of metrics.jsonl
RESULT_COLUMNS = ("loss", "bits_per_byte", "word_perplexity", "accuracy", "answered", "tokens", "documents", "weights")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { margin-bottom: 0; } h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem; } h3 { margin-bottom: 0.3rem; }
table { border-collapse: collapse; margin: 0.5rem 0; }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }
pre { background: #f4f4f4; padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: #666; } summary { cursor: pointer; }
"""


def write_report(settings: Settings, workdir: epath.Path) -> epath.Path:
    """Writes the report, and returns its path. Raises UserError if the folder has nothing to report or can't be written
    to, or if matplotlib is not installed."""
    require("matplotlib", "--mode=report: drawing curves")
    lines, folder = all_lines(workdir), workdir / "eval"
    sections = [*_curves(lines), *_evaluations(folder), *_tasks(folder), *_samples(workdir / "samples")]
    if not lines and not sections:
        raise UserError(f"--workdir={workdir}: has nothing to report; train or evaluate the run first")
    body = [*_summary(settings, workdir, lines), *sections, *_settings(settings)]
    path = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, page(f"{workdir.name}: report", STYLE, body))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: eval/report.html can't be written ({error.strerror or error})") from None
    return path


def _summary(settings: Settings, workdir: epath.Path, lines: Sequence[dict]) -> Iterator[Element]:
    yield element("h1", workdir.name)
    yield element("p", f"{workdir}, reported {time.strftime('%Y-%m-%d %H:%M:%S %Z')}", class_="note")
    status = _json_of(workdir / "status.json")
    train = [line for line in lines if line["split"] == "train"]
    step = max((line["step"] for line in lines), default=0)
    facts = [("state", status.get("state", "unknown")), ("step", f"{step:,} of {settings.train.num_steps:,}")]
    facts += [("tokens trained on", f"{step * settings.train.batch_size * settings.train.update_len:,}")]
    if train:
        facts += [(f"{name} of training", _number(train[-1].get(name))) for name in ("loss", "bits_per_byte")]
    model = settings.model
    sizes = ("n_layer", "d_model", "d_k", "d_v", "n_code", "block_len", "mem_len", "n_vocab")
    facts += [("model", ", ".join(f"{name} {getattr(model, name):,}" for name in sizes) + f", {model.attn_type}")]
    facts += [("data", settings.data.mixture or settings.data.source or settings.data.store)]
    if status.get("error"):
        facts.append(("error", str(status["error"])))
    yield table(("", ""), facts)
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # it may come from another version
        yield preformatted(goodput_table(status["goodput"]))
    newest = {line["split"]: line for line in lines if line["split"] not in NOT_EVALUATIONS}
    if newest:
        yield element("h2", "Latest evaluations")
        names = [name for name in RESULT_COLUMNS if any(name in line for line in newest.values())]
        rows = [
            [split, f"{line['step']:,}", *(_number(line.get(name)) for name in names)] for split, line in newest.items()
        ]
        yield table(("evaluation", "step", *names), rows)


def _curves(lines: Sequence[dict]) -> Iterator[Element]:
    splits = list(dict.fromkeys(line["split"] for line in lines if line["split"] != "detail"))
    found = series(lines, [split for split in splits if split in ("train", "validation", "test")])
    if found:
        yield element("h2", "Training")
        images = [picture(draw(name, by_split), "svg+xml", CURVES[name]) for name, by_split in found.items()]
        yield element("div", *images, class_="curves")


def _evaluations(folder: epath.Path) -> Iterator[Element]:
    """Every table in the folder, with the figure of the same name."""
    paths = sorted((path for path in _files(folder) if path.suffix == ".tsv"), key=_by_step, reverse=True)
    if paths:
        yield element("h2", "Evaluations")
    for path in paths[:MOST_TABLES]:
        head, *rows = [line.split("\t") for line in _text_of(path).split("\n") if line] or [[]]
        yield element("h3", path.stem)
        image = path.with_suffix(".png")
        if image.exists() and (content := image.read_bytes()).startswith(PNG):
            yield picture(content, "png", path.stem)
        shown = table(head, rows[:MOST_ROWS])
        more = f" (the first {MOST_ROWS} of {len(rows):,}; {path.name} has all)" if len(rows) > MOST_ROWS else ""
        yield element("details", element("summary", f"table{more}"), shown)
    if len(paths) > MOST_TABLES:
        yield element("p", f"{len(paths) - MOST_TABLES} tables of earlier steps are left out.", class_="note")


def _tasks(folder: epath.Path) -> Iterator[Element]:
    """The results of lm-evaluation-harness."""
    paths = sorted((path for path in _files(folder) if re.fullmatch(r"lm_eval_.*\.json", path.name)), key=_by_step)
    if paths:
        yield element("h2", "Tasks of lm-evaluation-harness")
    for path in reversed(paths):
        yield element("h3", path.stem)
        results = _json_of(path).get("results")
        rows = []
        for task, scores in results.items() if isinstance(results, dict) else ():
            for name, value in scores.items() if isinstance(scores, dict) else ():
                metric = name.partition(",")[0]
                if isinstance(value, int | float) and "," in name and not metric.endswith("_stderr"):
                    error = scores.get(name.replace(metric, f"{metric}_stderr", 1))
                    rows.append((task, metric, _number(value), _number(error)))
        yield table(("task", "metric", "value", "standard error"), rows)


def _samples(folder: epath.Path) -> Iterator[Element]:
    paths = sorted((path for path in _files(folder) if path.suffix in (".txt", ".png")), key=_by_step, reverse=True)
    if paths:
        yield element("h2", "Samples")
    for path in paths[:MOST_SAMPLES]:
        yield element("h3", path.stem)
        if path.suffix == ".txt":
            text = _text_of(path)
            yield preformatted(text[:MOST_CHARACTERS])
            if len(text) > MOST_CHARACTERS:
                yield element("p", f"The first {MOST_CHARACTERS:,} of {len(text):,} characters.", class_="note")
        elif (content := path.read_bytes()).startswith(PNG):
            yield picture(content, "png", path.stem)
    if len(paths) > MOST_SAMPLES:
        yield element("p", f"{len(paths) - MOST_SAMPLES} others are left out.", class_="note")


def _settings(settings: Settings) -> Iterator[Element]:
    given, default = _flat(tree_of(settings), "config"), _flat(tree_of(Settings()), "config")
    changed = [(name, value, default.get(name, "")) for name, value in given.items() if default.get(name) != value]
    yield element("h2", "Settings")
    yield element("h3", "Changed from the defaults")
    yield table(("setting", "value", "default"), changed)
    yield element("details", element("summary", "all settings"), table(("setting", "value"), list(given.items())))


def _flat(tree: dict, prefix: str) -> dict[str, str]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}.{name}")
        else:
            flat[f"{prefix}.{name}"] = str(value)
    return flat


def _files(folder: epath.Path) -> list[epath.Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _by_step(path: epath.Path) -> tuple[int, str]:
    """The key to sort by: the number in the file's name, then the name."""
    found = re.search(r"step_(\d+)", path.name)
    return int(found[1]) if found else -1, path.name


def _text_of(path: epath.Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _json_of(path: epath.Path) -> dict:
    """The JSON object in a file; {} if the file does not exist or has no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value) -> str:
    if isinstance(value, bool | str) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e-2 else f"{value:,.4f}"
    return str(value)
