"""The kernels in interpret mode, against the plain implementation: outputs, states and every gradient."""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import SingleDeviceSharding

from tests.common import rngs_fixture, small_config
from tvq_pod.config.settings import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.errors import UserError
from tvq_pod.nn.axes import Placement, placed_by
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.pallas.core import fused_attention
from tvq_pod.nn.pallas.fit import implementation, shape_of, why_not
from tvq_pod.nn.plain import plain_attention
from tvq_pod.nn.state import initial_state
from tvq_pod.nn.types import TransformerConfig, VQSpec
from tvq_pod.parallel.attention import attention_line, check_attention
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import OnMesh
from tvq_pod.planning.cost import LIBTPU_ENVIRONMENT
from tvq_pod.training.step import create_train_state, make_train_step

N_ROWS, N_BLOCKS, BLOCK_LEN = 2, 3, 4
T = N_BLOCKS * BLOCK_LEN


def core_config(**changes) -> TransformerConfig:
    return small_config(block_len=BLOCK_LEN, mem_len=BLOCK_LEN, attention="pallas", **changes)


def arrays_of(config: TransformerConfig, seed: int) -> dict:
    """Random queries, keys, values, gates, codes and biases of an update."""
    c, rng = config, np.random.default_rng(seed)
    heads = c.n_key_head, c.n_head // c.n_key_head
    shapes: dict[str, tuple[int, ...]] = dict(
        q=(N_BLOCKS, N_ROWS, *heads, c.block_len, c.d_k),
        k_hat=(N_BLOCKS, N_ROWS, c.n_key_head, c.block_len, c.d_k),
        v=(N_BLOCKS, N_ROWS, c.n_key_head, c.block_len, c.d_v),
        u=(c.n_head, c.d_k),
        v_bias=(c.n_head, c.d_k),
        r=(c.n_key_head, c.mem_len + 1, c.d_k),
    )
    if c.head_type == "shga":
        shapes["gate"] = (*shapes["q"][:-1], c.d_v)
    arrays = {name: jnp.asarray(rng.normal(size=shape), c.dtype) for name, shape in shapes.items()}
    codes = jnp.asarray(rng.normal(size=(c.n_key_head, c.n_code, c.d_k)), c.dtype)
    z = rng.integers(0, c.n_code, size=shapes["k_hat"][:-1]).astype(np.int32)
    return dict(differentiated=arrays, codes=codes, z=z)


def attended(config: TransformerConfig, x: dict, codes, z, doc_ids, state: dict) -> tuple[jax.Array, dict]:
    """By the implementation that `config.attention` names; the plain one has SiLU and gate around it."""
    c, gate = config, x.get("gate")
    biases = dict(u=x["u"], v=x["v_bias"], r=x["r"], codes=codes)
    present = dict(z=z, k_hat=x["k_hat"], v=x["v"], doc_ids=doc_ids)
    if c.attention == "pallas":
        return fused_attention(c, biases, x["q"], present, gate, state)
    biases |= {name: biases[name].reshape(c.n_key_head, -1, c.d_k) for name in ("u", "v")}
    if gate is None:
        return plain_attention(c, biases, x["q"], present, state)
    out, state = plain_attention(c, biases, x["q"], present | dict(v=jax.nn.silu(x["v"])), state)
    return out * jax.nn.silu(gate), state


@functools.cache
def compiled(config: TransformerConfig):
    """(differentiated, codes, z, doc_ids, state) -> output, next state, and the gradients of a fixed sum of both by all
    that is differentiated and by the state's keys, values and means."""

    def weighted(x):
        return jnp.sum(jnp.sin(1.0 + jnp.arange(x.size)).reshape(x.shape) * x.astype(jnp.float32))

    def loss(x, of_state, codes, z, doc_ids, state):
        state = state | dict(
            xlcache=state["xlcache"] | {name: of_state[name] for name in ("k_hat", "v")},
            aggcache=state["aggcache"] | dict(upper_div_lower=of_state["mean"]),
        )
        out, state = attended(config, x, codes, z, doc_ids, state)
        total = weighted(out)
        if config.grad_thru_cache:  # else what reaches the next update depends on where it is cut
            total += weighted(state["aggcache"]["upper_div_lower"]) + weighted(state["xlcache"]["v"])
        return total, (out, state)

    @jax.jit
    def run(differentiated, codes, z, doc_ids, state):
        of_state = {name: state["xlcache"][name] for name in ("k_hat", "v")}
        of_state["mean"] = state["aggcache"]["upper_div_lower"]
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        gradients, (out, state) = grad(differentiated, of_state, codes, z, doc_ids, state)
        return dict(out=out, state=state, gradients=gradients)

    return run


def documents(borders: list[list[int]]) -> np.ndarray:
    """A row for each list of places where a document begins: ids of two updates, [2, R, B, L]."""
    ids = [np.searchsorted(np.unique(row), np.arange(2 * T), side="right") for row in borders]
    return np.stack(ids).astype(np.int32).reshape(N_ROWS, 2, N_BLOCKS, BLOCK_LEN).transpose(1, 2, 0, 3)


def two_updates(config: TransformerConfig, borders: list[list[int]], seed: int = 0):
    """Both implementations on two updates, each from the state that the plain one left: pairs (kernels, plain)."""
    state = initial_state(config, N_ROWS)
    for number, doc_ids in enumerate(documents(borders)):
        arrays = arrays_of(config, seed + number)
        expected = compiled(config.replace(attention="plain"))(**arrays, doc_ids=doc_ids, state=state)
        yield compiled(config)(**arrays, doc_ids=doc_ids, state=state), expected
        state = expected["state"]


def assert_equal(found: dict, expected: dict) -> None:
    """To the rounding of float32."""
    assert np.abs(expected["gradients"][0]["q"]).max() > 1e-3
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


borders_of_rows = st.lists(st.lists(st.integers(1, 2 * T - 1), max_size=4), min_size=N_ROWS, max_size=N_ROWS)


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_head=1),
        dict(head_type="mqa", n_head=3, window_bias=1.5),
        dict(grad_thru_cache=False),
    ],
    ids=str,
)
@settings(max_examples=6, deadline=None)
@given(borders=borders_of_rows, seed=st.integers(0, 9))
def test_kernels_give_what_the_plain_implementation_gives_wherever_documents_are_cut(changes, borders, seed):
    for found, expected in two_updates(core_config(**changes), borders, seed):
        assert_equal(found, expected)


@pytest.mark.slow(6)
@pytest.mark.parametrize("agg_cache", [True, False])
@pytest.mark.parametrize("grad_thru_cache", [True, False])
@pytest.mark.parametrize("heads", [dict(n_head=2), dict(head_type="mqa"), dict(head_type="mha", n_head=3)], ids=str)
def test_kernels_give_what_the_plain_implementation_gives_for_every_head_type(heads, grad_thru_cache, agg_cache):
    config = core_config(**heads, grad_thru_cache=grad_thru_cache, agg_cache=agg_cache)
    for found, expected in two_updates(config, [[5, 13], [8]]):
        assert_equal(found, expected)


@pytest.mark.slow
def test_kernels_without_a_cache_end_with_the_window():
    config = core_config(head_type="mha", agg_cache=False, window_bias=2.0)
    for found, expected in two_updates(config, [[5], []]):
        assert_equal(found, expected)


@pytest.mark.slow
def test_a_block_without_halves_is_one_tile_and_one_block_is_an_update():
    config = small_config(block_len=3, mem_len=3, n_head=1, attention="pallas")
    assert shape_of(config, "cpu", 1, 1, True).n_tiles == 1 < shape_of(core_config(), "cpu", 1, 1, True).n_tiles
    arrays = arrays_of(config, 0)
    first = {name: x[:1] if name in ("q", "k_hat", "v", "gate") else x for name, x in arrays["differentiated"].items()}
    given = dict(differentiated=first, codes=arrays["codes"], z=arrays["z"][:1])
    given |= dict(doc_ids=np.array([[[0, 0, 1], [0, 0, 0]]], np.int32), state=initial_state(config, N_ROWS))
    assert_equal(compiled(config)(**given), compiled(config.replace(attention="plain"))(**given))


@pytest.mark.slow
def test_kernels_in_bfloat16_are_as_near_to_float32_as_the_plain_implementation():
    config = core_config(n_head=1, dtype=jnp.bfloat16)
    exactly = config.replace(attention="plain", dtype=jnp.float32)
    for seed in range(3):
        arrays, doc_ids = arrays_of(config, seed), documents([[5], [8]])[0]
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
        exact = compiled(exactly)(**wide, doc_ids=doc_ids, state=initial_state(exactly, N_ROWS))
        for kind in ("plain", "pallas"):
            of_kind = config.replace(attention=kind)
            found = compiled(of_kind)(**arrays, doc_ids=doc_ids, state=initial_state(config, N_ROWS))
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True):
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                name = kind + jax.tree_util.keystr(path)
                error, size = np.sqrt(np.mean(np.square(a - b))), np.sqrt(np.mean(np.square(b)))
                assert error <= 0.02 * size, f"{name}: {error / size:.4f}"


@pytest.mark.slow
def test_kernels_are_spread_over_rows_and_heads(eight_devices):
    config = core_config(head_type="mha")
    mesh = make_mesh(MeshSettings(data=2, model=2), eight_devices[:4])
    arrays, doc_ids, state = arrays_of(config, 0), documents([[5], []])[0], initial_state(config, N_ROWS)
    alone = compiled(config)(**arrays, doc_ids=doc_ids, state=state)
    with placed_by(OnMesh(mesh, fsdp=True)):
        run = compiled.__wrapped__(config)
        lowered = run.lower(**arrays, doc_ids=doc_ids, state=state)
        spread = run(**arrays, doc_ids=doc_ids, state=state)
    assert "sdy.manual_computation" in lowered.as_text()
    assert_equal(spread, alone)


@functools.cache
def traced_gradient(**changes) -> list[tuple[str, list]]:
    """The kernels in the gradient of a whole model, by name, with the types of what they return."""
    config = small_config(attention="pallas", n_layer=3, is_train=True, **changes)
    tokens = jnp.zeros([2, T], jnp.int32)
    state = jax.eval_shape(lambda: Transformer.initial_state(config, 2))
    spec = VQSpec(jnp.ones([2, T]))

    def loss(params, state):
        applied = Transformer(config).apply(
            dict(params=params), state, tokens, tokens, spec, tokens, rngs=rngs_fixture()
        )
        new_state, out = cast(tuple[dict, dict], applied)
        return jnp.sum(out["losses"]) + out["l_codebook"], new_state

    init = functools.partial(Transformer(config.replace(is_train=False)).init, jax.random.key(0))
    params = jax.eval_shape(lambda state: init(state, tokens, tokens)["params"], state)
    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(nn.meta.unbox(params), state)
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append((equation.params["name"], [out.aval for out in equation.outvars]))
            else:
                for inner in jaxprs_in_params(equation.params):
                    look(inner)

    look(jaxpr.jaxpr)
    return found


@pytest.mark.parametrize("remat", ["none", "projections", "dots", "full"])
@pytest.mark.slow
def test_the_forward_kernel_runs_again_only_where_nothing_is_kept(remat):
    names = [name for name, _ in traced_gradient(remat=remat)]
    units = 2  # of a layer; the scan has each once
    assert names.count("tvq_backward") == names.count("tvq_caches") == units
    assert names.count("tvq_forward") == (2 if remat == "full" else 1) * units


def test_training_makes_no_gradient_of_the_state():
    (outputs, _) = (avals for name, avals in traced_gradient(remat="projections") if name == "tvq_backward")
    means = small_config().n_code, small_config().d_v
    assert not any(aval.shape[-2:] == means for aval in outputs)


@pytest.mark.slow(15)
def test_a_run_goes_on_with_the_kernels_from_where_it_was_without_them(eight_devices):
    """Two steps by xla, and a third by each: one loss, one state; what is saved has the same tree."""
    mesh, rng = make_mesh(MeshSettings(), eight_devices[:1]), np.random.default_rng(0)

    def settings_of(attention):
        model = core_config(n_head=1, n_layer=1, remat="projections", p_dropsin=0.2).replace(attention=attention)
        optimizer = OptimizerSettings(learning_rate=0.01, warmup_steps=0)
        return Settings(model=model, train=TrainSettings(batch_size=N_ROWS, update_len=T), optimizer=optimizer)

    def batch():
        tokens = rng.integers(0, 11, size=[2, N_ROWS, T]).astype(np.int32)
        doc_ids = np.sort(rng.integers(0, 2, size=[N_ROWS, T]), axis=1).astype(np.int32)
        mask = np.ones([N_ROWS, T], np.float32)
        return jax.device_put(dict(inputs=tokens[0], targets=tokens[1], doc_ids=doc_ids, loss_mask=mask))

    by_xla, by_kernels = (make_train_step(settings_of(attention), mesh) for attention in ("xla", "pallas"))
    state = create_train_state(settings_of("xla"), mesh)
    for _ in range(2):
        state, _ = by_xla(state, batch())
    last, copy = batch(), jax.tree.map(jnp.copy, state)  # a step takes its state
    expected, expected_metrics = by_xla(state, last)
    found, metrics = by_kernels(copy, last)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found.recurrent), jax.tree.leaves(expected.recurrent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)


FITS = dict(d_k=128, d_v=1536, n_code=512, block_len=512, mem_len=512, dtype=jnp.bfloat16, n_head=1)


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "TPU v5 lite", None),
        ({}, "TPU v6 lite", None),
        (dict(d_v=256, n_code=128, block_len=128, mem_len=128), "TPU v4", "no kernels for TPU v4"),
        (dict(attn_type="full"), "TPU v5 lite", "config.model.attn_type=full has no codes"),
        (dict(mem_len=1024), "TPU v5 lite", "config.model.mem_len=1024 differs from config.model.block_len=512"),
        (dict(d_k=64), "TPU v5 lite", None),
        (dict(block_len=192, mem_len=192), "TPU v5 lite", "config.model.block_len=192 is not a multiple of 128"),
        (dict(d_v=8192), "TPU v5", "MiB of VMEM"),
        ({}, "NVIDIA H100 80GB HBM3", "no kernels for NVIDIA H100"),
        (dict(d_v=1000), "cpu", None),
    ],
    ids=str,
)
def test_whether_a_config_fits_is_known_before_anything_is_compiled(changes, device, reason):
    config = TransformerConfig().replace(**(FITS | changes))
    found = why_not(config, device)
    assert found is None if reason is None else reason in (found or "")
    assert implementation(config) == "xla"
    if config.attn_type == "vq":
        assert implementation(config.replace(attention="pallas")) == "pallas"


def test_kernels_need_whole_updates_and_whole_heads_on_a_device():
    config = TransformerConfig().replace(**FITS)
    assert "config.mesh.sequence=2" in (why_not(config, "TPU v5 lite", n_sequence=2) or "")
    assert "config.mesh.model=2" in (why_not(config, "TPU v5 lite", n_model=2) or "")
    several = config.replace(head_type="mha", n_head=4)
    assert why_not(several, "TPU v5 lite", n_model=2) is None
    assert why_not(several, "TPU v5 lite", n_model=3) is not None


def test_a_run_says_which_attention_it_takes_and_refuses_what_cannot_be(eight_devices):
    mesh = make_mesh(MeshSettings(), eight_devices[:1])
    assert attention_line(small_config(), mesh) == "config.model.attention=auto takes xla"
    check_attention(core_config(), mesh)
    with pytest.raises(UserError, match=r"^config.model.attention=pallas: config.model.mem_len=8 differs .*; give xla"):
        check_attention(core_config().replace(mem_len=8), mesh)


class OnChip(Placement):
    """One device of a topology."""

    def __init__(self, device):
        self._device = device

    def device_kind(self):
        return self._device.device_kind


def compile_for_chip(config: TransformerConfig, device) -> str:
    """The program of `compiled` on a device that need not be here."""
    sharding = SingleDeviceSharding(device)

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    given = abstract(jax.eval_shape(lambda: arrays_of(config, 0)))
    doc_ids = abstract(jax.ShapeDtypeStruct((N_BLOCKS, N_ROWS, config.block_len), jnp.int32))
    state = abstract(jax.eval_shape(lambda: initial_state(config, N_ROWS)))
    with placed_by(OnChip(device)):
        lowered = compiled.__wrapped__(config).lower(**given, doc_ids=doc_ids, state=state)
    return lowered.compile().as_text() or ""


@pytest.mark.slow(20)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_tpu_compiler_takes_the_kernels(topology, monkeypatch):
    for variable, value in LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    small = dict(attention="pallas", d_k=64, d_v=128, n_code=64, block_len=256, mem_len=256)
    for changes in (
        dict(n_head=1, dtype=jnp.bfloat16),
        dict(head_type="mqa", n_head=2, window_bias=1.0),
        dict(head_type="mha", n_head=2, agg_cache=False, grad_thru_cache=False, dtype=jnp.bfloat16),
    ):
        config = TransformerConfig().replace(**small, **changes)
        assert why_not(config, device.device_kind) is None
        assert shape_of(config, device.device_kind, N_BLOCKS, N_ROWS, False).tile == 256
        text = compile_for_chip(config, device)
        kernels = ["tvq_forward", "tvq_backward"] + ["tvq_caches"] * config.agg_cache
        assert all(f"%{name}" in text or f"{name}_" in text for name in kernels)
