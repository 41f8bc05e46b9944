"""Planning: the real TPU compiler on a small model, against independent counts."""

import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.command import ROOT, finish, start
from tvq_pod.config.settings import Settings, TrainSettings
from tvq_pod.errors import UserError
from tvq_pod.modes.plan import parse_grid, plan
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.planning.chips import CHIPS, GIB
from tvq_pod.planning.cost import shortage, topology_devices
from tvq_pod.planning.flops import forward_flops_per_token, train_flops
from tvq_pod.planning.hlo import Program

SMALL = [
    f"--config={ROOT}/configs/throughput.py",
    "--config.model.d_model=256",
    "--config.model.d_v=256",
    "--config.model.n_code=128",
    "--config.model.block_len=128",
    "--config.model.mem_len=128",
    "--config.model.n_layer=1",
    "--config.train.update_len=256",
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict:
    """A layer on v5e:2x2, and what does not fit, planned at once."""
    folder = tmp_path_factory.mktemp("plan")
    fits = start("--mode=plan", *SMALL, "--topology=v5e:2x2", f"--workdir={folder / 'fits'}", "--tokens=1e9")
    huge = ["--config.model.head_type=mqa", "--config.train.batch_size=4096", "--config.train.update_len=65536"]
    lacks = start("--mode=plan", *SMALL, *huge, "--topology=v5e:2x2", f"--workdir={folder / 'lacks'}")
    results = {}
    for name, process in (("fits", fits), ("lacks", lacks)):
        code, out, err = finish(process)
        assert code == 0, err
        results[name] = json.loads((folder / name / "plan.json").read_text()) | dict(printed=out)
    return results


@pytest.mark.slow
def test_a_plan_says_what_the_step_takes(planned):
    plan = planned["fits"]
    d, k, v, s, n_vocab, n_layer = 256, 128, 256, 128, 259, 1
    unit = d + 3 * d * k + 3 * d * v + 2 * k + s * k + s  # norm; q, k, r; v, gate, output; u, v; codebook and counts
    n_params = n_vocab * d + n_layer * 2 * unit + d + d * n_vocab
    assert plan["parameter_count"] == n_params
    codebooks = n_layer * 2 * (s * k + s)
    assert plan["bytes_per_chip"]["parameters"] == 4 * n_params
    adam = 2 * 4 * (n_params - codebooks)
    assert adam < plan["bytes_per_chip"]["optimizer"] <= adam + 64  # and two counters
    rows, m = 8 // 4, 128
    state = rows * (4 + m * (4 + 2 * k + 2 * v + 4) + s * (4 * v + 4) + 4)
    assert plan["bytes_per_chip"]["recurrent_state"] == n_layer * 2 * state
    assert plan["bytes_per_chip"]["batch"] == 4 * rows * 256 * 4
    assert plan["bytes_per_chip"]["peak"] > plan["bytes_per_chip"]["temp"] >= 0  # so small that it needs none
    assert (plan["chips"], plan["hosts"], plan["mesh"]["data"]) == (4, 1, 4)
    assert plan["hbm_bytes_per_chip"] == 16 * GIB
    assert plan["fits"] is True
    assert plan["versions"]["libtpu"]


@pytest.mark.slow
def test_a_plan_says_how_long_the_step_takes(planned):
    plan = planned["fits"]
    seconds = plan["predicted_step_seconds"]
    assert seconds == pytest.approx(plan["cycles"] / CHIPS["v5e"].clock_hz)
    tokens = 8 * 256
    assert plan["predicted_tokens_per_second"] == pytest.approx(tokens / seconds)
    assert plan["predicted_mfu"] == pytest.approx(plan["model_flops_per_step"] / seconds / (4 * 197e12))
    assert 0.001 < plan["predicted_mfu"] < 0.9
    assert plan["days"] == pytest.approx(1e9 / plan["predicted_tokens_per_second"] / 86400)
    assert sum(row["share"] for row in plan["operations"]) <= 1
    assert f"the compiler's estimate: {seconds * 1e3:.2f} ms a step, MFU {plan['predicted_mfu']:.1%}" in plan["printed"]


@pytest.mark.slow
def test_a_plan_has_a_roofline_beside_the_estimate(planned):
    """At least the matmuls at 95% of the peak, at least the HBM traffic at 85% of the bandwidth."""
    plan, chip = planned["fits"], CHIPS["v5e"]
    seconds = plan["roofline_step_seconds"]
    assert plan["roofline_tokens_per_second"] == pytest.approx(8 * 256 / seconds)
    assert plan["roofline_mfu"] == pytest.approx(plan["model_flops_per_step"] / seconds / (4 * chip.peak_flops))
    matmuls = plan["model_flops_per_step"] / 4 / (0.95 * chip.peak_flops)
    traffic = plan["hbm_traffic_bytes_per_chip"] / (0.85 * chip.hbm_bandwidth)
    assert max(matmuls, traffic) < seconds < plan["predicted_step_seconds"]
    assert traffic > 2 * plan["bytes_per_chip"]["optimizer"] / chip.hbm_bandwidth  # read and written in each step
    assert sum(plan["roofline_bounds"].values()) == pytest.approx(1)
    shares = [row["roofline_share"] for row in plan["roofline_operations"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.1 < sum(shares) <= 1
    assert all(row["roofline_share"] >= 0 and 0 < row["share"] <= 1 for row in plan["operations"])
    assert f"roofline: {seconds * 1e3:.2f} ms a step, MFU {plan['roofline_mfu']:.1%}" in plan["printed"]


@pytest.mark.slow
def test_a_plan_says_what_is_sent_between_chips(planned):
    """Gradients and codebook sums are summed over the chips, in bfloat16 or float32, over data alone."""
    plan = planned["fits"]
    assert {(row["kind"], *row["axes"]) for row in plan["collectives"]} == {("all-reduce", "data")}
    sent = sum(row["bytes"] for row in plan["collectives"])
    assert 2 * plan["parameter_count"] < sent < 4 * plan["parameter_count"] * 1.05


@pytest.mark.slow(1)
def test_the_bytes_of_a_known_matmul():
    """Contracted over a split axis: one all-reduce of the result, over that axis."""
    _, devices = topology_devices("v5e:2x2", 1)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
    a, b = (
        jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "model"))),
        jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("model", None))),
    )
    matmul = jax.jit(jnp.matmul, out_shardings=jax.NamedSharding(mesh, jax.P()))
    program = Program(matmul.lower(a, b).compile().as_text())
    (collective,) = program.collectives(mesh.shape.items())
    assert (collective.kind, collective.axes, collective.count) == ("all-reduce", ("model",), 1)
    assert collective.bytes == 512 * 256 * 4
    assert program.cycles() > 2 * 512 * 512 * 256 / 2**17


@pytest.mark.slow(1)
def test_what_is_gathered_beside_matmuls_and_scattered_is_counted_once():
    _, devices = topology_devices("v5e:2x2", 1)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=split)
    weights = [jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=split)] * 3

    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss), out_shardings=[split] * 3).lower(weights, x).compile()
    sent = {c.kind: (c.axes, c.bytes) for c in Program(compiled.as_text()).collectives(mesh.shape.items())}
    size = 1024 * 1024 * 2
    assert sent["reduce-scatter"] == (("data",), 3 * size)  # each weight's gradient: every device keeps its part
    assert sent["all-gather"] in [(("data",), 3 * size), (("data",), 5 * size)]  # again in the backward pass, or not


@pytest.mark.slow
def test_a_config_that_does_not_fit_is_an_answer(planned):
    plan = planned["lacks"]
    assert plan["fits"] is False
    assert "memory" in plan["lack"]
    assert plan["short_by_bytes"] > GIB
    assert plan["bytes_per_chip"]["peak"] > plan["hbm_bytes_per_chip"]
    assert plan["bytes_per_chip"]["temp"] is None
    first, *others = plan["advice"].split(", or ")
    assert first == "config.model.remat=full"
    assert others[0] == "config.train.microbatches=2"
    assert others[1:3] == ["config.train.batch_size=2048", "config.train.update_len=32768"]
    assert "does not fit" in plan["printed"]


def test_what_is_missing_is_read_from_the_compilers_words():
    assert shortage("required for HLO temporaries (26.5G) exceeds available HBM (15.75G).") == (26.5 * GIB, 10.75 * GIB)
    assert shortage("Used 16.5G of 15.75G hbm. Exceeded hbm capacity by 767.0M.") == (16.5 * GIB, 767 * 2**20)
    assert shortage("temporaries (1.5T) exceeds available HBM (512.0G).") == (1536 * GIB, 1024 * GIB)
    assert shortage("other words") == (None, None)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The folder and output of a sweep over simulated devices, one of whose points is in error."""
    folder = tmp_path_factory.mktemp("sweep")
    flags = ["--mode=plan", *SMALL, "--config.model.head_type=mqa", "--topology=cpu:8", f"--workdir={folder}"]
    flags += ["--config.optimizer.name=muon", "--config.train.ema_decay=0.9"]
    grid = ["--sweep", "config.model.block_len=64,100;config.train.batch_size=8"]
    # Each point is a process that the sweep starts: a fork (see tests/forked.py) would have the sweep's own flags.
    code, out, err = finish(start(*flags, *grid, prefix=["env"]))
    assert code == 0, err
    return folder, out


@pytest.mark.slow
def test_simulated_devices_have_no_estimate_of_cycles(swept):
    folder, _ = swept
    plan = json.loads((folder / "sweep/64_8/plan.json").read_text())
    assert (plan["chips"], plan["mesh"]["data"], plan["fits"]) == (8, 8, None)
    assert "predicted_step_seconds" not in plan
    assert plan["bytes_per_chip"]["temp"] > 0
    parameters, average, optimizer = (
        plan["bytes_per_chip"][name] for name in ("parameters", "weights_average", "optimizer")
    )
    assert parameters == average < optimizer < 2 * parameters  # of a kernel, Muon has one array, and Adam two


@pytest.mark.slow
def test_a_sweep_is_one_table_and_a_point_that_fails_is_a_row_of_it(swept):
    _, out = swept
    lines = out.splitlines()
    assert len(lines) == 3
    assert "MFU  roofline" in lines[0]
    assert lines[1].split()[:2] == ["64", "8"]
    assert lines[1].endswith("-")  # nobody says how much memory simulated devices have
    assert "config.model.block_len=100: must divide" in lines[2]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:4x4", "--topology=v5x:4x4: must begin with one of v2, v3, v4, v5e"),
        ("v5e", "--topology=v5e: must give the slice's shape in chips, as v5e:2x2 does"),
        ("v5e:4x4x4", "--topology=v5e:4x4x4: must give the slice's shape in chips, as v5e:2x2 does"),
        ("v4:4x4", "--topology=v4:4x4: must give the slice's shape in chips, as v4:2x2x2 does"),
        ("v5e:3x5", "--topology=v5e:3x5: is not a slice that libtpu knows"),
        ("cpu:many", "--topology=cpu:many: must name a number of devices"),
    ],
)
def test_a_topology_that_does_not_exist_is_one_line(topology, message):
    with pytest.raises(UserError) as error:
        topology_devices(topology, 1)
    assert str(error.value).startswith(message)


def test_a_device_is_what_the_table_says():
    for topology, n_chips in (("v3:2x2", 4), ("v4:2x2x1", 4), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 4)):
        chip, devices = topology_devices(topology, 1)
        assert len(devices) == n_chips * chip.devices


def test_a_grid_must_be_one():
    names = ["config.model.d_k", "config.seed"]
    assert parse_grid("config.model.d_k=1,2; config.seed=x") == (names, [("1", "x"), ("2", "x")])
    for bad in ("", "model.d_k=1", "config.seed", "config.seed=1,,2"):
        with pytest.raises(UserError, match="--sweep="):
            parse_grid(bad)
    with pytest.raises(UserError, match=r"^config.modle.d_k: is not a setting; did you mean config.model.d_k\?$"):
        parse_grid("config.seed=1;config.modle.d_k=1,2")


def test_a_folder_that_cannot_be_written_costs_the_file_and_not_the_plan(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    found = dict(
        chips=8, chip_kind="cpu", hosts=1, mesh={}, parameter_count=1234, compile_seconds=1.0, fits=None, attention=""
    )
    found |= dict(bytes_per_chip={}, hbm_bytes_per_chip=None)
    monkeypatch.setattr("tvq_pod.modes.plan.topology_devices", lambda topology, slices: (None, []))
    monkeypatch.setattr("tvq_pod.modes.plan.plan_step", lambda settings, chip, devices: found)
    assert plan(Settings(), epath.Path(tmp_path / "file/run"), "cpu:8", 1, None)["parameter_count"] == 1234
    out, err = capsys.readouterr()
    assert "1,234 parameters" in out
    assert err == f"WARNING: {tmp_path}/file/run/plan.json can't be written (Not a directory)\n"


def test_the_cost_of_a_token_does_not_grow_with_the_update():
    config = Settings(train=TrainSettings()).model
    assert train_flops(config, 8192, 8192) == 4 * train_flops(config, 2048, 2048)
    full = config.replace(attn_type="full")
    more = forward_flops_per_token(full, 8192) - forward_flops_per_token(full, 2048)
    assert more == 2 * 2 * config.n_layer * config.n_head * 3072 * (config.d_k + config.d_v)


def test_flops_are_those_of_the_matmuls():
    """Shape by shape, for one token of one unit; two operations a multiply-add."""
    config = TransformerConfig(
        d_model=3, d_k=5, d_v=7, n_head=2, n_code=11, n_layer=1, n_vocab=13, block_len=17, mem_len=19
    )
    shapes = [(3, 5)] * 2 + [(3, 7)] * 2 + [(7, 3)]  # q, k; v, gate; output
    shapes += [(5, 11)]  # distances to codes
    shapes += [(5, 36), (36, 7), (5, 20)]  # content scores, values; scores by distance
    shapes += [(5, 11), (11, 7), (11, 7)]  # scores of codes, their means, what is added to them
    unit = 2 * sum(a * b for a, b in shapes)
    assert forward_flops_per_token(config, 17) == 2 * (2 * unit + 3 * 13)


def test_flops_of_attention_and_mlp():
    """mqa: three query heads share one key head; then an MLP."""
    config = TransformerConfig(
        head_type="mqa",
        d_ff=23,
        d_model=3,
        d_k=5,
        d_v=7,
        n_head=3,
        n_code=11,
        n_layer=2,
        n_vocab=13,
        block_len=17,
        mem_len=19,
    )
    per_query_head = [(3, 5), (7, 3), (5, 36), (36, 7), (5, 20), (5, 11), (11, 7)]  # q; output; as above; codes, means
    per_key_head = [(3, 5), (3, 7), (5, 11), (11, 7)]  # k; v; distances; what is added
    mlp = [(3, 23), (23, 3)]
    layer = sum(a * b for a, b in 3 * per_query_head + per_key_head + mlp)
    assert forward_flops_per_token(config, 17) == 2 * (2 * layer + 3 * 13)
    none, one = 5 * 11, 11 * 7
    assert train_flops(config, 1, 17) == 3 * forward_flops_per_token(config, 17) - 2 * 2 * (2 * none + one)


def test_a_matmul_without_a_gradient_is_not_counted_in_the_backward_pass():
    config = TransformerConfig(n_layer=3, n_head=2, n_code=11, d_k=5, d_v=7)
    forward = forward_flops_per_token(config, 128)
    units = 2 * 3 * 2
    distances, added = 2 * 5 * 11, 2 * 11 * 7
    assert train_flops(config, 1, 128) == 3 * forward - units * (2 * distances + added)


def test_clocks_are_peak_over_operations_a_cycle():
    for name, megahertz in (("v2", 700), ("v3", 940), ("v4", 1050), ("v5e", 1500), ("v5p", 1750), ("v6e", 1750)):
        assert CHIPS[name].clock_hz / 1e6 == pytest.approx(megahertz, rel=0.01)
    assert all(math.log2(chip.flops_per_cycle).is_integer() for chip in CHIPS.values())


def test_without_libtpu_plan_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--topology=v5e:2x2: the TPU compiler needs pip install -e '.\[tpu\]'"):
        topology_devices("v5e:2x2", 1)
