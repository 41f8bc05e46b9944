"""Figures of speed, memory and quality that the configs, README and docs quote: each stands in docs/figures.json alone.

    python -m tests.figures                  says which texts quote something else
    python -m tests.figures --run            plans all figures again whose names begin with "plan", and writes them
    python -m tests.figures --run NAME ...   plans those alone
    python -m tests.figures --write          writes the figures into the texts

An entry has its command, date, machine and values, and `quoted`: for each file, the sentences that have them, with a
place like {step_ms:.2f} for each number. Texts may break their lines anywhere.
"""

import argparse
import collections
import concurrent.futures
import datetime
import json
import pathlib
import re
import shlex
import string
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ROOT / "docs/figures.json"
GIB = 2**30
IF_IT_FITS = (  # or if it doesn't: what a plan gives in one of the two cases
    *("step_ms", "mfu_percent", "roofline_ms", "roofline_mfu_percent", "temp_gib", "peak_gib"),
    *("gathered_mib", "summed_mib", "model_mib", "sequence_mib", "sent_ms", "short_gib"),
)
NUMBER = r"[\d.,]*\d"


def load() -> dict:
    """All entries by name."""
    return json.loads(FIGURES.read_text())


def numbers(entry: dict) -> dict:
    """An entry's values, and what follows from them."""
    values = dict(entry["values"])
    if "parameters" in values:  # in two digits, as people say them, or in three
        two_digits = float(f"{values['parameters']:.2g}")
        values["million_parameters"], values["billion_parameters"] = two_digits / 1e6, two_digits / 1e9
        values["rounded_parameters"] = float(f"{values['parameters']:.3g}")
    if "step_ms" in values:
        seconds, tokens, chips = values["step_ms"] / 1000, values["tokens_per_step"], values["chips"]
        values["step_seconds"] = seconds
        values["tokens_per_second"] = round(tokens / seconds, -3)
        values["tokens_per_chip"] = tokens / chips
        values["tokens_per_chip_second"] = tokens / chips / seconds
        values["billion_per_hour"] = tokens / seconds * 3600 / 1e9
        values["million_per_chip_hour"] = tokens / seconds * 3600 / chips / 1e6
        if "parameters" in values:
            values["days_of_20"] = 20 * values["parameters"] / tokens * seconds / 86400  # tokens a parameter
    if "num_steps" in values and "step_ms" in values:
        values["hours"] = values["num_steps"] * values["step_seconds"] / 3600
        values["chip_hours"] = values["hours"] * values["chips"]
        values["checkpoint_minutes"] = values["checkpoint_steps"] * values["step_seconds"] / 60
    if "cache_all" in values:
        values["worth_near"] = values["off_0_to_1023"] - values["cache_0_to_1023"]
        values["worth_far"] = values["off_65536_to_205823"] - values["cache_65536_to_205823"]
        values["lost_near"] = values["cache_0_to_1023"] - values["without_0_to_1023"]
        values["lost"] = values["cache_all"] - values["without_all"]
    return values


def quotes(figures: dict):
    """Every (file, sentence with places, its numbers) of all entries."""
    for entry in figures.values():
        for file, sentences in entry["quoted"].items():
            for sentence in sentences:
                yield file, sentence, numbers(entry)


def pattern(sentence: str) -> re.Pattern:
    """The sentence with any numbers in its places; a group for each number, and for what is between them."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(sentence):
        parts.append("(" + r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)) + ")")
        if field:
            parts.append(f"({NUMBER})")
    return re.compile("".join(parts))


def filled(sentence: str, values: dict) -> list[str]:
    """The texts of the sentence's numbers, in order."""
    fields = [(name, form) for _, name, form, _ in string.Formatter().parse(sentence) if name]
    return [format(values[name], form) for name, form in fields]


def wrong(figures: dict) -> list[str]:
    """A line for each sentence that its file does not have, or has with other numbers."""
    lines = []
    for file, sentence, values in quotes(figures):
        found = pattern(sentence).search((ROOT / file).read_text())
        if not found:
            lines.append(f"{file}: has no sentence {sentence!r}")
        elif [*found.groups()][1::2] != filled(sentence, values):
            lines.append(f"{file}: has {' '.join(found[0].split())!r}, and not {', '.join(filled(sentence, values))}")
    return lines


def write(figures: dict) -> None:
    """Puts the numbers into the sentences, which keep their line breaks."""
    for file, sentence, values in quotes(figures):
        path, texts = ROOT / file, filled(sentence, values)

        def replaced(found: re.Match, texts=texts) -> str:
            groups = [*found.groups()]
            groups[1::2] = texts
            return "".join(groups)

        path.write_text(pattern(sentence).sub(replaced, path.read_text(), count=1))


def plan(entry: dict) -> None:
    """Runs an entry's command, and keeps what it says."""
    with tempfile.TemporaryDirectory() as workdir:
        words = [sys.executable, *shlex.split(entry["command"])[1:]]
        words = [f"--workdir={workdir}" if word.startswith("--workdir=") else word for word in words]
        subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        found = json.loads((pathlib.Path(workdir) / "plan.json").read_text())
    values, sizes = entry["values"], found["bytes_per_chip"]
    known = dict(
        chips=found["chips"],
        tokens_per_step=found["tokens_per_step"],
        parameters=found["parameter_count"],
        hbm_gib=round(found["hbm_bytes_per_chip"] / GIB),
    )
    if found["fits"]:
        known |= dict(
            step_ms=round(found["predicted_step_seconds"] * 1000, 3),
            mfu_percent=round(found["predicted_mfu"] * 100, 2),
            roofline_ms=round(found["roofline_step_seconds"] * 1000, 3),
            roofline_mfu_percent=round(found["roofline_mfu"] * 100, 2),
            temp_gib=round(sizes["temp"] / GIB, 3),
            peak_gib=round(sizes["peak"] / GIB, 3),
            **sent(found),
        )
    else:
        known |= dict(short_gib=round(found["short_by_bytes"] / GIB, 2))
    versions = found["versions"]
    for name in IF_IT_FITS:  # of a plan before this one: a sentence that quotes what is gone has to be written again
        values.pop(name, None)
    values |= known
    entry["date"] = datetime.date.today().isoformat()
    entry["machine"] = f"jax {versions['jax']}, libtpu {versions['libtpu']}; compiled on a CPU"


def sent(found: dict) -> dict:
    """What a device sends in a step, in MiB by what it is; and how long all of it takes at the links' full speed."""
    totals = collections.Counter()
    for collective in found["collectives"]:
        axes = set(collective["axes"])
        kind = "gathered" if collective["kind"] == "all-gather" else "summed"
        totals["model" if "model" in axes else "sequence" if "sequence" in axes else kind] += collective["bytes"]
    sizes = {f"{name}_mib": round(size / 2**20) for name, size in totals.items()}
    return sizes | dict(sent_ms=round(found["collective_seconds_if_alone"] * 1000, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="plans at once")
    parser.add_argument("--write", action="store_true")
    arguments, figures = parser.parse_args(), load()
    asked = arguments.run
    names = asked or [name for name in figures if asked is not None and name.startswith("plan ")]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        planned = {pool.submit(plan, figures[name]): name for name in names}
        for done in concurrent.futures.as_completed(planned):
            done.result()
            print(planned[done], flush=True)
            FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    if arguments.write or asked is not None:
        write(figures)
    lines = wrong(figures)
    print("\n".join(lines) or "all agree")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
