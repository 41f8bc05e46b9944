"""The command line before a mode is chosen: what it imports, and what it refuses."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from tests.command import ROOT, environment, finish, start

PACKAGE = ROOT / "tvq_pod"


def test_no_module_beside_a_program_hides_one_of_python_or_of_a_package():
    """A program that is started by its file's name finds what lies beside it first. Elsewhere a module may have such a
    name, as nn/types.py has. (tests/launch has launch's.)"""
    others = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    programs = [path for path in PACKAGE.rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert {path.name for path in programs} == {"main.py", "packages.py", "generate.py"}
    for folder in {path.parent for path in programs}:
        beside = {path.stem for path in folder.glob("*.py")}
        beside |= {path.parent.name for path in folder.glob("*/__init__.py")}
        assert len(beside) > 5
        assert not (beside - {"__init__"}) & others


@pytest.mark.slow(1)
def test_main_runs_as_a_file(tmp_path):
    """With all that a mode imports."""
    command = [sys.executable, "tvq_pod/main.py", "--config=configs/stdlib.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "--mode=inspect"], env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"error: --workdir={tmp_path}/run: has no checkpoint; train there first\n",
    )


HEAVY = ["jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorstore", "numpy", "gcsfs"]
SPY = f"""
import json, os, sys
from tvq_pod import main
for command in json.load(sys.stdin):
    read, write = os.pipe()
    if not os.fork():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.argv[1:], code = command, 0
        try:
            main.run()
        except SystemExit as end:
            code = end.code
        found = [name for name in {HEAVY} if name in sys.modules]
        os.write(write, json.dumps([code, found]).encode())
        os._exit(0)
    os.wait()
    print(os.read(read, 4096).decode(), flush=True)
"""


def test_nothing_of_jax_is_imported_before_a_mode_is_chosen(tmp_path):
    """A wrong flag answers at once."""
    (tmp_path / "broken.py").write_text("from tvq_pod.config import default_config\ndefault_config().optim.name = 1\n")
    (tmp_path / "config.json").write_text('{"optim": 3}')
    config, workdir = "--config=configs/stdlib.py", f"--workdir={tmp_path}"
    wrong = [
        [config, workdir, "--mode=trian"],
        [config, workdir, "--nowhere"],
        [config, workdir, "stray"],
        [config],
        [workdir],
        ["--help"],
        [config, workdir, "--config.optim.learning_rate=4"],
        [config, workdir, "--config.train.num_steps=many"],
        [config, workdir, "--config.model.block_len=7"],
        ["--config=configs/nowhere.py", workdir],
        [f"--config={tmp_path}/broken.py", workdir],
        [config, "--workdir=s3://bucket/run"],
        [config, workdir, "--config.data.store=file:///store"],
        *([f"--config={path}", workdir, "--config.seed=-1"] for path in sorted((ROOT / "configs").glob("*.py"))),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SPY], input=json.dumps(wrong), env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    for command, line in zip(wrong, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [1, []], command


def test_the_model_s_settings_need_no_jax():
    program = "import sys; from tvq_pod.config.model import TransformerConfig; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, check=True, timeout=300)


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--config.optim.learning_rate=4"],
            "config.optim.learning_rate=4: is not a setting; did you mean config.optimizer.learning_rate?",
        ),
        (["--config.modle=4"], "config.modle=4: is not a setting; did you mean config.model?"),
        (["--noconfig.model.etie"], "config.model.etie: is not a setting; did you mean config.model.e_tie?"),
        (["--config.train.num_steps.x=4"], "config.train.num_steps.x=4: is not a setting; did you mean config"),
        (["--config.optimizer=adam"], "config.optimizer=adam: is a group of settings; give one of them"),
        (["--config.train.num_steps=1.5"], "config.train.num_steps=1.5: must be an integer"),
        (["--config.model.e_tie=maybe"], "config.model.e_tie=maybe: must be True or False"),
        (["--workdir=s3://bucket/run"], "--workdir=s3://bucket/run: s3:// is not supported; give a local path, or gs://"),
        (["--workdir=file:///runs/a"], "--workdir=file:///runs/a: must be given without file://; give /runs/a"),
        (["--config.data.store=s3://bucket/s"], "config.data.store=s3://bucket/s: s3:// is not supported"),
        (["--config.data.mixture=s3://b/s=1"], "config.data.mixture=s3://b/s: s3:// is not supported"),
        (["--config.data.vocab=s3://b/v.model"], "config.data.vocab=s3://b/v.model: s3:// is not supported"),
        (["--config.compile_cache=s3://b/c"], "config.compile_cache=s3://b/c: s3:// is not supported"),
        (["--source=a.txt,s3://bucket/x"], "config.data.source=s3://bucket/x: s3:// is not supported; give a local"),
        (["--source=gs:/bucket/x"], "config.data.source=gs:/bucket/x: must be a local path, or gs://BUCKET/FOLDER"),
        (["--source=gs://buck*/x"], "config.data.source=gs://buck*/x: has '*', which no name in a bucket may have"),
        (["--source=file:///corpus"], "config.data.source=file:///corpus: must be given without file://; give /corpus"),
        (["--mode=sample", "--prompt_file=s3://b/p"], "--prompt_file=s3://b/p: must be a path on this machine"),
        (["--workdir=runs/lr[1e-3]"], "--workdir=runs/lr[1e-3]: the full path "),
        (["--workdir=runs/*"], "--workdir=runs/*: the full path "),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_one_line(flags, line, tmp_path):
    """Before anything is read or written."""
    code, out, err = finish(start("--config=configs/stdlib.py", f"--workdir={tmp_path}/run", *flags))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_config_file_s_mistake_is_told_with_its_line(tmp_path):
    for index, (text, message) in enumerate([
        ("config.optim.learning_rate = 4", "config.optim: is not a setting; did you mean config.optimizer? "),
        ("config.train.num_steps = 2.5", "config.train.num_steps=2.5: must be an integer "),
        ("config.model.d_model = 1 / 0", "--config={path}: ZeroDivisionError: division by zero "),
    ]):  # fmt: skip
        path = tmp_path / f"mine_{index}.py"  # of one name, Python might take the first one's bytecode for all
        path.write_text(
            f"from tvq_pod import config as c\ndef get_config():\n  config = c.default_config()\n  {text}\n"
        )
        code, _, err = finish(start(f"--config={path}", f"--workdir={tmp_path}/run"))
        assert code == 1
        assert err.startswith(f"error: {message.format(path=path)}({path}, line 4)"), err
        assert err.count("\n") == 1
    path = tmp_path / "nothing.py"
    path.write_text("def get_config():\n  pass\n")
    code, _, err = finish(start(f"--config={path}", f"--workdir={tmp_path}/run"))
    assert (
        err.splitlines()[-1]
        == f"error: --config={path}: get_config returns NoneType; must be a changed default_config()"
    )
