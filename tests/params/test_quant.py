"""Quantised bases: in every use the same as the dense kernels they stand for."""

import zlib
from typing import Any

import pytest
from use import Use
from uses import CONVS, USES

pytest.importorskip("qwix")
from quant_case import check, make_case, reference

pytestmark = pytest.mark.usefixtures("fast_compile")
BY_NAME = {use.name: use for use in [*USES, *CONVS]}
# Every use, adapted and frozen, in the slow run; some, these among them, always.
CORE = (
    "matmul_left",
    "dense_general_two_in_two_out",
    "siblings",
    "concatenate_kernels",
    "lookup_take",
    "tied",
    "conv_2d_groups",
    "scan_groups",
    "experts_ragged",
    "experts_selected",
    "index_fori",
)


def some(uses: list[Use]) -> list[Any]:
    quick = lambda use: use.name in CORE or zlib.crc32(use.name.encode()) % 16 == 0
    slow = pytest.mark.slow
    return [pytest.param(u, id=u.name, marks=() if quick(u) else slow) for u in uses]


each_use = pytest.mark.parametrize("use", some(list(BY_NAME.values())))


@each_use
def test_an_adapted_kernel_is_that_of_its_dense_form(use: Use, getkey):
    case = make_case(use, getkey)
    check(case, case.lora.apply, reference(case))


@each_use
def test_a_frozen_kernel_is_that_of_its_dense_form(use: Use, getkey):
    case = make_case(use, getkey, adapted=False)
    check(case, case.lora.apply, reference(case))
