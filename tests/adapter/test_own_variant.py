"""`jlora.register_variant`: what is refused, stacks of layers, meshes, a cell twice.

What holds for every variant is tested of one's own in test_variant_table.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from variant_of_tests import OwnFactors

import jlora
import jlora.checkpoint
import jlora.optim


def stack(params: Any, x: jax.Array) -> jax.Array:
    """Three layers under a scan, whose kernels have two output axes."""

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jnp.tanh(jnp.einsum("ni,iho->nho", x, w))

    return jax.lax.scan(layer, x, params["w"])[1]


PARAMS = {"w": jax.random.normal(jax.random.key(0), (3, 8, 2, 4)) / 3}
X = jax.random.normal(jax.random.key(1), (5, 8))
CONFIG = jlora.LoraConfig("w", rank=3, alpha=5, variant="own")


def random(lora: jlora.Lora, params: Any = PARAMS) -> dict[str, Any]:
    adapter = lora.init(jax.random.key(2), params, X)
    draw = lambda v: jax.random.normal(jax.random.key(v.size), v.shape) / 2
    return jax.tree.map(draw, adapter)


def materialized(entry: OwnFactors) -> np.ndarray:
    """The change of each layer, in NumPy."""
    a, b, d = (np.asarray(v, np.float64) for v in (entry.a, entry.b, entry.d))
    change = 5 / 3 * np.einsum("lir,lr,lro->lio", a, d, b)
    return change.reshape(3, 8, 2, 4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_of_a_stack_on_a_mesh_it_is_what_it_says(kind: AxisType) -> None:
    lora = jlora.lora(stack, CONFIG)
    adapter = random(lora)
    summed = PARAMS["w"] + materialized(adapter["w"])
    expected = stack({"w": summed.astype(np.float32)}, X)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind))
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
        params = {"w": jax.device_put(PARAMS["w"], where)}
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec()))
        placed = jax.device_put(adapter, jlora.shardings(params, adapter))
        found = jax.jit(lora.apply)(params, placed, x)
        new = jax.jit(lora.init)(jax.random.key(2), params, x)
        np.testing.assert_allclose(lora.apply(params, new, x), stack(params, x), 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    merged = jlora.merge(PARAMS, adapter)["w"]
    np.testing.assert_allclose(merged, summed, rtol=1e-5, atol=1e-5)


def test_lora_plus_takes_its_labels() -> None:
    adapter = random(jlora.lora(stack, CONFIG))
    labels = jlora.optim.factor_labels(adapter)["w"]
    assert (labels.a, labels.b, labels.d) == ("a", "b", "b")
    tx = jlora.optim.lora_plus(optax.sgd, 1.0, ratio=4.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter))
    steps = {n: float(getattr(updates["w"], n).min()) for n in ("a", "b", "d")}
    assert steps == {"a": -1.0, "b": -4.0, "d": -4.0}


def test_it_is_named_where_one_may_ask_for_it() -> None:
    assert {"lora", "loha", "own"} <= set(jlora.variant_names())
    assert len(set(jlora.variant_names())) == len(jlora.variant_names())
    plan = jlora.lora(stack, CONFIG).plan(PARAMS, X)
    assert "3 own" in str(plan)


def defined(name: str = "twice") -> Any:
    """A class that another call defines again, as a cell of a notebook does."""

    @jlora.register_variant(name)
    class Twice(jlora.VariantEntry):
        core: jax.Array
        rank = property(lambda self: self.core.shape[-1])

        @staticmethod
        def shapes(axes: Any, shape: Any, rank: int) -> Any:
            return {"core": (*(shape[i] for i in axes.batch), rank, rank)}

        def lowered(self) -> jlora.LoraFactors:
            inputs, outputs = self.axes.fans(self.kernel_shape)
            a, b = jnp.eye(inputs)[:, : self.rank], jnp.eye(outputs)[: self.rank]
            return self.factors(a, self.core @ b)

    return Twice


def test_a_class_that_is_defined_again_takes_the_place_of_the_old(
    tmp_path: Any,
) -> None:
    config = jlora.LoraConfig("w", rank=3, variant="twice")
    kinds, adapters = [], []
    for _ in range(2):
        kinds.append(defined())
        lora = jlora.lora(stack, config)
        adapters.append(random(lora))
    assert kinds[0] is not kinds[1]
    assert [type(adapter["w"]) for adapter in adapters] == kinds
    outputs = [lora.apply(PARAMS, adapter, X) for adapter in adapters]
    np.testing.assert_array_equal(*outputs)
    jlora.checkpoint.save(tmp_path / "new", adapters[1], config=config)
    assert type(jlora.checkpoint.restore(tmp_path / "new")["w"]) is kinds[1]
    for adapter in adapters:
        exported = jax.export.export(jax.jit(lora.apply))(PARAMS, adapter, X)
        again = jax.export.deserialize(exported.serialize())
        np.testing.assert_allclose(again.call(PARAMS, adapter, X), outputs[0], 1e-6)


def test_what_is_no_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="'own' is OwnFactors already"):
        defined("own")
    with pytest.raises(ValueError, match="'loha' is HadamardFactors already"):
        defined("loha")
    with pytest.raises(TypeError, match="takes a name, got None"):
        jlora.register_variant(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a subclass of `jlora\.VariantEntry`"):
        jlora.register_variant("int")(int)  # type: ignore[type-var]

    class Bare(jlora.VariantEntry):
        rank = 3

    with pytest.raises(TypeError, match="Bare lacks shapes, lowered, an annotated"):
        jlora.register_variant("bare")(Bare)
    assert not {"int", "bare"} & set(jlora.variant_names())


def test_factors_of_another_shape_are_refused() -> None:
    axes = jlora.KernelAxes((0,), (1,), (2, 3))
    ones = jnp.ones((3, 3))
    entry = OwnFactors(
        a=ones, b=ones, d=ones, axes=axes, scaling=1.0, kernel_shape=(3, 8, 2, 4)
    )
    with pytest.raises(ValueError, match=r"to a \(8, 2\) and b \(3, 8\), expected"):
        entry.factors(jnp.ones((8, 2)), jnp.ones((3, 8)))
