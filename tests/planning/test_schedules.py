"""Which schedule is whose; and what the real compiler's programs take, against sums by hand."""

import json
import os
import subprocess
import sys

import pytest

from tests.command import ROOT
from tvq_pod.planning.bundles import Count
from tvq_pod.planning.chips import CHIPS
from tvq_pod.planning.module import Module
from tvq_pod.planning.schedules import Dumps, Schedules

PROGRAM = """HloModule jit_f

%one (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %c = f32[] constant(2)
  ROOT %r = f32[8]{0} multiply(%p, %c)
}

%two (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %d = f32[] constant(2)
  ROOT %s = f32[8]{0} multiply(%q, %d), metadata={op_name="other"}
}

%three (q3: f32[8]) -> f32[8] {
  %q3 = f32[8]{0} parameter(0)
  %d3 = f32[] constant(3)
  ROOT %s3 = f32[8]{0} multiply(%q3, %d3)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %v = f32[8]{0:S(1)} parameter(1)
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%one, metadata={op_name="a"}
  %equal = f32[8]{0} fusion(%f), kind=kLoop, calls=%two, metadata={op_name="b"}, backend_config={"estimated_cycles":"9"}
  %other = f32[8]{0} fusion(%f), kind=kLoop, calls=%three
  %from_vmem = f32[8]{0} fusion(%v), kind=kLoop, calls=%one
  %k1 = f32[8]{0} custom-call(%x, /*index=1*/%x), custom_call_target="tpu_custom_call", backend_config={"body":"TUzv"}
  %k2 = f32[8]{0} custom-call(%f, /*index=1*/%f), custom_call_target="tpu_custom_call", backend_config={"body":"TUzv"}
  ROOT %k3 = f32[8]{0} custom-call(%f, %f), custom_call_target="tpu_custom_call", backend_config={"body":"TUzw"}
}
"""


def test_equal_operations_share_a_schedule_and_others_do_not():
    schedules = Schedules(module := Module(PROGRAM), dict(f=Count(7, 7, True), k1=Count(9, 9, True)))
    found = {i.name: count.cycles for i in module.body("main") if (count := schedules.count(i))}
    assert found == dict(f=7, equal=7, k1=9, k2=9)


def test_a_folder_of_dumps_is_read_once_and_goes(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--of_the_user=1")
    dumps = Dumps()
    assert dumps.take({"fusion.1"}) == {}
    with dumps.asked_for():
        flags = dict(flag.removeprefix("--").split("=") for flag in os.environ["LIBTPU_INIT_ARGS"].split())
        assert flags.pop("of_the_user") == "1"
    assert os.environ["LIBTPU_INIT_ARGS"] == "--of_the_user=1"
    folder = flags["xla_jf_dump_to"]
    whole = "     0   :  {}\n   0x1   :  {} /* exit bundle: %f = fusion(%x) */\n"
    written = {
        "12-fusion.1-01-final_bundles": whole,
        "12-fusion.1-00-schedule-analysis_final_bundles": whole,
        "13-all-reduce.2-01-final_bundles": whole,
        "14-TLP-01-final_bundles": whole,
        "15-half-01-final_bundles": whole.splitlines()[0],
        "16-bad-01-final_bundles": "nothing\n",
    }
    for name, text in written.items():
        with open(f"{folder}/{name}.txt", "w") as file:
            file.write(text)
    assert dumps.take({"fusion.1", "half", "bad"}) == {"fusion.1": Count(2, 2, True)}
    assert os.listdir(folder) == []


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What tests/planning/compiled.py prints: libtpu dumps only if the flags are there when it is loaded."""
    done = subprocess.run([sys.executable, "-m", "tests.planning.compiled"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_large_matmul_takes_its_flops_at_95_percent_of_the_peak(compiled):
    """[4096, 4096] times [4096, 4096]."""
    chip = CHIPS["v5e"]
    seconds = 2 * 4096**3 / (0.95 * chip.peak_flops)
    assert compiled["matmul"]["dearest_cycles"] / chip.clock_hz == pytest.approx(seconds, rel=0.02)
    # what is multiplied first has to be fetched first
    assert 1 < compiled["matmul"]["cycles"] / compiled["matmul"]["dearest_cycles"] < 1.1
    assert compiled["matmul"]["estimate"] / chip.clock_hz == pytest.approx(seconds, rel=0.25)


@pytest.mark.slow
def test_an_elementwise_operation_takes_its_bytes_at_85_percent_of_the_bandwidth(compiled):
    """silu of [8192, 8192] in bfloat16, read and written."""
    chip = CHIPS["v5e"]
    seconds = 2 * 2 * 8192**2 / (0.85 * chip.hbm_bandwidth)
    assert compiled["silu"]["cycles"] / chip.clock_hz == pytest.approx(seconds, rel=0.01)
    assert compiled["silu"]["bound"] == "HBM"
    assert 0 < compiled["silu"]["bundles"] < compiled["silu"]["cycles"]


@pytest.mark.slow
def test_a_loop_over_slices_of_a_stack_reads_each_slice_once(compiled):
    """32 arrays [1024, 4096] in float32, each read out of one array and written to another: neither the stack that is
    read counts in full in each turn, nor the one that is written."""
    moved = 2 * 4 * 32 * 1024 * 4096
    assert compiled["slices"]["hbm_bytes"] == pytest.approx(moved, rel=0.02)


@pytest.mark.slow
def test_a_kernel_counts_its_grid_its_loops_and_what_only_one_step_does(compiled):
    """A grid of 8 steps of 2 turns of a loop, and what more steps, more turns, and turns in one step only add."""
    base, steps, turns, once = (compiled[f"kernel{name}"]["bundles"] for name in ("", "_16_steps", "_4_turns", "_once"))
    assert steps / base == pytest.approx(2, rel=0.03)
    turn = (turns - base) / (8 * 2)
    assert base == pytest.approx(8 * 2 * turn, rel=0.15)
    assert once - base == pytest.approx(2 * turn, rel=0.2)
    matmuls = 8 * 2 * 2 * 512**3 / CHIPS["v5e"].flops_per_cycle
    assert matmuls < base < 1.5 * matmuls
    assert compiled["kernel"]["estimate"] == base
    assert not compiled["kernel"]["without_bundles"]


@pytest.mark.slow
def test_a_kernel_whose_turns_depend_on_data_is_named(compiled):
    assert sum(compiled["kernel_of_data"]["without_bundles"].values()) == 1
    assert compiled["kernel_of_data"]["bundles"] < compiled["kernel"]["bundles"]  # a turn a step


@pytest.mark.slow
def test_both_cores_of_a_device_share_a_parallel_axis_of_the_grid(compiled):
    """v5p has two cores a device: what the compiler schedules is a core's half of the grid, if its steps may be run in
    any order."""
    alone, shared = compiled["kernel_v5p"]["bundles"], compiled["kernel_v5p_parallel"]["bundles"]
    assert alone / shared == pytest.approx(2, rel=0.05)
