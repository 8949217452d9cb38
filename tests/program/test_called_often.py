"""Jitted and checkpointed functions that are called often are traced once by jlora too.

JAX keeps one jaxpr for all calls of a jitted function with the same types. Here the
different jaxprs in a trace are counted, and the equations that the analysis looks at.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close

import jlora
from jlora._program.siblings import arrange

X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)


def inner_jaxprs(closed: Any) -> int:
    """The number of different jaxprs inside of one."""
    seen, pending = set(), [closed.jaxpr]
    while pending:
        jaxpr = pending.pop()
        if id(jaxpr) in seen:
            continue
        seen.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            for value in eqn.params.values():
                several = value if isinstance(value, tuple | list) else [value]
                inner = [getattr(v, "jaxpr", v) for v in several]
                pending += [v for v in inner if hasattr(v, "eqns")]
    return len(seen) - 1


def nested(depth: int, wrap: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the one below it twice."""
    if depth == 0:
        return wrap(lambda w, x: jnp.tanh(x @ w))
    below = nested(depth - 1, wrap)
    return wrap(lambda w, x: below(w, x) + below(w, 2 * x))


def adapted(fn: Callable[..., Any], params: Any) -> tuple[Any, Any]:
    lora = jlora.lora(fn, jlora.LoraConfig(".*", rank=2, alpha=3.0))
    adapter = lora.init(jax.random.key(0), params, X)
    rng = np.random.default_rng(0)
    fill = lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype)
    return lora, jax.tree.map(fill, adapter)


@pytest.mark.parametrize("backward", ["forward", "gradient"])
def test_nested_calls_grow_as_in_jax(backward: str) -> None:
    counts = []
    for depth in (3, 6):
        below = nested(depth, jax.jit)
        fn = lambda p, x, below=below: below(p["w"], x)
        params = {"w": jnp.eye(5)}
        lora, adapter = adapted(fn, params)
        apply = lambda a, p=params, lora=lora: lora.apply(p, a, X)
        if backward == "gradient":
            apply = jax.grad(lambda a, apply=apply: apply(a).sum())
        counts.append(inner_jaxprs(jax.make_jaxpr(apply)(adapter)))
        assert_close(
            lora.apply(params, adapter, X), fn(jlora.merge(params, adapter), X), 1e-5
        )
    shallow, deep = counts
    # Three more levels: a few jaxprs for each, where it was eight times as many.
    assert deep <= 2.5 * shallow, counts


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_block_of_many_layers_is_one_jaxpr(wrap: Callable[..., Any]) -> None:
    block = wrap(lambda w, x: jnp.tanh(x @ w))
    params = {f"layer_{i}": 0.2 * i * jnp.eye(5) for i in range(12)}

    def fn(p: Any, x: Any) -> Any:
        for name in params:
            x = block(p[name], x)
        return x

    lora, adapter = adapted(fn, params)
    plain = inner_jaxprs(jax.make_jaxpr(fn)(params, X))
    ours = inner_jaxprs(jax.make_jaxpr(lora.apply)(params, adapter, X))
    # The first layer and the others, whose input depends on the adapter, are told
    # apart, and the product of each is wrapped, with two parts that are chosen as it is
    # lowered; none of the twelve is there by itself.
    assert ours <= 8 * plain < 12
    merged = jlora.merge(params, adapter)
    assert_close(lora.apply(params, adapter, X), fn(merged, X), 1e-5)
    plan = lora.plan(params, X)
    assert {t.path for t in plan.targets} == set(params)
    assert all(len(t.uses) == 1 for t in plan.targets)


def test_calls_that_differ_are_told_apart() -> None:
    """One jitted function: as a lookup, as a reordering, of kernels of other roles."""
    take = jax.jit(lambda w, i: jnp.take(w, i, axis=0, mode="clip"))
    params = {"table": jnp.ones((7, 5)), "w": jnp.ones((5, 7)), "v": jnp.ones((5, 7))}

    def fn(p: Any, x: Any) -> Any:
        ids = jnp.asarray(x[:, 0] > 0, jnp.int32)
        fixed = (3 * jnp.arange(5)) % 5
        h = take(p["table"], ids) @ take(p["w"], fixed)
        return h + x @ take(p["v"], fixed)

    lora, adapter = adapted(fn, params)
    plan = lora.plan(params, X)
    kinds = {t.path: [use.kind for use in t.uses] for t in plan.targets}
    assert kinds == {"table": ["lookup"], "w": ["dot_general"], "v": ["dot_general"]}
    merged = jlora.merge(params, adapter)
    assert_close(lora.apply(params, adapter, X), fn(merged, X), 1e-5)


def test_the_function_is_traced_once() -> None:
    traces = []

    def fn(p: Any, x: Any) -> Any:
        traces.append(None)
        return jnp.tanh(x @ p["w"])

    params = {"w": jnp.ones((5, 7))}
    config = jlora.LoraConfig("w", rank=2, dropout=0.5)
    lora = jlora.lora(fn, config)
    adapter = lora.init(jax.random.key(0), params, X)
    for key in (None, jax.random.key(1)):
        traces.clear()
        jax.make_jaxpr(lambda a, k=key: lora.apply(params, a, X, lora_dropout_key=k))(
            adapter
        )
        assert len(traces) == 1


def test_planning_is_linear_where_siblings_depend_on_each_other() -> None:
    """Each kernel is scaled by the result before, so none can be moved up."""
    looked_at = []

    def fn(p: Any, x: Any) -> Any:
        y = jnp.zeros(())
        for name in p:
            y = jnp.mean(jnp.tanh(x @ (p[name] * (1 + y))))
        return y

    for n in (10, 20):
        params = {f"w{i:02}": jnp.ones((5, 5)) for i in range(n)}
        eqns = jax.make_jaxpr(fn)(params, X).jaxpr.eqns
        kernels = {
            i: 1 for i, e in enumerate(eqns) if e.primitive.name == "dot_general"
        }
        count: list[int] = []

        def movable(i: int, count: Any = count, kernels: Any = kernels) -> bool:
            count.append(i)
            return i not in kernels

        units = arrange(eqns, kernels, movable)
        assert sorted(i for unit in units for i in unit) == list(range(len(eqns)))
        looked_at.append(len(count) / len(eqns))
    assert looked_at[0] == looked_at[1]
