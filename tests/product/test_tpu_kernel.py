"""`_product.tpu_kernel`: the sum in one kernel for TPUs, interpreted.

`tests/whole/test_tpu.py` compiles it, where the compiler is installed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jlora
from jlora._jax.platforms import Target
from jlora._jax.versions import vary
from jlora._product import choice, lowered, tpu_kernel
from jlora._product.tpu_kernel import sum_of_products, tiles

ROWS, COLUMNS = 512, 384
BF16 = jnp.bfloat16


def drawn(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), BF16)


def wide(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize("depths", [(128,), (256, 640), (512, 128, 256)], ids=len)
def test_it_is_the_sum(depths: tuple[int, ...], rank: int, turned: bool) -> None:
    rng = np.random.default_rng(rank)
    xs = [drawn(rng, ROWS, depth) for depth in depths]
    shape = lambda depth: (COLUMNS, depth) if turned else (depth, COLUMNS)
    ws = [drawn(rng, *shape(depth)) for depth in depths]
    h, b = drawn(rng, ROWS, rank), drawn(rng, rank, COLUMNS)
    found = sum_of_products(xs, ws, h, b, turned=turned, interpret=True)
    right = (wide(w).T if turned else wide(w) for w in ws)
    expected = sum(wide(x) @ w for x, w in zip(xs, right, strict=True))
    expected = expected + wide(h) @ wide(b)
    assert found.dtype == BF16
    np.testing.assert_allclose(wide(found), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((512, (128,), 128), True),
        ((256, (384, 128), 640), True),
        ((128, (128,), 128), False),
        ((512, (130,), 128), False),
        ((512, (128,), 64), False),
        ((0, (128,), 128), False),
        ((512, (128,) * 4, 128), False),
    ],
    ids=str,
)
def test_what_divides_into_blocks(sizes: Any, expected: bool) -> None:
    rows, depths, columns = sizes
    assert tiles(rows, depths, columns) is expected


BY = choice.ByPlatform("always", 0, True, 512, 256, 384)


@pytest.mark.parametrize(
    ("by", "target", "expected"),
    [
        (BY, Target("tpu"), "tiled"),
        (BY._replace(fused="filled"), Target("tpu"), "separate"),
        (BY._replace(fused="filled", tokens=8192), Target("tpu"), "separate"),
        (BY._replace(tokens=500), Target("tpu"), "separate"),
        (BY._replace(summed=False), Target("tpu"), "separate"),
        (BY, Target("tpu", devices=2), "separate"),
        (BY, Target("cpu"), "separate"),
    ],
    ids=str,
)
def test_it_is_taken_where_it_is_asked_for(
    by: choice.ByPlatform, target: Target, expected: str
) -> None:
    assert choice.form_on(by, target) == expected


def test_within_a_shard_map_types_say_along_what_it_varies() -> None:
    rng = np.random.default_rng(0)
    x, w = drawn(rng, 4 * ROWS, 128), drawn(rng, 128, COLUMNS)
    h, b = drawn(rng, 4 * ROWS, 3), drawn(rng, 3, COLUMNS)
    whole = lambda v: vary(v, frozenset({"d"}))
    run = lambda x, h: sum_of_products([x], [whole(w)], h, whole(b), interpret=True)
    kinds, rows = (jax.sharding.AxisType.Auto,), PartitionSpec("d")
    mesh = jax.make_mesh((4,), ("d",), axis_types=kinds)
    place = jax.sharding.NamedSharding(mesh, rows)
    each = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    found = jax.jit(each)(*jax.device_put((x, h), place))
    expected = wide(x) @ wide(w) + wide(h) @ wide(b)
    np.testing.assert_allclose(wide(found), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("siblings", [1, 2, 4])
def test_adapted_products_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch, siblings: int
) -> None:
    """With four siblings their gradients are more than one kernel sums."""
    calls = []

    def interpreted(xs: Any, *args: Any, **settings: Any) -> jax.Array:
        calls.append(len(xs))
        return sum_of_products(xs, *args, **settings, interpret=True)

    on_tpu = functools.partial(choice.form_on, target=Target("tpu"))
    monkeypatch.setattr(lowered, "form_on", lambda by, _: on_tpu(by))
    monkeypatch.setattr(tpu_kernel, "sum_of_products", interpreted)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    params = {f"w{i}": drawn(rng, 256, 384) / 16 for i in range(siblings)}
    x = drawn(rng, 2, 256, 256)

    def model(params: Any, x: Any) -> Any:
        return sum(jnp.tanh(x @ w).astype(jnp.float32).sum() for w in params.values())

    config = jlora.LoraConfig(rank=3, alpha=5.0)
    lora = jlora.lora(model, config, contraction="fused")
    adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.01, adapter)
    found = jax.jit(jax.grad(lora.apply, (1, 2)))(params, adapter, x)
    assert sorted(set(calls)) == ([1] if siblings in (1, 4) else [1, siblings])
    jax.clear_caches()
    monkeypatch.undo()
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    expected = jax.grad(lora.apply, (1, 2))(full[0], adapter, full[1])
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        error = np.linalg.norm(wide(one) - wide(other)) / np.linalg.norm(wide(other))
        assert error < 2e-2
