"""The roofline of programs that were written by hand, with a peak of round numbers."""

import pytest

from tvq_pod.planning.bundles import Count
from tvq_pod.planning.hlo import Peak, Program
from tvq_pod.planning.roofline import Roofline

PEAK = Peak(flops=100 / 0.95, hbm_bytes=10 / 0.85)  # 100 multiply-adds' FLOPs and 10 bytes a cycle are what counts
ADD = """%{name} (p: f32[{n}]) -> f32[{n}] {{
  %{name}_p = f32[{n}]{{0}} parameter(0)
  ROOT %{name}_r = f32[{n}]{{0}} negate(%{name}_p)
}}
"""
MATMUL = """%matmul (m0: bf16[16,64], m1: bf16[64,32]) -> bf16[16,32] {
  %m0 = bf16[16,64]{1,0} parameter(0)
  %m1 = bf16[64,32]{1,0} parameter(1)
  ROOT %conv = bf16[16,32]{1,0} convolution(%m0, %m1), dim_labels=bf_io->bf
}
"""


def roofline(entry: str, counts: dict[str, Count] | None = None, computations: str = "") -> Roofline:
    text = f"HloModule jit_f\n\n{ADD.format(name='big', n=500)}\n{ADD.format(name='small', n=50)}\n{MATMUL}\n"
    text += f"{computations}\nENTRY %main (x: f32[500]) -> f32[500] {{\n  %x = f32[500]{{0}} parameter(0)\n"
    text += "  %y = f32[50]{0} parameter(1)\n  %v = f32[500]{0:S(1)} parameter(2)\n  %n = s32[]{:S(6)} parameter(3)\n"
    text += f"  %a = bf16[16,64]{{1,0}} parameter(4)\n  %b = bf16[64,32]{{1,0:S(1)}} parameter(5)\n{entry}\n}}\n"
    return Roofline(Program(text, PEAK, counts), PEAK)


def named(op_name: str) -> str:
    return f'metadata={{op_name="jit(f)/jvp(M)/{op_name}"}}'


def test_an_operation_takes_as_long_as_the_slowest_of_three():
    entry = f"""  %f1 = f32[500]{{0}} fusion(%x), kind=kLoop, calls=%big, {named("one")}
  %f2 = f32[50]{{0}} fusion(%y), kind=kLoop, calls=%small, {named("two")}
  ROOT %f3 = bf16[16,32]{{1,0:S(1)}} fusion(%a, %b), kind=kOutput, calls=%matmul, {named("three")}"""
    found = roofline(entry, dict(f1=Count(399, 9, True), f2=Count(50, 9, True), f3=Count(600, 9, True)))
    expected = {"forward one": 2 * 4 * 500 / 10, "forward two": 50, "forward three": 2 * 16 * 64 * 32 / 100}
    assert found.cycles_by_source() == pytest.approx(expected)
    assert list(found.cycles_by_source()) == ["forward three", "forward one", "forward two"]  # the dearest first
    assert found.cycles == pytest.approx(sum(expected.values()))
    assert found.bounds() == {"forward one": "HBM", "forward two": "bundles", "forward three": "matmuls"}
    assert found.cycles_by_bound() == pytest.approx(dict(matmuls=655.36, HBM=400, bundles=50))
    assert found.hbm_bytes == 4000 + 400 + 2 * 16 * 64
    assert found.without_bundles() == {}


def test_operations_without_a_schedule_count_their_traffic_and_are_named():
    entry = f"""  %f1 = f32[500]{{0}} fusion(%x), kind=kLoop, calls=%big, {named("one")}
  %s = s32[] add(%n, %n), {named("number")}
  ROOT %f2 = f32[50]{{0}} fusion(%y), kind=kLoop, calls=%small, {named("two")}"""
    assert roofline(entry).without_bundles() == {"forward one": 1, "forward two": 1}
    unsure = roofline(entry, dict(f1=Count(399, 9, True), f2=Count(70, 9, False)))
    assert unsure.without_bundles() == {"forward two": 1}
    assert unsure.cycles_by_source()["forward two"] == 70


def test_operations_in_vmem_without_a_schedule_are_named_though_they_take_no_time_by_their_traffic():
    entry = f"""  ROOT %f1 = f32[500]{{0:S(1)}} fusion(%v), kind=kLoop, calls=%big, {named("one")}"""
    assert roofline(entry).cycles == 0
    assert roofline(entry).without_bundles() == {"forward one": 1}
    assert roofline(entry, dict(f1=Count(70, 9, True))).without_bundles() == {}


def test_what_is_started_and_ends_later_counts_once_where_it_starts():
    """A fusion that is started, in both forms that XLA writes, against the same fusion run at once."""
    wrapper = f"""%wrapped (w: f32[500]) -> f32[500] {{
  %w = f32[500]{{0}} parameter(0)
  ROOT %f2 = f32[500]{{0}} fusion(%w), kind=kLoop, calls=%big, {named("one")}
}}
"""
    started = "((f32[500]{0}), f32[500]{0}, s32[]{:S(2)})"
    at_once = roofline(f"  ROOT %f2 = f32[500]{{0}} fusion(%x), kind=kLoop, calls=%big, {named('one')}")
    short = f"""  %f2 = {started} fusion-start(%x), kind=kLoop, calls=%big, {named("one")}
  ROOT %d = f32[500]{{0}} fusion-done(%f2)"""
    long = f"""  %s = {started} async-start(%x), calls=%wrapped
  %u = {started} async-update(%s)
  ROOT %d = f32[500]{{0}} async-done(%u)"""
    for entry in (short, long):
        found = roofline(entry, computations=wrapper)
        assert found.cycles_by_source() == at_once.cycles_by_source() == {"forward one": pytest.approx(400)}
        assert found.without_bundles() == {"forward one": 1}
        assert roofline(entry, dict(f2=Count(900, 9, True)), wrapper).cycles == 900


LOOP = """
%body (s: (s32[], f32[500])) -> (s32[], f32[500]) {
  %s = (s32[]{:S(6)}, f32[500]{0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%s), index=0
  %z = f32[500]{0} get-tuple-element(%s), index=1
  %f9 = f32[500]{0} fusion(%z), kind=kLoop, calls=%big
  ROOT %t = (s32[]{:S(6)}, f32[500]{0}) tuple(%i, %f9)
}

%condition (c: (s32[], f32[500])) -> pred[] {
  %c = (s32[]{:S(6)}, f32[500]{0}) parameter(0)
  ROOT %lt = pred[]{:S(6)} compare(%c, %c), direction=LT
}
"""


def test_loops_count_as_often_as_they_turn_and_conditionals_with_their_dearest_branch():
    entry = """  %t0 = (s32[]{:S(6)}, f32[500]{0}) tuple(%n, %x)
  %w = (s32[]{:S(6)}, f32[500]{0}) while(%t0), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %c0 = f32[500]{0} conditional(%n, %x, %y), branch_computations={%big_branch, %small_branch}"""  # noqa: E501
    branches = LOOP + ADD.format(name="big_branch", n=500) + "\n" + ADD.format(name="small_branch", n=50)
    assert roofline(entry, computations=branches).cycles == pytest.approx(7 * 400 + 400)


def transfer(*between: str) -> str:
    lines = "\n".join(f"  %f{n} = f32[500]{{0:S(1)}} {operation}" for n, operation in enumerate(between))
    return f"""  %s1 = (f32[500]{{0:S(1)}}, f32[500]{{0}}, u32[]{{:S(2)}}) copy-start(%x)
{lines}
  %d1 = f32[500]{{0:S(1)}} copy-done(%s1)
  ROOT %last = f32[500]{{0:S(1)}} copy(%d1), {named("user")}"""


IN_VMEM, FROM_HBM = "fusion(%v), kind=kLoop, calls=%big", "fusion(%x), kind=kLoop, calls=%big"


@pytest.mark.parametrize(
    ("between", "bundles", "waited"),
    [
        ([], {}, 200),  # 2,000 bytes with nothing to hide behind
        ([IN_VMEM], dict(f0=150), 50),
        ([IN_VMEM, IN_VMEM], dict(f0=150, f1=100), 0),
        ([FROM_HBM], dict(f0=250), 150),  # it reads 200 cycles itself
        ([FROM_HBM], dict(f0=100), 200),
    ],
)
def test_a_transfer_takes_what_does_not_fit_beside_the_operations_up_to_its_end(between, bundles, waited):
    counts = {name: Count(cycles, 9, True) for name, cycles in bundles.items()}
    found = roofline(transfer(*between), counts)
    assert found.cycles_by_source().get("forward user, waiting for HBM", 0) == pytest.approx(waited)
    own = sum(max(bundles.get(f"f{n}", 0), 200 * (operation == FROM_HBM)) for n, operation in enumerate(between))
    assert found.cycles == pytest.approx(own + waited)


def test_two_transfers_do_not_hide_behind_the_same_operation():
    second = "  %s2 = (f32[500]{0:S(1)}, f32[500]{0}, u32[]{:S(2)}) copy-start(%x)\n  %s1"
    text = (
        transfer(IN_VMEM)
        .replace("  %s1", second, 1)
        .replace("  %d1", "  %d2 = f32[500]{0:S(1)} copy-done(%s2)\n  %d1", 1)
    )
    assert roofline(text, dict(f0=Count(300, 9, True))).cycles == pytest.approx(300 + 200 + 200 - 300)


def test_a_loop_between_start_and_end_hides_a_transfer_as_well():
    loop = """while(%t0), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}"""
    entry = (
        transfer(IN_VMEM).replace(IN_VMEM, loop).replace("%f0 = f32[500]{0:S(1)}", "%f0 = (s32[]{:S(6)}, f32[500]{0})")
    )
    entry = "  %t0 = (s32[]{:S(6)}, f32[500]{0}) tuple(%n, %x)\n" + entry
    found = roofline(entry, dict(f9=Count(420, 9, True)), LOOP)  # each turn leaves the HBM idle for 20 cycles
    assert found.cycles == pytest.approx(7 * 420 + 200 - 7 * 20)


def test_what_goes_back_to_hbm_is_named_after_what_made_it():
    entry = f"""  %f0 = f32[500]{{0:S(1)}} fusion(%v), kind=kLoop, calls=%big, {named("maker")}
  %s1 = (f32[500]{{0}}, f32[500]{{0:S(1)}}, u32[]{{:S(2)}}) copy-start(%f0)
  ROOT %d1 = f32[500]{{0}} copy-done(%s1)"""
    assert roofline(entry).cycles_by_source() == pytest.approx({"forward maker, writing to HBM": 200})
