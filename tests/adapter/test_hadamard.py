"""`_adapter.variants.hadamard`: LoHa beside NumPy, on kernels of any axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
import jlora.peft

pytestmark = pytest.mark.usefixtures("fast_compile")

RANK, ALPHA = 3, 7.5
# A use of a kernel: its shape, the input, and the product.
USES: dict[str, Any] = {
    "dense": ((10, 14), (4, 10), "nd,df->nf"),
    "heads": ((10, 2, 7), (4, 10), "nd,dhf->nhf"),
    "out": ((2, 5, 9), (4, 2, 5), "nhd,hdf->nf"),
    "experts": ((6, 10, 14), (6, 4, 10), "end,edf->enf"),
    "left": ((14, 10), (4, 10), "nd,fd->nf"),
}
each_use = pytest.mark.parametrize("use", USES)


def made(use: str, **settings: Any) -> tuple[Any, ...]:
    shape, rows, equation = USES[use]
    keys = jax.random.split(jax.random.key(0), 8)
    params = {"w": jax.random.normal(keys[0], shape)}
    x = jax.random.normal(keys[1], rows)
    config = jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, variant="loha", **settings)
    model = lambda params, x: jnp.einsum(equation, x, params["w"])
    lora = jlora.lora(model, config)
    adapter = lora.init(keys[2], params, x)
    values, treedef = jax.tree.flatten(adapter)
    drawn = [
        jax.random.normal(key, value.shape, value.dtype)
        for key, value in zip(keys[4:], values, strict=True)
    ]
    return lora, params, treedef.unflatten(drawn), x, model


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def delta(entry: Any, equation: str, shape: tuple[int, ...]) -> np.ndarray:
    """The equation of the paper, in float64: both products whole, then entry by entry.

    Both are laid out as the kernel by the letters of its axes.
    """
    kernel = equation.split(",")[1].split("->")[0]
    letters = lambda axes: "".join(kernel[i] for i in axes)
    batch, inner = letters(entry.axes.batch), letters(entry.axes.in_)
    out = letters(entry.axes.out)
    told = f"{batch}{inner}r,{batch}r{out}->{kernel}"
    wide = lambda v: np.asarray(v, np.float64)
    one = np.einsum(told, wide(entry.a), wide(entry.b))
    other = np.einsum(told, wide(entry.a2), wide(entry.b2))
    assert one.shape == shape
    return ALPHA / RANK * one * other


@each_use
def test_values_and_gradients_are_those_of_the_equation(use: str) -> None:
    lora, params, adapter, x, model = made(use)
    shape, _, equation = USES[use]
    dense = params["w"] + delta(adapter["w"], equation, shape).astype(np.float32)
    expected = model({"w": dense}, x)
    np.testing.assert_allclose(lora.apply(params, adapter, x), expected, 1e-4, 1e-4)
    merged = jlora.merge(params, adapter)["w"]
    np.testing.assert_allclose(merged, dense, 1e-5, 1e-4)
    loss = lambda adapter: jnp.sin(lora.apply(params, adapter, x)).sum()

    def whole(adapter: Any) -> jax.Array:
        return jnp.sin(model(jlora.merge(params, adapter), x)).sum()

    both = (leaves(jax.grad(fn)(adapter)) for fn in (loss, whole))
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, 1e-3, 2e-3)


@each_use
def test_a_new_one_changes_nothing_and_moves(use: str) -> None:
    lora, params, _, x, model = made(use)
    new = lora.init(jax.random.key(1), params, x)
    np.testing.assert_allclose(lora.apply(params, new, x), model(params, x), atol=1e-5)
    loss = lambda adapter: jnp.sin(lora.apply(params, adapter, x)).sum()
    moved = jax.grad(loss)(new)["w"]
    assert jnp.abs(moved.b2).max() > 0
    assert not jnp.abs(moved.a2).max() > 0  # b2 is zero


def test_the_kernel_is_not_formed() -> None:
    lora, params, adapter, x, _ = made("dense")
    step = jax.jit(jax.grad(lambda a: lora.apply(params, a, x).sum()))
    text = step.lower(adapter).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and not any("-> tensor<10x14x" in line for line in products)


def test_the_plan_counts_both_pairs() -> None:
    lora, params, _, x, _ = made("dense")
    (target,) = lora.plan(params, x).targets
    assert target.trainable == 2 * RANK * (10 + 14)


def test_peft_gets_plain_factors_of_the_same_change(tmp_path: Any) -> None:
    lora, params, adapter, x, _ = made("dense")
    plan = lora.plan(params, x)
    jlora.peft.save(tmp_path / "peft", plan, adapter, lora.configs)
    _, found = jlora.peft.load(tmp_path / "peft", plan)
    assert found["w"].rank == RANK**2
    same = jlora.merge(params, found)["w"], jlora.merge(params, adapter)["w"]
    np.testing.assert_allclose(*same, 1e-5, 1e-5)


def test_dora_and_it_are_two_variants() -> None:
    with pytest.raises(ValueError, match="dora"):
        jlora.LoraConfig("w", dora=True, variant="loha")


def test_entries_keep_their_dtype() -> None:
    _, _, adapter, _, _ = made("dense", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in leaves(adapter)} == {jnp.dtype(jnp.bfloat16)}
    assert adapter["w"].scaling == ALPHA / RANK
