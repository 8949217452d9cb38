"""The reader of traced programs catches what it is there to catch."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jaxpr_checks import (
    assert_not_materialized,
    base_indices,
    formed_by_size,
    materialized,
    slice_shapes,
)

LAYERS, TOKENS, WIDTH, HIDDEN, RANK = 3, 5, 7, 11, 2


def stack(*lead: int) -> tuple[dict, dict, jax.Array]:
    base = {"w": jnp.ones((*lead, WIDTH, HIDDEN)), "scale": jnp.ones(WIDTH)}
    adapter = {
        "a": jnp.ones((*lead, WIDTH, RANK)),
        "b": jnp.ones((*lead, RANK, HIDDEN)),
    }
    return base, adapter, jnp.ones((TOKENS, WIDTH))


@jax.custom_vjp
def product(x, w, a, b):
    return x @ w + (x @ a) @ b


def product_forward(x, w, a, b):
    return product(x, w, a, b), (x, w, a, b)


def product_backward(residuals, dy):
    x, w, a, b = residuals
    g = dy @ b.T
    return dy @ w.T + g @ a.T, None, x.T @ g, (x @ a).T @ dy


product.defvjp(product_forward, product_backward)


def merged(x, w, a, b):
    return x @ (w + 0.5 * a @ b)


def full_gradient(x, w, a, b):
    # Factored forwards; the gradient reaches b through dW.
    return x @ lax.stop_gradient(w) + x @ (a @ b)


def loss_of(use, wrap):
    def loss(base, adapter, x):
        return jnp.sum(wrap(use)(base, adapter, x * base["scale"][None]) ** 2)

    return loss


def plain(use):
    return lambda base, ad, x: use(x, base["w"], ad["a"], ad["b"])


def jitted(use):
    return jax.jit(jax.checkpoint(plain(use)))


def scanned(use):
    def run(base, ad, x):
        def body(x, layer):
            w, a, b = layer
            y = use(x, w, a, b)
            return x + jnp.pad(y[:, :WIDTH], ((0, 0), (0, 0))), None

        return lax.scan(body, x, (base["w"], ad["a"], ad["b"]))[0]

    return run


def indexed(use):
    def run(base, ad, x):
        def body(i, x):
            return x + use(x, base["w"][i], ad["a"][i], ad["b"][i])[:, :WIDTH]

        return lax.fori_loop(0, LAYERS, body, x)

    return run


def branched(use):
    inner = plain(use)

    def run(base, ad, x):
        return lax.cond(x[0, 0] > 0, inner, lambda *_: jnp.zeros((5, 11)), base, ad, x)

    return run


WRAPS = [(plain, ()), (jitted, ()), (scanned, (LAYERS,)), (indexed, (LAYERS,))]
WRAPS += [(branched, ())]


def find(use, wrap, lead, grad=True):
    args = stack(*lead)
    loss = loss_of(use, wrap)
    traced = jax.make_jaxpr(jax.grad(loss, argnums=1) if grad else loss)(*args)
    shapes = slice_shapes((*lead, WIDTH, HIDDEN), range(len(lead)))
    return materialized(traced, base_indices(*args), shapes)


@pytest.mark.parametrize(("wrap", "lead"), WRAPS)
@pytest.mark.parametrize("grad", [False, True])
def test_factored_product_is_clean(wrap, lead, grad):
    assert find(product, wrap, lead, grad) == []


@pytest.mark.parametrize(("wrap", "lead"), WRAPS)
@pytest.mark.parametrize("grad", [False, True])
def test_merged_kernel_is_found(wrap, lead, grad):
    found = find(merged, wrap, lead, grad)
    assert any("add" in line and "test_jaxpr_checks.py" in line for line in found)


def test_kernel_gradient_alone_is_found():
    """dW = xᵀ·dy, when nothing of that shape was formed in the forward pass."""
    base, adapter, x = stack()

    def backward(base, adapter, x):
        dy = x @ base["w"] + (x @ adapter["a"]) @ adapter["b"]
        return adapter["a"].T @ (x.T @ dy)

    found = materialized(
        jax.make_jaxpr(backward)(base, adapter, x), range(2), [(WIDTH, HIDDEN)]
    )
    assert len(found) >= 1 and all("dot_general" in line for line in found[:1])


def test_gradient_of_merged_delta_is_found_in_backward():
    found = find(full_gradient, plain, ())
    assert sum("dot_general" in line for line in found) == 2  # a·b, and dW


def test_buffer_of_zeros_is_found():
    base, adapter, x = stack()
    fn = lambda base, ad, x: jnp.zeros((HIDDEN, WIDTH)).at[0].add(x[0])
    with pytest.raises(AssertionError, match="broadcast_in_dim"):
        assert_not_materialized(
            jax.make_jaxpr(fn)(base, adapter, x), range(2), [(WIDTH, HIDDEN)]
        )


def test_joined_axes_are_found():
    fn = lambda w, a, b, x: x @ (w.reshape(7, 15) + a @ b).reshape(7, 3, 5).sum(1)
    w, x = jnp.ones((7, 3, 5)), jnp.ones((4, 7))
    traced = jax.make_jaxpr(fn)(w, jnp.ones((7, 2)), jnp.ones((2, 15)), x)
    assert len(materialized(traced, [0], [(7, 3, 5)])) == 3


def test_split_axes_are_found():
    fn = lambda w, d: w.reshape(7, 3, 5) + d
    traced = jax.make_jaxpr(lambda w, d: fn(w, d * 2))(
        jnp.ones((7, 15)), jnp.ones((7, 3, 5))
    )
    assert len(materialized(traced, [0], [(7, 15)])) == 2


def test_base_may_be_cast_rescaled_and_sliced():
    def fn(base, x):
        w = lax.optimization_barrier(
            base["w"].astype(jnp.float32) * base["scale"][None]
        )
        w = jax.jit(lambda w: -w.T[::-1] / 2)(w)
        return lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, w) @ x.T

    base = {"w": jnp.ones((7, 11), jnp.int8), "scale": jnp.ones(11)}
    args = base, jnp.ones((5, 7))
    assert materialized(jax.make_jaxpr(fn)(*args), range(2), [(7, 11)]) == []


def test_base_carried_through_a_loop_is_base_only_if_left_alone():
    def fn(base, step, x):
        body = lambda i, wx: (wx[0] + step, wx[1] @ wx[0] @ wx[0].T)
        return lax.fori_loop(0, 3, body, (base, x))[1]

    args = jnp.ones((7, 11)), jnp.ones(()), jnp.ones((5, 7))
    traced = jax.make_jaxpr(fn)(*args)
    assert materialized(traced, [0], [(7, 11)]) != []
    traced = jax.make_jaxpr(lambda w, x: fn(w, 1.0, x))(args[0], args[2])
    assert materialized(traced, [0], [(7, 11)]) == []


def test_a_kernel_that_looks_like_a_vector_is_refused():
    traced = jax.make_jaxpr(lambda w: w)(jnp.ones((7, 1)))
    with pytest.raises(ValueError, match="vector"):
        materialized(traced, [0], [(7, 1)])


def test_by_size_only_what_depends_on_more_than_the_base_counts():
    w, m, a, x = jnp.ones((7, 11)), jnp.ones((7, 7)), jnp.ones((7, 2)), jnp.ones((5, 7))

    def factored(params, a, i, x):
        w, m = params
        mixed = jnp.where(i > 0, m @ w, w[::-1])  # of frozen leaves, whichever it is
        return x @ mixed + (x @ a) @ jnp.ones((2, 11))

    def formed(params, a, i, x):
        return x @ (params[0] + a @ jnp.ones((2, 11))).T.T

    args = (w, m), a, 1, x
    indices = base_indices(*args)
    found = lambda fn: formed_by_size(jax.make_jaxpr(fn)(*args), indices, {77})
    assert not found(factored)
    assert len(found(formed)) == 4  # the delta, the sum, and both transposed
