"""Operations of a compiled program, and the lines of code that made them."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from tvq_pod.data import digest
from tvq_pod.planning.source_lines import operations

HERE = pathlib.Path(__file__)


def rows(program):
    head, *lines = operations(program).splitlines()
    assert head.split("\t") == ["operation", "path", "line"]
    return [line.split("\t") for line in lines]


def test_an_operation_is_of_the_line_that_made_it():
    def function(x):
        with jax.named_scope("mixing"):
            return jnp.sort(x @ x, axis=0)  # the line

    program = jax.jit(function).lower(jnp.ones([32, 32])).compile().as_text()
    assert program
    number = next(n for n, line in enumerate(HERE.read_text().splitlines(), 1) if line.endswith("# the line"))
    found = {path: line for _, path, line in rows(program)}
    assert found["update mixing/dot_general"] == f"{HERE}:{number} in {function.__qualname__}"
    names = {name for name, _, _ in rows(program)}
    assert all(f"%{name} = " in program for name in names)


def test_what_a_package_made_is_of_the_line_of_tvq_pod_that_called_it():
    batch = {name: jnp.ones([2, 8], jnp.int32) for name in ("inputs", "targets", "doc_ids")}
    batch["loss_mask"] = jnp.ones([2, 8])
    program = jax.jit(digest.roll).lower(digest.start(), batch).compile().as_text()
    assert program
    lines = [line for _, _, line in rows(program)]
    assert lines
    assert all(line.startswith("tvq_pod/") for line in lines), lines
    assert any(line.startswith("tvq_pod/data/digest.py:") for line in lines)


def test_operations_inside_a_fusion_are_no_rows_and_a_program_without_frames_has_none():
    program = """HloModule m
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  ROOT %inner = f32[2] add(%p, %p), metadata={op_name="jit(f)/a/add" stack_frame_id=1}
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  ROOT %outer = f32[2] fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/a/add" stack_frame_id=1}
}
"""
    assert rows(program) == [["outer", "update a/add", ""]]
    with pytest.raises(ValueError, match="no HLO module"):
        operations("something else")
