"""The folder of an exported model: names and bits of its tensors, what is refused, and what is left when it fails."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tests import forked
from tests.command import ROOT, environment
from tests.common import model_params, small_config
from tests.data.test_vocab import trained
from tests.exporting import ORIGIN, export_to
from tvq_pod.config.resolve import resolve
from tvq_pod.config.run_config import read_run_config
from tvq_pod.config.settings import DataSettings
from tvq_pod.errors import UserError
from tvq_pod.inference.exported import WEIGHTS, params_of, read_exported, tensor_names, tensors_of

CONFIG = small_config(n_vocab=259, head_type="mha", pe_abs=True, temperature="learned")


def abstract_params(config=CONFIG):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model_params(config))


def imported(folder, config=CONFIG):
    return params_of(read_exported(folder).tensors, abstract_params(config), folder)


def test_every_parameter_of_every_layer_has_a_tensor(tmp_path):
    """Sizes are those of docs/export.md: D 8, K 6, V 8, S 5, two heads, MLP of CONFIG.hidden_width."""
    with safetensors.safe_open(export_to(tmp_path / "out", CONFIG) / WEIGHTS, "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    attention = {
        "norm.scale": (8,), "w_q.kernel": (2, 6, 8), "w_k.kernel": (2, 6, 8), "w_v.kernel": (2, 8, 8),
        "w_r.kernel": (2, 6, 8), "w_o.kernel": (2, 8, 8), "u": (2, 6), "v": (2, 6), "log_sharpness": (2,),
        "quantizer.codebook": (2, 5, 6), "quantizer.count": (2, 5),
    }  # fmt: skip
    width = CONFIG.hidden_width
    mlp = {"norm.scale": (8,), "w_up.kernel": (1, width, 8), "w_down.kernel": (1, width, 8)}
    expected = {"embedding": (259, 8), "w_out": (8, 259), "norm_out.scale": (8,), "pe_scale": ()}
    for layer in range(2):
        for unit, parts in (("unit0", attention), ("unit1", mlp)):
            expected |= {f"layers.{layer}.{unit}.{name}": shape for name, shape in parts.items()}
    assert shapes == expected


def test_a_layer_s_tensor_is_its_part_of_the_stack():
    tensors = tensors_of(model_params(CONFIG), np.float32)
    stacked = np.asarray(model_params(CONFIG)["layers"]["unit0"]["w_q"]["kernel"])
    assert not np.array_equal(stacked[0], stacked[1])
    for layer in range(2):
        np.testing.assert_array_equal(tensors[f"layers.{layer}.unit0.w_q.kernel"], stacked[layer])


def test_layers_come_back_in_their_order_when_there_are_more_than_ten():
    config = small_config(n_layer=12, n_head=1)
    params = jax.tree.map(np.asarray, model_params(config))
    tensors = tensors_of(params, np.float32)
    assert len(tensors) == len(tensor_names(params)) > 12 * 20
    jax.tree.map(np.testing.assert_array_equal, params_of(tensors, abstract_params(config), epath.Path("x")), params)


def test_float32_weights_come_back_bit_for_bit_and_bfloat16_ones_rounded(tmp_path):
    params = jax.tree.map(np.asarray, model_params(CONFIG))
    exact = imported(export_to(tmp_path / "exact", CONFIG))
    assert jax.tree.structure(exact) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, exact, params)
    rounded = imported(export_to(tmp_path / "rounded", CONFIG, dtype="bfloat16"))
    np.testing.assert_array_equal(rounded["embedding"], params["embedding"].astype(jax.numpy.bfloat16))
    assert rounded["embedding"].dtype == np.float32
    for name in ("codebook", "count"):  # stay what they are
        path = rounded["layers"]["unit0"]["quantizer"][name], params["layers"]["unit0"]["quantizer"][name]
        np.testing.assert_array_equal(*path)


def test_the_folder_says_where_its_parameters_come_from_and_nothing_of_the_machine(tmp_path):
    vocab = trained(tmp_path)
    data = dict(source="", store="gs://mine/store", mixture="/a=1,/b=2", vocab="/home/me/own.model")
    settings = dict(init_from="/home/me/run@5", init_optimizer=True, init_layers=1, compile_cache="/home/me/cache")
    of_data = DataSettings(**data, mixture_schedule="3:0.5/0.5")
    folder = export_to(tmp_path / "out", small_config(n_vocab=400), vocab, data=of_data, **settings)
    found = read_exported(folder)
    assert (found.origin, found.vocab.name) == (ORIGIN, vocab.name)
    config = json.loads((folder / "config.json").read_text())
    assert {name: config["data"][name] for name in data} == dict(source="", store="", mixture="", vocab="vocab.model")
    assert config["model"]["d_k"] == 6
    assert "/home/me" not in (folder / "config.json").read_text()
    resolved = resolve(read_run_config(folder, "--from"))  # as --mode=import does
    assert (resolved.init_from, resolved.data.mixture_schedule) == ("", "")
    everywhere = export_to(tmp_path / "everywhere", CONFIG, data=DataSettings(source="stdlib"))
    assert json.loads((everywhere / "config.json").read_text())["data"]["source"] == "stdlib"


# ------------------------------------------------- folders that do not fit
def with_tensors(folder, changes):
    """The folder with other tensors; None takes one away."""
    tensors = dict(read_exported(folder).tensors) | changes
    tensors = {name: np.asarray(x) for name, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pe_scale": None}, "lacks pe_scale; give the file that belongs to this config.json"),
        ({"w_out": None, "layers.1.unit0.u": None}, "lacks layers.1.unit0.u and 1 more; "),
        ({"extra": np.zeros(3, np.float32)}, "has extra, which the model of config.json does not have; "),
        ({"layers.2.unit0.u": np.zeros([2, 6], np.float32)}, "has layers.2.unit0.u, which "),
        ({"w_out": np.zeros([8, 9], np.float32)}, "w_out has the shape (8, 9), but (8, 259) by config.json"),
        ({"layers.1.unit0.v": np.zeros([6, 2], np.float32)}, "layers.1.unit0.v has the shape (6, 2), but (2, 6) by"),
        ({"w_out": np.zeros([8, 259], np.float16)}, "w_out has the type F16; must be F32 or BF16"),
        ({"w_out": np.full([8, 259], np.inf, np.float32)}, "w_out has numbers that are not finite; export the model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, message, tmp_path):
    folder = export_to(tmp_path / "out", CONFIG)
    with_tensors(folder, changes)
    with pytest.raises(UserError) as raised:
        imported(folder)
    assert str(raised.value).startswith(f"--from={folder}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no model.safetensors; give a folder that --mode=export made"),
        (b"", "model.safetensors is damaged ("),
        (b"cut", "model.safetensors is damaged ("),
        (b"\xff" * 200, "model.safetensors is damaged ("),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_told(content, message, tmp_path):
    folder = export_to(tmp_path / "out", CONFIG)
    if content is None:
        (folder / WEIGHTS).unlink()
    else:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7] if content == b"cut" else content)
    with pytest.raises(UserError) as raised:
        read_exported(folder)
    assert str(raised.value).startswith(f"--from={folder}: {message}")


def test_a_vocabulary_that_is_missing_or_another_one_is_told(tmp_path):
    folder = export_to(tmp_path / "out", small_config(n_vocab=400), trained(tmp_path))
    content = (folder / "vocab.model").read_bytes()
    (folder / "vocab.model").unlink()
    with pytest.raises(UserError, match=r"no vocab\.model or .*, but the model's vocabulary is sentencepiece:"):
        read_exported(folder)
    (folder / "vocab.model").write_bytes(content + b"\x18\x00")
    with pytest.raises(UserError, match=r"vocab\.model is sentencepiece:.*, but the model's vocabulary is sent"):
        read_exported(folder)


# ------------------------------------------------- exports that fail
FAILS = """
import os, resource, signal, sys
import safetensors.numpy
from tests.common import small_config
from tests.exporting import export_to
from tvq_pod.config.settings import DataSettings
from tvq_pod.errors import UserError
folder, how = sys.argv[-2:]
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
elif how == "killed":
    whole = safetensors.numpy.save_file
    def half(tensors, path, metadata):
        whole(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    safetensors.numpy.save_file = half
try:
    export_to(folder, small_config(n_vocab=2000))
except UserError as error:
    sys.exit(str(error))
"""


def exporting(folder, how):
    command = [sys.executable, "-c", f"import sys; sys.argv[1:] = [{str(folder)!r}, {how!r}]\n{FAILS}"]
    process = forked.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.slow(1)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code, err = exporting(tmp_path / "out", "full")
    assert code == 1, err
    assert err.startswith(f"--to={tmp_path}/out: can't be written (")
    assert "File too large" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow(2)
def test_a_killed_export_leaves_no_folder_of_that_name_and_is_no_obstacle(tmp_path):
    code, _ = exporting(tmp_path / "out", "killed")
    assert code == -signal.SIGKILL
    (draft,) = tmp_path.iterdir()
    assert draft.name.startswith("out.writing-")
    with pytest.raises(UserError, match="is damaged"):
        read_exported(epath.Path(draft))
    assert exporting(tmp_path / "out", "") == (0, "")
    read_exported(epath.Path(tmp_path / "out"))


def test_what_is_in_the_way_stays_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    export_to(tmp_path / "out", CONFIG)  # an empty folder may be there
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=f"--to={tmp_path}/out: can't be written"):  # made by another process meanwhile
        export_to(tmp_path / "out", CONFIG.replace(n_layer=1))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_others_may_read_what_was_written(tmp_path):
    folder = pathlib.Path(export_to(tmp_path / "out", CONFIG))
    (tmp_path / "file").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "file").stat().st_mode}
