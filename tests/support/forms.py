"""Forms that are chosen when a program is lowered, made the choice of a test."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from jlora._jax.platforms import Target
from jlora._product import choice, fused, lowered


def choose(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Makes `form` the one of all products that could take it, of any size.

    The fused one is summed by XLA in place of its kernel, which `test_mosaic.py` tests;
    on several devices it is the partitioned one. The ruled one is for these alone. The
    separate one has siblings joined, which it has not on a CPU where nothing is chosen.
    """

    def on(by: choice.ByPlatform, target: Target) -> str:
        if form == "fused" and by.fused == "never":
            return "separate"
        if form in ("joined", "copied") and not by.summed:
            return "separate"
        if form == "ruled" and target.devices == 1:
            return "separate"
        return "partitioned" if form == "fused" and target.devices > 1 else form

    for module in (choice, lowered):
        monkeypatch.setattr(module, "form_on", on)
    monkeypatch.setattr(choice, "_LEAST_EXTENDED", 1)
    if form == "separate":  # as on GPUs
        monkeypatch.setattr(lowered, "is_singly", lambda *_: False)
    if form == "fused":
        monkeypatch.setattr(choice, "_has_kernel", lambda dtype: True)
        monkeypatch.setattr(choice, "divides", lambda *sizes: True)
        monkeypatch.setattr(choice, "_LEAST_FUSED", 1)
        monkeypatch.setattr(fused, "fits", lambda *sizes: False)
        monkeypatch.setattr(lowered, "apart", lambda *sizes: True)
    jax.clear_caches()


def bodies(jaxpr: Any, target: Target) -> Iterator[Any]:
    """All equations of a program and of those inside, as they are on a target."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "by_platform":
            yield from _body(eqn, target)
            continue
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from bodies(inner, target)


def _body(eqn: Any, target: Target) -> Iterator[Any]:
    chosen = eqn.params["bodies"].on(target)
    inner = eqn.params["jaxpr"]
    if chosen is not None:
        types = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
        inner = jax.make_jaxpr(chosen)(*types)
    yield from bodies(inner.jaxpr, target)
