"""Cycles and collectives, read from a program that was written by hand."""

import pytest

from tvq_pod.planning.bundles import Count
from tvq_pod.planning.hlo import Peak, Program, crossed_axes, replica_groups
from tvq_pod.planning.module import Instruction, source_of

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(8)} parameter(0)
  ROOT %never = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999999"}
}

%inner_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0:T(8)S(1)}) parameter(0)
  %a = f32[8]{0:T(8)(2,1)} fusion(%s), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(M)/while/body/layers/a/dot"}, backend_config={"estimated_cycles":"10"}
  %r = f32[8]{0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%fused
  ROOT %t = (s32[], f32[8]{0}) tuple(%s, %r)
}

%inner_cond (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%s, %limit), direction=LT
}

%outer_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %b = f32[8]{0} fusion(%s), calls=%fused, metadata={op_name="jit(f)/transpose(jvp(M))/while/body/layers/b"}, backend_config={"estimated_cycles":"100"}
  ROOT %w = (s32[], f32[8]{0}) while(%s), condition=%inner_cond, body=%inner_body
}

%outer_cond (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt = pred[] compare(%s, %s), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %c = (f32[8]{0:T(8)}, f32[8]{0}) copy(%x), backend_config={"estimated_cycles":"7"}
  %w = (s32[], f32[8]{0}) while(%x), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %g = ((bf16[2,8]{1,0}, s8[2]), (bf16[4,8]{1,0:T(8,128)(2,1)}, s8[4])) all-gather-start(%x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  ROOT %s = f32[4]{0} reduce-scatter(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%fused
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_turn():
    assert Program(PROGRAM).cycles() == 7 + 3 * (100 + 5 * 10)


def test_cycles_are_told_apart_by_source_dearest_first():
    assert list(Program(PROGRAM).cycles_by_source().items()) == [
        ("backward layers/b", 300),
        ("forward layers/a/dot", 150),
        ("other (copy)", 7),
    ]


def test_collectives_are_counted_with_their_bytes_and_axes():
    collectives = Program(PROGRAM).collectives(dict(data=2, model=2).items())
    found = {(c.kind, c.axes): (c.count, c.bytes) for c in collectives}
    assert found == {
        ("all-reduce", ("model",)): (15, 15 * 32),
        ("all-gather", ("data",)): (1, 4 * 8 * 2 + 4),
        ("reduce-scatter", ("data", "model")): (1, 4 * 4 * 4),
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_form_that_xla_writes(text, groups):
    assert replica_groups(text) == groups


def test_groups_of_an_unknown_form_are_counted_as_such():
    program = Program(PROGRAM.replace("{{0,1},{2,3}}", "a new form"))
    assert ("all-reduce", ("unknown",), 15) in [
        (c.kind, c.axes, c.count) for c in program.collectives(dict(data=4).items())
    ]


def test_axes_are_those_along_which_a_group_differs():
    assert crossed_axes([[0, 2], [1, 3]], dict(data=2, model=2).items()) == ("data",)
    assert crossed_axes([[0, 1, 2, 3]], dict(data=2, sequence=1, model=2).items()) == ("data", "model")


def test_what_has_no_estimate_is_named():
    gather = '  %g2 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/jvp(M)/gather"}'
    free = '  %a2 = f32[8]{0} custom-call(%%x), custom_call_target="AllocateBuffer"'
    text = PROGRAM.replace("  %c = (f32[8]", f"{gather}\n{free}\n  %c = (f32[8]")
    assert Program(text).without_estimate() == {"forward gather": 1}
    assert Program(PROGRAM).without_estimate() == {}


def test_a_collective_inside_fusions_is_one():
    """One that runs beside two matmuls names the same channel in both; a reduce-scatter hides in a computation."""
    parts = """
%async_part (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  ROOT %ag = f32[16]{0} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  %ar = f32[8]{0} all-reduce(%p), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%fused
  ROOT %ds = f32[4]{0} dynamic-slice(%ar, %p), dynamic_slice_sizes={4}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %f1 = f32[8]{0} fusion(%x), kind=kOutput, calls=%async_part, backend_config={"estimated_cycles":"5"}
  %f2 = f32[8]{0} fusion(%f1), kind=kOutput, calls=%async_part, backend_config={"estimated_cycles":"5"}
  %f3 = f32[4]{0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.1
"""
    program = Program(PROGRAM.replace("\nENTRY %main (x: f32[8]) -> f32[8] {\n", parts))
    found = {(c.kind, c.axes): (c.count, c.bytes) for c in program.collectives(dict(data=2, model=2).items())}
    assert found["all-gather", ("model",)] == (1, 16 * 4)
    assert found["reduce-scatter", ("model",)] == (1, 8 * 4)
    assert program.without_estimate() == {}


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no HLO module"):
        Program("hello")
    without_limit = PROGRAM.replace("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[] parameter(1)")
    with pytest.raises(ValueError, match="while w: its trip count can't be read"):
        Program(without_limit).cycles()


def test_sources_name_the_pass():
    def of(path):
        return source_of(Instruction("x", "f32[]", "fusion", f'metadata={{op_name="{path}"}}'))

    assert of("jit(train_step)/jvp(T)/while/body/closed_call/layers/unit0/bhlk,bhmk->bhlm/dot") == (
        "forward layers/unit0/bhlk,bhmk->bhlm/dot"
    )
    assert (
        of("jit(t)/transpose(jvp(T))/layers/checkpoint/rematted_computation/unit1/exp") == "recompute layers/unit1/exp"
    )
    assert of("jit(train_step)/add") == "update add"
    assert of("jit(t)/transpose(jvp(T))/while") == "backward (fusion)"


def test_a_kernel_written_by_hand_takes_its_bundles_or_what_its_work_takes_at_least():
    call = (
        '  %%kernel = f32[8]{0} custom-call(%%x), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"%s","transcendentals":"9","bytes_accessed":"%s"}}}'
    )
    for flops, size, cycles in ((1000, 30, 100), (1000, 900, 300), (1001, 0, 101)):
        opening = "\nENTRY %main (x: f32[8]) -> f32[8] {\n"
        text = PROGRAM.replace(opening, opening + call % (flops, size) + "\n")
        assert Program(text, Peak(10, 3)).cycles() - Program(PROGRAM).cycles() == cycles
        assert Program(text).cycles() == Program(PROGRAM).cycles()
        assert sum(Program(text).without_estimate().values()) == 1
        assert Program(text, Peak(10, 3)).without_estimate() == {}
        for scheduled in (50, 700):
            scheduled_too = Program(text, Peak(10, 3), dict(kernel=Count(scheduled, 9, True)))
            assert scheduled_too.cycles() - Program(PROGRAM).cycles() == max(scheduled, cycles)
