"""Which implementation of attention a run takes, and what it says about it."""

import dataclasses

import jax.numpy as jnp
import pytest

from tests.common import small_config
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.errors import UserError
from tvq_pod.nn import layer_loop, trial
from tvq_pod.nn.pallas import forward
from tvq_pod.parallel import attention
from tvq_pod.parallel.attention import attention_line, check_attention, chosen, with_tried_attention
from tvq_pod.parallel.mesh import make_mesh

KERNELS_FIT = small_config(block_len=128, mem_len=128, d_v=128, n_code=64, d_k=8, n_head=1, dtype=jnp.bfloat16)


@pytest.fixture
def mesh(eight_devices):
    return make_mesh(MeshSettings(), eight_devices[:1])


@pytest.fixture
def on_chip(monkeypatch):
    """Lets meshes seem to be of another kind of device."""

    def become(device_kind: str):
        monkeypatch.setattr("tvq_pod.parallel.sharding.OnMesh.device_kind", lambda self: device_kind)

    return become


def test_a_run_says_which_attention_it_takes_and_refuses_what_cannot_be(mesh):
    assert attention_line(small_config(), mesh) == "config.model.attention=auto uses xla, since cpu is not a TPU"
    assert attention_line(small_config(attention="plain"), mesh) == "config.model.attention=plain"
    kernels = small_config(attention="pallas")
    check_attention(kernels, mesh)
    with pytest.raises(UserError, match=r"^config.model.attention=pallas: config.model.mem_len=8 differs .*; give xla"):
        check_attention(kernels.replace(mem_len=8), mesh)


@pytest.mark.parametrize(
    ("changes", "device", "line"),
    [
        ({}, "TPU v5 lite", "uses pallas, whose kernels fit TPU v5 lite"),
        (dict(mem_len=256), "TPU v5 lite", "uses xla, since config.model.mem_len=256 differs from config.model."),
        ({}, "TPU v4", "uses xla, since kernels are no faster on TPU v4"),
        ({}, "TPU v2", "uses xla, since there are no kernels for TPU v2"),
    ],
    ids=str,
)
def test_auto_takes_the_kernels_where_they_fit(mesh, on_chip, changes, device, line):
    on_chip(device)
    config = KERNELS_FIT.replace(**changes)
    assert line in attention_line(config, mesh)
    assert chosen(config, mesh) == line.split()[1].rstrip(",")


def settings_of(**changes) -> Settings:
    return dataclasses.replace(Settings(), model=small_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(n_head=1, dtype=jnp.bfloat16), marks=pytest.mark.slow),
        pytest.param(dict(head_type="mqa", n_head=2, remat="projections"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernels_that_work_pass_their_trial(changes):
    assert trial.largest_excess(small_config(**changes)) < trial.TOLERANCE / 2


def no_sums(shape, ref):
    yield from ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (forward, "_add_leaving", no_sums),  # nothing gets into the cache
        (layer_loop, "with_mean", lambda new_state, mean: new_state),  # the state keeps the old means
    ],
)
def test_kernels_that_are_wrong_do_not(where, name, wrong, monkeypatch):
    monkeypatch.setattr(where, name, wrong)
    assert not trial.largest_excess(small_config(n_head=1)) <= trial.TOLERANCE


def test_auto_goes_back_to_xla_if_the_kernels_turn_out_wrong(mesh, monkeypatch, capsys):
    monkeypatch.setattr(attention, "chosen", lambda config, mesh: "pallas")
    settings = settings_of(n_head=1)
    excesses = iter([0.01, 0.5, float("nan")])
    monkeypatch.setattr(trial, "largest_excess", lambda config: next(excesses))
    assert with_tried_attention(settings, mesh) is settings
    assert with_tried_attention(settings_of(attention="xla"), mesh).model.attention == "xla"
    for problem in ("one of their results is off by 50%", "off by nan%"):
        assert with_tried_attention(settings, mesh).model.attention == "xla"
        said = capsys.readouterr().err
        assert "the kernels of config.model.attention=auto do not work on cpu" in said
        assert problem in said

    def refuse(*args):
        raise RuntimeError("Mosaic failed\nto compile")

    monkeypatch.setattr(trial, "largest_excess", refuse)
    assert with_tried_attention(settings, mesh).model.attention == "xla"
    assert "(RuntimeError: Mosaic failed to compile)" in capsys.readouterr().err
