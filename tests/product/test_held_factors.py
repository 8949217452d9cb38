"""Kernels that are multiplied as they are: their factors are not laid out for it.

Layouts are equations that broadcast, reshape, squeeze, or sum over an axis of size one.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import bodies
from oracle import assert_close, random_like

import jlora
from jlora._jax.platforms import Target
from jlora._rules.adapted import Held

LAYOUTS = {"broadcast_in_dim", "reshape", "squeeze", "reduce_sum"}
RANK, ALPHA = 2, 5.0
# Name -> the einsum of `x` and the kernel, their shapes, and the roles that it gives.
USES = {
    "matrix": ("bi,io->bo", (3, 5), (5, 7)),
    "transposed": ("bi,oi->bo", (3, 5), (7, 5)),
    "several axes": ("bhk,hko->bo", (3, 2, 5), (2, 5, 7)),
    "heads out": ("bi,ihk->bhk", (3, 5), (5, 2, 7)),
    "batched": ("ebi,eio->ebo", (4, 3, 5), (4, 5, 7)),
    "batch last": ("ebi,ioe->ebo", (4, 3, 5), (5, 7, 4)),
}


def names_of(fn: Callable[..., Any], *args: Any, platform: str = "cpu") -> Counter[str]:
    """How many equations of each kind a function has on a platform."""
    program = jax.make_jaxpr(fn)(*args).jaxpr
    return Counter(eqn.primitive.name for eqn in bodies(program, Target(platform)))


def layouts(fn: Callable[..., Any], *args: Any) -> Counter[str]:
    """How many equations of each kind lay something out."""
    found = names_of(fn, *args)
    return Counter({name: found[name] for name in LAYOUTS & found.keys()})


def drawn(*shape: int) -> jax.Array:
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("use", USES)
def test_a_product_lays_no_factor_out(use: str) -> None:
    equation, x_shape, w_shape = USES[use]
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    params, x = {"w": drawn(*w_shape)}, drawn(*x_shape)
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=RANK, alpha=ALPHA))
    adapter = random_like(lora.init(jax.random.key(0), params, x), 3)

    plain = jax.grad(lambda p, x: jnp.vdot(y := fn(p, x), y), argnums=(0, 1))
    loss = lambda a, x: jnp.vdot(y := lora.apply(params, a, x), y)
    ours = jax.grad(loss, argnums=(0, 1))
    assert layouts(ours, adapter, x) <= layouts(plain, params, x)

    merged = lambda a, x: jnp.vdot(y := fn(jlora.merge(params, a), x), y)
    want = jax.grad(merged, argnums=(0, 1))(adapter, x)
    assert_close(ours(adapter, x), want, 2e-5)


def test_a_kernel_is_laid_out_once_for_all_its_other_uses() -> None:
    """Two products, a lookup and a transpose of one kernel."""
    params, x, ids = {"w": drawn(7, 5)}, drawn(3, 7), jnp.asarray([6, 0, 3])

    def fn(p: Any, x: jax.Array) -> jax.Array:
        w = p["w"]
        h = jnp.tanh(x @ w) + w[ids]
        return (h @ w.T) @ w

    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=RANK, alpha=ALPHA))
    adapter = random_like(lora.init(jax.random.key(0), params, x), 3)
    loss = lambda a: jnp.vdot(y := lora.apply(params, a, x), y)
    want = lambda a: jnp.vdot(y := fn(jlora.merge(params, a), x), y)
    assert_close(jax.grad(loss)(adapter), jax.grad(want)(adapter), 2e-5)
    factors = adapter["w"]
    one = Held(params["w"], factors.axes, factors.a, factors.b, factors.scaling)
    assert one.laid_out is one.laid_out


@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (2.0, 3.0, 2.0)])
def test_siblings_are_scaled_at_once_where_they_agree(scalings: Any) -> None:
    names = "qkv"
    params = {n: drawn(5, 7 + i) for i, n in enumerate(names)}
    x = drawn(3, 5)
    fn = lambda p, x: [x @ p[n] for n in names]
    rules = [
        jlora.LoraConfig(n, rank=RANK, alpha=RANK * s)
        for n, s in zip(names, scalings, strict=True)
    ]
    lora = jlora.lora(fn, rules)
    adapter = random_like(lora.init(jax.random.key(0), params, x), 3)
    total = lambda ys: sum(jnp.vdot(y, y) for y in ys)
    loss = lambda a: total(lora.apply(params, a, x))
    want = lambda a: total(fn(jlora.merge(params, a), x))
    assert_close(jax.grad(loss)(adapter), jax.grad(want)(adapter), 2e-5)
    found = names_of(loss, adapter, platform="rocm")
    assert found["mul"] == (1 if len({*scalings}) == 1 else len(scalings))


def test_on_a_cpu_siblings_join_nothing() -> None:
    """To compile what is joined and split takes longer, and it runs no faster."""
    names = "qkv"
    params = {n: drawn(5, 7 + i) for i, n in enumerate(names)}
    x = drawn(3, 5)
    lora = jlora.lora(
        lambda p, x: sum(jnp.tanh(x @ p[n]).sum() for n in names),
        jlora.LoraConfig(rank=RANK, alpha=ALPHA),
    )
    adapter = random_like(lora.init(jax.random.key(0), params, x), 3)
    step = jax.jit(jax.grad(lambda a, x: lora.apply(params, a, x), argnums=(0, 1)))
    text = step.lower(adapter, x).compile().as_text()
    assert " dot(" in text or "ynn" in text or "onednn" in text
    assert not re.search(r" (concatenate|slice)\(", text)
