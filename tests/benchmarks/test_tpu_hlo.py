"""What `benchmarks/tpu_hlo.py` reads from the text of a program, written by hand."""

import sys

import pytest
from paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import tpu_hlo

CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'
SCAN = """HloModule jit_step

%steps (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]) parameter(0)
  %c = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT, metadata={}
}

%endless (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]) parameter(0)
  ROOT %some = pred[] fusion(%p), kind=kLoop, calls=%small
}

%small (p: f32[8,4]) -> f32[8,4] {
  %part = bf16[2,4]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} fusion(%p), kind=kOutput, calls=%small, {20}
  %b = f32[8,4]{1,0} fusion(%p), kind=kOutput, calls=%small, {20}
  %s = (f32[4], bf16[16]) all-reduce(%a, %b), channel_id=3
}

%once (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} fusion(%p), kind=kOutput, calls=%nothing, {100}
}

%nothing (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4] parameter(0)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]) while(%p), condition=%steps, body=%body
  %v = (s32[], f32[8,4]) while(%w), condition=%endless, body=%once
  %g = (u8[3], pred[8]) reduce-scatter-start(%v), channel_id=9
  %k = f32[8,4] custom-call(%v), custom_call_target="tpu_custom_call"
  ROOT %out = f32[8,4] fusion(%k), kind=kLoop, calls=%nothing, {3}
}
"""


def text() -> str:
    made = SCAN
    for number in (20, 100, 3):
        made = made.replace(f"{{{number}}}", CYCLES.format(number))
    return made


def test_loops_count_as_often_as_they_run() -> None:
    """Two fusions of 20 cycles in five steps; a loop of unknown length counts once."""
    program = tpu_hlo.read(text())
    assert program.cycles == 5 * (20 + 20) + 100 + 3
    assert program.unknown == 1
    assert program.kernels == 1


def test_what_the_compiler_does_not_estimate_is_told_apart() -> None:
    without = SCAN.replace("{20}", CYCLES.format(2**63 - 1), 1)
    for number in (20, 100, 3):
        without = without.replace(f"{{{number}}}", CYCLES.format(number))
    program = tpu_hlo.read(without)
    assert program.cycles == 5 * 20 + 100 + 3
    assert program.unestimated == 5
    assert tpu_hlo.read(text()).unestimated == 0


def test_a_collective_counts_once_for_its_channel_in_each_step() -> None:
    """A gather that is written in two fusions; a sum of two arrays; one that starts."""
    moves = tpu_hlo.read(text()).moves
    assert moves["all-gather"] == tpu_hlo.Moves(5, 5 * 2 * 4 * 2)
    assert moves["all-reduce"] == tpu_hlo.Moves(5, 5 * (4 * 4 + 16 * 2))
    assert moves["reduce-scatter"] == tpu_hlo.Moves(1, 8)  # pred: a byte each
    assert moves["all-to-all"] == moves["collective-permute"] == tpu_hlo.Moves()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,5]", 60),
        ("bf16[7]", 14),
        ("s4[3]", 2),
        ("pred[]", 1),
        ("f8e4m3fn[6]", 6),
    ],
)
def test_bytes_of_a_type(shape: str, size: int) -> None:
    lines = [
        "ENTRY %main (p: f32[1]) -> f32[1] {",
        f"  %g = {shape} all-gather(%p)",
        "}",
    ]
    assert tpu_hlo.read("\n".join(lines)).moves["all-gather"].bytes == size
