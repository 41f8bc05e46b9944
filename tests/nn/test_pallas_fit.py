"""Which configs and chips the kernels fit, with which sizes, and that the TPU compiler takes them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies

from tests.common import small_config
from tests.nn.pallas_cases import N_ROWS, arrays_of, compiled
from tvq_pod.config.settings import MeshSettings, Settings, TrainSettings
from tvq_pod.nn.axes import Placement, placed_by
from tvq_pod.nn.pallas import fit
from tvq_pod.nn.pallas.backward import backward_operands
from tvq_pod.nn.pallas.call import Core
from tvq_pod.nn.pallas.fit import Dtypes, implementation, shape_of, sized, why_not
from tvq_pod.nn.pallas.forward import forward_operands
from tvq_pod.nn.pallas.tile import turn, turned_back
from tvq_pod.nn.state import initial_state
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import OnMesh, replicated
from tvq_pod.planning.cost import LIBTPU_ENVIRONMENT
from tvq_pod.training.step import abstract_batch, abstract_train_state, make_train_step

FITS = dict(d_k=128, d_v=1536, n_code=512, block_len=512, mem_len=512, dtype=jnp.bfloat16, n_head=1)


class OnChip(Placement):
    """One device of a kind."""

    def __init__(self, device_kind: str):
        self._device_kind = device_kind

    def device_kind(self):
        return self._device_kind


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "TPU v5 lite", None),
        ({}, "TPU v6 lite", None),
        ({}, "TPU v4", None),
        ({}, "TPU v3", "no kernels for TPU v3"),
        (dict(n_code=8192), "TPU v4", "MiB of VMEM"),
        (dict(d_v=4096), "TPU v5", None),
        (dict(d_v=4096), "TPU7x", None),
        (dict(attn_type="full"), "TPU v5 lite", "config.model.attn_type=full has no codes"),
        (dict(mem_len=1024), "TPU v5 lite", "config.model.mem_len=1024 differs from config.model.block_len=512"),
        (dict(d_k=64), "TPU v5 lite", None),
        (dict(block_len=192, mem_len=192), "TPU v5 lite", "config.model.block_len=192 is not a multiple of 128"),
        (dict(d_v=32 * 1031), "TPU v5", "not a multiple of 64"),
        (dict(d_v=64 * 1031), "TPU v5", "MiB of VMEM"),  # no parts of whole lanes
        ({}, "NVIDIA H100 80GB HBM3", "no kernels for NVIDIA H100"),
        (dict(d_v=1000), "cpu", None),
    ],
    ids=str,
)
def test_whether_a_config_fits_is_known_before_anything_is_compiled(changes, device, reason):
    config = TransformerConfig().replace(**(FITS | changes))
    found = why_not(config, device)
    assert found is None if reason is None else reason in (found or "")
    with placed_by(OnChip(device)):
        takes_them = reason is None and device not in ("cpu", "TPU v4")
        assert implementation(config) == ("pallas" if takes_them else "xla")
        if config.attn_type == "vq":
            assert implementation(config.replace(attention="xla")) == "xla"
            assert implementation(config.replace(attention="pallas")) == "pallas"


@pytest.mark.parametrize(
    ("changes", "n_model", "reason"),
    [
        ({}, 2, None),  # the columns of one head's values
        ({}, 5, "config.mesh.model=5 does not divide config.model.n_head=1, nor config.model.d_v=1536"),
        ({}, 16, "config.model.d_v=1536 leaves 96 columns per device"),
        (dict(head_type="mha", n_head=4), 2, None),
        (dict(head_type="mha", n_head=4), 3, None),  # 1536 = 3 * 512
        (dict(head_type="mqa", n_head=4), 2, None),
        (dict(head_type="mqa", n_head=4), 3, "config.mesh.model=3 does not divide config.model.n_head=4"),
    ],
    ids=str,
)
def test_kernels_need_whole_heads_or_columns_on_a_device(changes, n_model, reason):
    found = why_not(TransformerConfig().replace(**(FITS | changes)), "TPU v5 lite", n_model)
    assert found is None if reason is None else reason in (found or "")


def sizes_on(device: str, n_rows: int = 2, **changes) -> list[tuple[int, int]]:
    """Tile and parts of the forward and the backward kernel."""
    c = TransformerConfig().replace(**(FITS | changes))
    shape = shape_of(c, device, (4, n_rows, 1, 1, c.block_len, c.d_k), c.d_v, True)
    x = Dtypes(shape.dtype, to_state=False)
    return [
        (s.tile, s.n_parts) for s in (sized(shape, operands, x) for operands in (forward_operands, backward_operands))
    ]


def test_values_are_cut_into_parts_where_vmem_is_small_or_a_core_would_be_idle():
    assert sizes_on("TPU v5 lite") == [(256, 1), (256, 1)]
    assert sizes_on("TPU v5", d_v=4096) == [(256, 2), (256, 2)]
    assert sizes_on("TPU v5") == [(256, 1), (256, 1)]
    assert sizes_on("TPU v5", n_rows=1) == [(256, 2), (256, 2)]
    assert all(n_parts > 2 for _, n_parts in sizes_on("TPU v4"))


def compile_for_mesh(config: TransformerConfig, devices: list, sizes: MeshSettings) -> str:
    """The program of `compiled` on devices that need not be here."""
    mesh = make_mesh(sizes, devices[: sizes.sequence * sizes.model])

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)

    given = abstract(jax.eval_shape(lambda: arrays_of(config, 0, 4)))
    doc_ids = abstract(jax.ShapeDtypeStruct((4, N_ROWS, config.block_len), jnp.int32))
    state = abstract(jax.eval_shape(lambda: initial_state(config, N_ROWS)))
    with placed_by(OnMesh(mesh, fsdp=False)):
        lowered = compiled.__wrapped__(config).lower(**given, doc_ids=doc_ids, state=state)
    return lowered.compile().as_text() or ""


@pytest.mark.parametrize("first", [0, 8])
def test_rows_turn_by_steps_as_they_do_at_once(first):
    """On chips without a rotate by another shift in every row; numpy's roll is the oracle."""
    config = small_config(block_len=16, mem_len=16, attention="pallas")
    shape = shape_of(config, "cpu", (1, 1, 1, 1, 16, config.d_k), config.d_v, False)
    shape = dataclasses.replace(shape, tile=8, core=Core(0, can_turn=False))
    x = np.random.default_rng(0).normal(size=[8, 16]).astype(np.float32)

    def turned(function):
        def kernel(x_ref, out_ref):
            out_ref[...] = function(shape, x_ref[...], jnp.int32(first))

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    np.testing.assert_array_equal(turned(turn), np.stack([np.roll(row, first + a) for a, row in enumerate(x)]))
    back = np.stack([np.roll(row, -first - a) for a, row in enumerate(x)])[::-1]
    np.testing.assert_allclose(turned(turned_back), back, rtol=1e-6)


SMALL = dict(attention="pallas", d_k=64, d_v=128, n_code=64, block_len=256, mem_len=256, n_head=1, dtype=jnp.bfloat16)


ALONE, SHARED = MeshSettings(data=1), MeshSettings(data=1, sequence=2, model=2)
VARIANTS = {  # each a mesh, and changes of SMALL
    "one part": (ALONE, {}),
    "mqa": (ALONE, dict(head_type="mqa", n_head=2, window_bias=1.0, dtype=jnp.float32)),
    "no cache": (ALONE, dict(head_type="mha", n_head=2, agg_cache=False, grad_thru_cache=False)),
    "several parts": (ALONE, dict(d_v=256)),
    "shared": (SHARED, dict(d_v=256)),
    "shared mqa": (SHARED, dict(head_type="mqa", n_head=2)),
}


def chips_of(topology: str, monkeypatch) -> list:
    """Devices that need not be here."""
    for variable, value in LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    more = dict(chip_config_name="megacore") if topology.startswith(("v4", "v5p")) else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    ("topology", "variants"),
    [
        ("v5e:2x2", ["mqa", "no cache", "several parts", "shared", "shared mqa"]),
        ("v4:2x2x1", ["several parts"]),
        ("v5p:2x2x1", ["several parts"]),
        ("v6e:2x2", ["one part"]),
        ("tpu7x:2x2x1", ["several parts"]),
    ],
)
def test_the_tpu_compiler_takes_the_kernels(topology, variants, monkeypatch):
    """On one device with one part and with several, and on four that share blocks, heads and columns."""
    devices = chips_of(topology, monkeypatch)
    for variant in variants:
        mesh, changes = VARIANTS[variant]
        config = TransformerConfig().replace(**(SMALL | changes))
        assert why_not(config, devices[0].device_kind, mesh.model) is None
        monkeypatch.setattr(fit, "PART_COLUMNS", -1e6 if variant == "several parts" else 350)
        text = compile_for_mesh(config, devices, mesh)
        kernels = ["tvq_forward", "tvq_backward"] + ["tvq_caches"] * config.agg_cache
        kernels += ["tvq_leaving", "tvq_leaving_backward"] if mesh.sequence > 1 else []
        assert all(f"%{name}" in text or f"{name}_" in text for name in kernels)


@pytest.mark.slow(15)
@pytest.mark.parametrize("topology", ["v5e:2x2"])
def test_the_tpu_compiler_copies_no_layer_out_of_the_stacks(topology, monkeypatch):
    """In a step of three layers; the values of a layer are [4, 2, 1, 256, 128]."""
    devices = chips_of(topology, monkeypatch)[:1]
    model = TransformerConfig().replace(**(SMALL | dict(n_layer=3, d_model=64, attention="auto")))
    train = TrainSettings(batch_size=N_ROWS, update_len=4 * model.block_len)
    settings, mesh = Settings(model=model, train=train), make_mesh(MeshSettings(), devices)
    given = abstract_train_state(settings, mesh), abstract_batch(settings, mesh)
    text = make_train_step(settings, mesh).lower(*given).compile().as_text() or ""
    calls = [line for line in text.splitlines() if "custom-call(" in line and "tvq_" in line]
    assert len(calls) == 6  # two units
    values = r"bf16\[4,2,1,(?:1,)?256,128\]"
    of_one_layer = dict(tvq_forward=0, tvq_caches=0, tvq_backward=1)  # the gradient of the output
    for call in calls:
        name = call.split("%")[1].split(".")[0]
        assert len(re.findall(values, call.partition("operand_layout_constraints")[2])) == of_one_layer[name]
        assert ("output_to_operand_aliasing" in call) == (name == "tvq_forward")  # the output, and the cache's means
    assert not re.findall(rf"= {values}\S* dynamic-slice\(", text)
