"""What holds for every variant of the table, one's own among them.

A variant that is added to `jlora/_adapter/variants` is tested here without a line: the
same functions take every kind of entry. So is one that is defined outside of jlora.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from variant_of_tests import OwnFactors

import jlora
import jlora.checkpoint
import jlora.optim
from jlora._adapter.variants import VARIANTS, variant_of_config, variant_of_entry
from jlora._adapter.variants.variant import Variant

# By what field a config asks for a variant that it does not call by name.
FIELDS: dict[str, dict[str, Any]] = {
    "rows": {"rows": (1, 3)},
    "slices": {"slices": ((0, 2), (4, 7))},
    "lora": {},
    "full": {"full": True},
}
# Layers are those of a stack, which a table is not: they have `test_layers.py`.
OWN = variant_of_entry(object.__new__(OwnFactors))
OF_A_TABLE = [v for v in (*VARIANTS, OWN) if v.name != "layers"]
each_variant = pytest.mark.parametrize("variant", OF_A_TABLE, ids=lambda v: v.name)


def config_of(variant: Variant) -> jlora.LoraConfig:
    own = {"variant": variant.name} if variant.is_named else FIELDS[variant.name]
    return jlora.LoraConfig("table", rank=3, alpha=4.5, **own)


def model(params: Any, rows: Any, x: Any) -> Any:
    """A table of which rows are looked up, and that is a kernel besides."""
    return params["table"][rows] + jnp.tanh(x @ params["table"])


PARAMS = {"table": jax.random.normal(jax.random.key(0), (6, 7))}
ARGS = jnp.array([1, 2, 5, 1]), jax.random.normal(jax.random.key(1), (4, 6))


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def made(variant: Variant, key: int = 2) -> tuple[jlora.Lora, dict[str, Any]]:
    lora = jlora.lora(model, config_of(variant))
    return lora, lora.init(jax.random.key(key), PARAMS, *ARGS)


def random(variant: Variant) -> tuple[jlora.Lora, dict[str, Any]]:
    """An adapter none of whose arrays is zero."""
    lora, adapter = made(variant)
    noise = lambda v: v + 0.3 * jax.random.normal(jax.random.key(v.size), v.shape)
    return lora, jax.tree.map(noise, adapter)


def test_a_config_chooses_one_variant_and_its_entries_are_of_it() -> None:
    for variant in OF_A_TABLE:
        assert variant_of_config(config_of(variant)) is variant
        assert variant_of_entry(made(variant)[1]["table"]) is variant


def test_a_name_that_no_variant_has_is_refused() -> None:
    config = jlora.LoraConfig(variant="none")
    with pytest.raises(ValueError, match=r"`LoraConfig.variant` is one of \['lora'"):
        jlora.lora(model, config)
    with pytest.raises(ValueError, match=r"one of \['rows', 'variant'\] at a time"):
        jlora.LoraConfig(variant="none", rows=[1])
    with pytest.raises(TypeError, match="is a name"):
        jlora.LoraConfig(variant=None)  # type: ignore[arg-type]


@each_variant
def test_a_new_entry_changes_nothing(variant: Variant) -> None:
    lora, adapter = made(variant)
    assert np.allclose(lora.apply(PARAMS, adapter, *ARGS), model(PARAMS, *ARGS))
    merged = jlora.merge(PARAMS, adapter)["table"]
    assert np.allclose(merged, PARAMS["table"], atol=1e-7)


@each_variant
def test_a_plan_tells_the_arrays_of_an_entry(variant: Variant) -> None:
    lora, adapter = made(variant)
    (target,) = lora.plan(PARAMS, *ARGS).targets
    arrays = variant.arrays(adapter["table"])
    told = {n: (v.shape, v.dtype) for n, v in target.abstract_arrays.items()}
    assert told == {name: (v.shape, v.dtype) for name, v in arrays.items()}
    trained = [v.size for name, v in arrays.items() if name not in variant.frozen]
    assert target.trainable == sum(trained)


@each_variant
def test_apply_and_its_gradient_are_those_of_the_merged_params(
    variant: Variant,
) -> None:
    lora, adapter = random(variant)
    loss = lambda y: jnp.sum(jnp.sin(y) ** 2)
    one = lambda adapter: loss(lora.apply(PARAMS, adapter, *ARGS))
    other = lambda adapter: loss(model(jlora.merge(PARAMS, adapter), *ARGS))
    pairs = [jax.value_and_grad(f)(adapter) for f in (one, other)]
    for x, y in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert np.allclose(x, y, rtol=1e-5, atol=1e-5)


@each_variant
def test_a_file_brings_it_back(variant: Variant, tmp_path: Path) -> None:
    lora, adapter = random(variant)
    save = lambda config: jlora.checkpoint.save(
        tmp_path / "file", adapter, config=config, base=PARAMS
    )
    other = jlora.LoraConfig("table", rank=2, alpha=1.0, dora=True)
    with pytest.raises(jlora.AdapterError, match="no config that matches it"):
        save(other)
    save(lora.configs[0])
    assert jlora.checkpoint.describe(tmp_path / "file").config == lora.configs[0]
    for like in (None, made(variant, 3)[1]):
        found = jlora.checkpoint.restore(tmp_path / "file", like=like, base=PARAMS)
        assert jax.tree.structure(found) == jax.tree.structure(adapter)
        for x, y in zip(*map(jax.tree.leaves, (found, adapter)), strict=True):
            assert np.array_equal(x, y)


@each_variant
def test_a_config_of_it_is_plain_json(variant: Variant) -> None:
    config = config_of(variant)
    plain = json.loads(json.dumps(config.to_dict()))
    assert jlora.LoraConfig.from_dict(plain) == config
    assert ("variant" in plain) == variant.is_named


@each_variant
def test_an_entry_of_another_kernel_is_refused(variant: Variant) -> None:
    _, adapter = random(variant)
    with pytest.raises(jlora.AdapterError, match=re.escape("'table' (5, 7)")):
        jlora.merge({"table": PARAMS["table"][:5]}, adapter)


@each_variant
def test_each_array_has_a_place_and_a_label(variant: Variant) -> None:
    _, adapter = random(variant)
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",), axis_types=(AxisType.Auto,))
    where = {"table": PartitionSpec(None, "model")}
    placed = jlora.shardings(where, adapter, mesh=mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(adapter)
    assert jax.tree.leaves(jax.device_put(adapter, placed))
    labels = jlora.optim.factor_labels(adapter)
    assert jax.tree.structure(labels) == jax.tree.structure(adapter)
    trained = {*jax.tree.leaves(labels)} - {"frozen"}
    assert trained and trained <= {"a", "b", "magnitude", "full"}
    mask = jlora.optim.trainable_mask({"lora": adapter})
    assert jax.tree.leaves(mask) == [label != "frozen" for label in leaves(labels)]


@each_variant
def test_what_is_frozen_stays_to_the_bit(variant: Variant) -> None:
    lora, adapter = random(variant)
    loss = lambda adapter: jnp.sum(jnp.sin(lora.apply(PARAMS, adapter, *ARGS)))
    gradient = jax.grad(loss)(adapter)
    decay = partial(optax.adamw, weight_decay=0.1)
    ways = [decay(0.1, mask=jlora.optim.decay_mask)]
    ways += [jlora.optim.freeze_base(decay(0.1), collection="table")]
    if variant.rank is not None:
        ways += [jlora.optim.lora_plus(decay, 0.1)]
    labels = leaves(jlora.optim.factor_labels(adapter))
    for tx in ways:
        updates, _ = tx.update(gradient, tx.init(adapter), adapter)
        new = optax.apply_updates(adapter, updates)
        for label, old, now in zip(labels, *map(leaves, (adapter, new)), strict=True):
            assert np.array_equal(old, now) == (label == "frozen")


@each_variant
def test_a_function_of_it_can_be_exported(variant: Variant) -> None:
    lora, adapter = random(variant)
    exported = jax.export.export(jax.jit(lora.apply))(PARAMS, adapter, *ARGS)
    again = jax.export.deserialize(exported.serialize())
    found = again.call(PARAMS, adapter, *ARGS)
    assert np.allclose(found, lora.apply(PARAMS, adapter, *ARGS), atol=1e-6)
