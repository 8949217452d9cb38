"""The form for TPUs: where it is chosen, and what is lowered for them.

Their compiler is not asked here: the reason for the form, its estimates, is in
`_product.fused`. Values and gradients are tested in `test_products.py`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora._jax.platforms import Target
from jlora._product import choice

D, K, R = 2048, 1536, 16
BF16 = jnp.bfloat16
V5E, V6E = (Target("tpu", kind=kind) for kind in ("TPU v5 lite", "TPU v6 lite"))


def of(tokens: int, features: int = D, outputs: int = K) -> choice.ByPlatform:
    """A group of one product."""
    return choice.ByPlatform("never", 0, True, tokens, features, outputs)


@pytest.mark.parametrize(
    ("by", "target", "expected"),
    [
        (of(8192), V5E, "joined"),
        (of(8192), V6E, "copied"),
        (of(8192), Target("tpu", kind="TPU v4"), "separate"),
        (of(8192), Target("tpu"), "joined"),
        (of(8191), V5E, "separate"),
        (of(8192, features=1023), V5E, "separate"),
        (of(8192, outputs=64), V6E, "separate"),
        (of(8192)._replace(summed=False), V5E, "separate"),
        (of(65536), V5E._replace(devices=4), "separate"),
        (of(8192), Target("cpu"), "separate"),
    ],
    ids=str,
)
def test_where_it_is_chosen(
    by: choice.ByPlatform, target: Target, expected: str
) -> None:
    assert choice.form_on(by, target) == expected


def lowered(tokens: int, names: str, platform: str) -> list[str]:
    """The products of a step of some siblings, as lowered for a platform."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, BF16)
    params, x = {n: struct(D, K) for n in names}, struct(tokens, D)
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ w)) for w in p.values())
    lora = jlora.lora(fn, jlora.LoraConfig(rank=R))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    step = jax.jit(jax.grad(lora.apply, argnums=(1, 2))).trace(params, adapter, x)
    text = step.lower(lowering_platforms=(platform,)).as_text()
    assert "slice" not in text or len(names) > 1
    return [line for line in text.splitlines() if "dot_general" in line]


def contracted(lines: list[str]) -> list[int]:
    """The sizes of the last axes of left operands, of products that are wide."""
    shapes = [re.findall(r"tensor<([\dx]+)x\w+>", line)[-3:] for line in lines]
    sizes = [[[int(n) for n in shape.split("x")] for shape in row] for row in shapes]
    wide = lambda row: min(row[1]) > 4 * R and min(row[2]) > 4 * R
    return sorted(row[0][-1] for row in sizes if wide(row))


@pytest.mark.parametrize("names", ["q", "qkv"])
def test_joined_axes_are_contracted_both_ways(names: str) -> None:
    """`[x, h]·[W; b]` for each kernel; `[dy, g]·[W, a]ᵀ` with one of the siblings."""
    n = len(names)
    expected = [K + n * R] + [K] * (n - 1) + [D + R] * n
    assert contracted(lowered(8192, names, "tpu")) == sorted(expected)


@pytest.mark.parametrize(("tokens", "platform"), [(4096, "tpu"), (8192, "cpu")])
def test_else_products_are_apart(tokens: int, platform: str) -> None:
    assert contracted(lowered(tokens, "q", platform)) == [K, D]


def test_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "here", lambda: V6E)
    struct: Any = jax.ShapeDtypeStruct
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=R))
    plan = lora.plan({"w": struct((D, K), BF16)}, struct((8192, D), BF16))
    assert [use.form for target in plan.targets for use in target.uses] == ["copied"]
