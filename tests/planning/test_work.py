"""Bytes and FLOPs of operations in programs that were written by hand."""

import pytest

from tvq_pod.planning.arrays import arrays
from tvq_pod.planning.module import Module
from tvq_pod.planning.work import is_free, matmul_flops, moved_bytes

T = "T(8,128)"
PROGRAM = f"""HloModule jit_f, is_scheduled=true

%update_in_place (p0: f32[24,512,256], p1: f32[512,256], p2: s32[]) -> f32[24,512,256] {{
  %p0 = f32[24,512,256]{{2,1,0:{T}}} parameter(0)
  %p1 = f32[512,256]{{1,0:{T}}} parameter(1)
  %p2 = s32[] parameter(2)
  %b1 = f32[1,512,256]{{2,1,0:{T}}} bitcast(%p1)
  ROOT %dus = f32[24,512,256]{{2,1,0:{T}}} dynamic-update-slice(%p0, %b1, %p2, %p2, %p2)
}}

%inner (q0: f32[24,512,256], q1: s32[]) -> f32[512,256] {{
  %q0 = f32[24,512,256]{{2,1,0:{T}}} parameter(0)
  %q1 = s32[] parameter(1)
  %b2 = f32[24,512,256]{{2,1,0:{T}}} bitcast(%q0)
  %ds = f32[1,512,256]{{2,1,0:{T}}} dynamic-slice(%b2, %q1, %q1, %q1), dynamic_slice_sizes={{1,512,256}}
  ROOT %b3 = f32[512,256]{{1,0:{T}}} bitcast(%ds)
}}

%read_a_slice (r0: f32[24,512,256], r1: s32[], r2: f32[512,256]) -> f32[512,256] {{
  %r0 = f32[24,512,256]{{2,1,0:{T}}} parameter(0)
  %r1 = s32[] parameter(1)
  %r2 = f32[512,256]{{1,0:{T}}} parameter(2)
  %f1 = f32[512,256]{{1,0:{T}}} fusion(%r0, %r1), kind=kLoop, calls=%inner
  ROOT %add = f32[512,256]{{1,0:{T}}} add(%f1, %r2)
}}

%overwrites (o0: f32[24,512,256], o1: f32[1,512,256], o2: s32[]) -> (f32[24,512,256], f32[24,512,256]) {{
  %o0 = f32[24,512,256]{{2,1,0:{T}}} parameter(0)
  %o1 = f32[1,512,256]{{2,1,0:{T}}} parameter(1)
  %o2 = s32[] parameter(2)
  %neg = f32[24,512,256]{{2,1,0:{T}}} negate(%o0)
  %dus2 = f32[24,512,256]{{2,1,0:{T}}} dynamic-update-slice(%neg, %o1, %o2, %o2, %o2)
  %dus3 = f32[24,512,256]{{2,1,0:{T}}} dynamic-update-slice(%o0, %o1, %o2, %o2, %o2)
  ROOT %t = (f32[24,512,256]{{2,1,0:{T}}}, f32[24,512,256]{{2,1,0:{T}}}) tuple(%dus2, %dus3)
}}

%matmul (m0: bf16[512,1024], m1: bf16[1024,256]) -> bf16[512,256] {{
  %m0 = bf16[512,1024]{{1,0:{T}(2,1)}} parameter(0)
  %m1 = bf16[1024,256]{{1,0:{T}(2,1)}} parameter(1)
  ROOT %conv = bf16[512,256]{{1,0:{T}(2,1)}} convolution(%m0, %m1), dim_labels=bf_io->bf
}}

%sends (s0: f32[512,256]) -> f32[512,256] {{
  %s0 = f32[512,256]{{1,0:{T}}} parameter(0)
  ROOT %ar = f32[512,256]{{1,0:{T}}} all-reduce(%s0), replica_groups={{{{0,1}}}}, to_apply=%add
}}

ENTRY %main (stack: f32[24,512,256], x: f32[512,256]) -> f32[512,256] {{
  %stack = f32[24,512,256]{{2,1,0:{T}}} parameter(0)
  %x = f32[512,256]{{1,0:{T}}} parameter(1)
  %n = s32[]{{:T(128)S(6)}} parameter(2)
  %v = f32[512,256]{{1,0:{T}S(1)}} parameter(3)
  %a = bf16[512,1024]{{1,0:{T}(2,1)}} parameter(4)
  %b = bf16[1024,256]{{1,0:{T}(2,1)S(1)}} parameter(5)
  %one = f32[1,512,256]{{2,1,0:{T}}} parameter(6)
  %updated = f32[24,512,256]{{2,1,0:{T}}} fusion(%stack, %x, %n), kind=kLoop, calls=%update_in_place
  %from_vmem = f32[24,512,256]{{2,1,0:{T}}} fusion(%stack, %v, %n), kind=kLoop, calls=%update_in_place
  %sliced = f32[512,256]{{1,0:{T}}} fusion(%stack, %n, %x), kind=kLoop, calls=%read_a_slice
  %to_vmem = f32[512,256]{{1,0:{T}S(1)}} fusion(%stack, %n, %v), kind=kLoop, calls=%read_a_slice
  %both = (f32[24,512,256]{{2,1,0:{T}}}, f32[24,512,256]{{2,1,0:{T}}}) fusion(%stack, %one, %n), kind=kLoop, calls=%overwrites
  %product = bf16[512,256]{{1,0:{T}(2,1)}} fusion(%a, %b), kind=kOutput, calls=%matmul
  %sum = f32[512,256]{{1,0:{T}}} fusion(%x), kind=kCustom, calls=%sends
  %copied = f32[512,256]{{0,1:{T}}} copy(%x)
  %start = (f32[512,256]{{1,0:{T}S(1)}}, f32[512,256]{{1,0:{T}}}, u32[]{{:S(2)}}) copy-start(%x)
  %end = f32[512,256]{{1,0:{T}S(1)}} copy-done(%start)
  %start2 = ((f32[24,512,256]{{2,1,0:{T}}}), f32[2,512,256]{{2,1,0:{T}S(1)}}, s32[]{{:S(2)}}) slice-start(%stack), slice={{[0:2]}}
  %end2 = f32[2,512,256]{{2,1,0:{T}S(1)}} slice-done(%start2)
  %start3 = (f32[512,256]{{1,0:{T}}}, f32[512,256]{{1,0:{T}S(1)}}, u32[]{{:S(2)}}) copy-start(%v)
  %end3 = f32[512,256]{{1,0:{T}}} copy-done(%start3)
  %kernel = f32[512,256]{{1,0:{T}}} custom-call(%x, %v), custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"body":"TUzv","cost_estimate":{{"flops":"700","transcendentals":"9","bytes_accessed":"2000000"}}}}}}
  ROOT %silent = f32[512,256]{{1,0:{T}}} custom-call(%x, %v), custom_call_target="tpu_custom_call"
}}
"""  # noqa: E501
MODULE = Module(PROGRAM)
ROW = 4 * 512 * 256  # bytes of one of the stack


def moved(name: str) -> int:
    return moved_bytes(MODULE, MODULE.find(name))


def test_tiles_pad_the_axes_that_they_cover():
    (array,) = arrays("bf16[3,5,200]{2,1,0:T(8,128)(2,1)}")
    assert (array.bytes, array.held_bytes, array.space) == (3 * 5 * 200 * 2, 3 * 8 * 256 * 2, 0)
    (turned,) = arrays("f32[200,5]{0,1:T(8,128)S(1)}")  # the first axis is the minor one
    assert (turned.held_bytes, turned.hbm_bytes, turned.space) == (256 * 8 * 4, 0, 1)
    (line,) = arrays("s32[5]{0:T(128)}")
    assert line.held_bytes == 128 * 4
    assert [array.bytes for array in arrays("(f32[], (pred[3], u32[2]{0}))")] == [4, 3, 8]


def test_a_slice_of_a_stack_counts_as_the_slice():
    assert moved("sliced") == 3 * ROW  # the slice and the operand read, the result written
    assert moved("to_vmem") == ROW


def test_what_is_updated_in_place_counts_as_the_update():
    assert moved("updated") == 2 * ROW
    assert moved("from_vmem") == ROW


def test_what_is_not_in_place_is_read_and_written_in_full():
    """The stack is negated first for one of the two results, which is therefore all new."""
    assert moved("both") == 24 * ROW + ROW + 24 * ROW + ROW


MATMUL = """%matmul (m0: bf16[512,1024], m1: bf16[1024,256]) -> bf16[512,256] {
  %m0 = bf16[512,1024]{1,0} parameter(0)
  %m1 = bf16[1024,256]{1,0} parameter(1)
  ROOT %conv = bf16[512,256]{1,0} convolution(%m0, %m1), dim_labels=bf_io->bf
}

%beside (n0: bf16[512,1024], n1: bf16[1024,256], n2: bf16[1,125,2048], n3: bf16[256,125,2048]) -> (bf16[512,256], bf16[1,125,2048], bf16[256,125,2048], bf16[256,125,2048]) {
  %n0 = bf16[512,1024]{1,0} parameter(0)
  %n1 = bf16[1024,256]{1,0} parameter(1)
  %n2 = bf16[1,125,2048]{2,1,0} parameter(2)
  %n3 = bf16[256,125,2048]{2,1,0} parameter(3)
  %conv2 = bf16[512,256]{1,0} convolution(%n0, %n1), dim_labels=bf_io->bf
  %gathered = bf16[256,125,2048]{2,1,0} all-gather(%n2), channel_id=61, replica_groups={{0,1}}, dimensions={0}
  ROOT %all = (bf16[512,256]{1,0}, bf16[1,125,2048]{2,1,0}, bf16[256,125,2048]{2,1,0}, bf16[256,125,2048]{2,1,0}) tuple(%conv2, %n2, %n3, %gathered)
}

ENTRY %main (a: bf16[512,1024], b: bf16[1024,256], c: bf16[1,125,2048], d: bf16[256,125,2048]) -> bf16[512,256] {
  %a = bf16[512,1024]{1,0} parameter(0)
  %b = bf16[1024,256]{1,0} parameter(1)
  %c = bf16[1,125,2048]{2,1,0} parameter(2)
  %d = bf16[256,125,2048]{2,1,0} parameter(3)
  %alone = bf16[512,256]{1,0} fusion(%a, %b), kind=kOutput, calls=%matmul
  %sends = (bf16[512,256]{1,0}, bf16[1,125,2048]{2,1,0}, bf16[256,125,2048]{2,1,0}, /*index=3*/bf16[256,125,2048]{2,1,0}) fusion(%a, %b, %c, %d), kind=kOutput, output_to_operand_aliasing={{1}: (2, {}), {2}: (3, {}), {3}: (3, {})}, calls=%beside
  ROOT %copies = (bf16[512,256]{1,0}, bf16[1,125,2048]{2,1,0}, bf16[256,125,2048]{2,1,0}, /*index=3*/bf16[256,125,2048]{2,1,0}) fusion(%a, %b, %c, %d), kind=kOutput, output_to_operand_aliasing={{1}: (2, {})}, calls=%beside
}
"""  # noqa: E501


def test_a_matmul_beside_which_a_collective_sends_moves_what_the_matmul_alone_moves():
    """The buffers of the all-gather, of 131 MB each, go through the fusion as they are."""
    module = Module(MATMUL)
    alone, sends = (moved_bytes(module, module.find(name)) for name in ("alone", "sends"))
    assert alone == 2 * (512 * 1024 + 1024 * 256 + 512 * 256)
    assert sends == alone


def test_an_operand_that_is_returned_in_memory_of_its_own_is_copied():
    module = Module(MATMUL)
    copied = 2 * 2 * 256 * 125 * 2048  # read and written
    assert moved_bytes(module, module.find("copies")) == moved_bytes(module, module.find("sends")) + copied


def test_arrays_in_vmem_are_not_moved():
    assert moved("product") == 2 * (512 * 1024 + 512 * 256)
    assert moved("copied") == 2 * ROW


def test_a_transfer_moves_what_it_brings():
    assert [moved(name) for name in ("end", "end2", "end3")] == [ROW, 2 * ROW, ROW]
    assert all(is_free(MODULE, MODULE.find(name)) for name in ("start", "start2", "start3"))


def test_a_kernel_moves_what_its_author_states_but_for_what_is_in_vmem():
    assert moved("kernel") == 2_000_000 - ROW
    assert moved("silent") == 2 * ROW
    assert matmul_flops(MODULE, MODULE.find("kernel")) == 700
    assert matmul_flops(MODULE, MODULE.find("silent")) == 0


def test_what_only_sends_takes_no_time_of_its_own():
    assert is_free(MODULE, MODULE.find("sum"))
    assert moved("sum") == 0
    assert not is_free(MODULE, MODULE.find("product"))


def flops(left: str, right: str, result: str, attributes: str, opcode: str = "convolution") -> int:
    parameters = f"  %l = {left}{{}} parameter(0)\n  %r = {right}{{}} parameter(1)\n"
    root = f"  ROOT %o = {result}{{}} {opcode}(%l, %r), {attributes}\n"
    module = Module(f"ENTRY %e (l: {left}, r: {right}) -> {result} {{\n{parameters}{root}}}\n")
    return matmul_flops(module, module.find("o"))


@pytest.mark.parametrize(
    ("operands", "attributes", "expected"),
    [
        (("bf16[512,1024]", "bf16[1024,256]", "bf16[512,256]"), "dim_labels=bf_io->bf", 512 * 1024 * 256),
        # rows and columns of a window beside the batch: [4, 2, 512, 768] times [768, 1536]
        (
            ("bf16[4,2,512,768]", "bf16[1536,768,1,1]", "bf16[4,2,512,1536]"),
            "window={size=1x1}, dim_labels=01bf_oi01->01bf",
            4 * 2 * 512 * 768 * 1536,
        ),
        # one codebook against 4 x 2 blocks: a kernel with 8 places, of which each place of the result meets one
        (
            ("bf16[512,128,1,1]", "bf16[4,2,256,128]", "f32[512,4,2,256]"),
            "window={size=4x2 pad=3_3x1_1 rhs_reversal=1x1}, dim_labels=bf01_01oi->b01f",
            4 * 2 * 512 * 256 * 128,
        ),
        # a batch of 3 by dilation
        (
            ("f32[3,5,7]", "f32[3,7,11]", "f32[3,5,11]"),
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            3 * 5 * 7 * 11,
        ),
        # the sum of a gradient over rows and blocks
        (
            ("bf16[4,2,512,768]", "bf16[4,2,512,128]", "bf16[768,128,1,1]"),
            "window={size=4x2}, dim_labels=01fb_01io->bf01",
            4 * 2 * 512 * 768 * 128,
        ),
    ],
)
def test_multiply_adds_of_matmuls_as_xla_writes_them(operands, attributes, expected):
    left, right, result = operands
    assert flops(left, right, result, attributes) == 2 * expected


def test_flops_of_a_dot_and_of_a_fusion():
    attributes = "lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}"
    assert flops("f32[3,5,7]", "f32[3,7,11]", "f32[3,5,11]", attributes, "dot") == 2 * 3 * 5 * 7 * 11
    assert matmul_flops(MODULE, MODULE.find("product")) == 2 * 512 * 1024 * 256
