"""Some layers of a stack: factors, moments and bytes for these alone.

The reference adds the delta of each picked layer to its slice of the kernel in NumPy.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export as jax_export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from safetensors.numpy import load_file

import jlora
import jlora.checkpoint
import jlora.optim
import jlora.peft
from jlora import LoraConfig, TargetError

pytestmark = pytest.mark.usefixtures("fast_compile")

COUNT, WIDTH, RANK, ALPHA = 5, 6, 2, 6.0
PICKED = [(0,), (3, 4), (0, 2, 4), (4, 1)]
each_picked = pytest.mark.parametrize("layers", PICKED, ids=str)
PARTS = ("q_proj", "v_proj")


def make_params(getkey: Any) -> Any:
    shape = (COUNT, WIDTH, WIDTH)
    make = lambda: {"kernel": jax.random.normal(getkey(), shape) / WIDTH}
    return {"params": {"layers": {"self_attn": {part: make() for part in PARTS}}}}


def scanned(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, own: Any) -> Any:
        q, v = (own["self_attn"][part]["kernel"] for part in PARTS)
        return jnp.tanh(x @ q) + x @ v, None

    return jax.lax.scan(layer, x, params["params"]["layers"])[0]


def indexed(params: Any, x: jax.Array) -> jax.Array:
    for i in range(COUNT):
        own = params["params"]["layers"]["self_attn"]
        q, v = (own[part]["kernel"][i] for part in PARTS)
        x = jnp.tanh(x @ q) + x @ v
    return x


MODELS = {"scanned": scanned, "remat": jax.checkpoint(scanned), "indexed": indexed}
each_model = pytest.mark.parametrize("model", MODELS)


def config_of(layers: Any) -> LoraConfig:
    return LoraConfig("(q|v)_proj/kernel", rank=RANK, alpha=ALPHA, layers=layers)


def make(getkey: Any, layers: Any, model: Any = scanned) -> Any:
    """A lora, params, an adapter of random values, and an input."""
    lora, params = jlora.lora(model, config_of(layers)), make_params(getkey)
    x = jax.random.normal(getkey(), (3, WIDTH))
    adapter = lora.init(getkey(), params, x)
    full = jax.tree.map(lambda v: jax.random.normal(getkey(), v.shape), adapter)
    return lora, params, full, x


def merged(params: Any, adapter: Any, layers: Any) -> Any:
    """The kernels with the delta of each layer, by a loop."""
    found = {}
    for part in PARTS:
        entry = adapter[f"params/layers/self_attn/{part}/kernel"]
        kernel = params["params"]["layers"]["self_attn"][part]["kernel"]
        for place, layer in enumerate(sorted(layers)):
            change = ALPHA / RANK * (entry.a[place] @ entry.b[place])
            kernel = kernel.at[layer].add(change)
        found[part] = {"kernel": kernel}
    return {"params": {"layers": {"self_attn": found}}}


@each_picked
@each_model
def test_values_and_gradients(layers: Any, model: str, getkey: Any) -> None:
    fn = MODELS[model]
    lora, params, adapter, x = make(getkey, layers, fn)
    loss = lambda a: (lora.apply(params, a, x) ** 2).sum()
    wanted = lambda a: (fn(merged(params, a, layers), x) ** 2).sum()
    assert_close(
        lora.apply(params, adapter, x), fn(merged(params, adapter, layers), x), 1e-5
    )
    grads, expected = jax.grad(loss)(adapter), jax.grad(wanted)(adapter)
    jax.tree.map(lambda u, v: assert_close(u, v, 1e-4), grads, expected)


@each_picked
def test_what_is_held_is_of_the_layers_alone(layers: Any, getkey: Any) -> None:
    lora, params, adapter, x = make(getkey, layers)
    shapes = {"a": (len(layers), WIDTH, RANK), "b": (len(layers), RANK, WIDTH)}
    for entry in adapter.values():
        assert {"a": entry.a.shape, "b": entry.b.shape} == shapes
        assert entry.kernel_shape == (COUNT, WIDTH, WIDTH)
    plan = lora.plan(params, x)
    size = 4 * len(PARTS) * len(layers) * 2 * WIDTH * RANK
    assert 4 * plan.trainable == size
    memory = plan.memory(optimizer=optax.adam(1e-3))
    assert (memory.factors, memory.checkpoint) == (size, size)
    assert memory.optimizer == 2 * size + 4
    assert f"{len(layers)}/{COUNT} layers" in str(plan)


@each_picked
def test_other_layers_are_kept_to_the_bit(layers: Any, getkey: Any) -> None:
    _, params, adapter, _ = make(getkey, layers)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    new = jlora.merge(half, adapter)["params"]["layers"]["self_attn"]
    for part in PARTS:
        kernel = half["params"]["layers"]["self_attn"][part]["kernel"]
        for i in range(COUNT):
            same = bool((new[part]["kernel"][i] == kernel[i]).all())
            assert same == (i not in layers)


def test_a_new_adapter_changes_nothing(getkey: Any) -> None:
    lora, params, _, x = make(getkey, [1, 3])
    adapter = lora.init(getkey(), params, x)
    assert_close(lora.apply(params, adapter, x), scanned(params, x), 1e-5)
    assert all(entry.a.any() and not entry.b.any() for entry in adapter.values())


@each_picked
def test_a_checkpoint(layers: Any, getkey: Any, tmp_path: Path) -> None:
    _, params, adapter, _ = make(getkey, layers)
    jlora.checkpoint.save(tmp_path, adapter, config=config_of(layers), base=params)
    found = jlora.checkpoint.restore(tmp_path, base=params)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    assert jlora.checkpoint.describe(tmp_path).config == config_of(layers)


@each_picked
def test_files_of_peft(layers: Any, getkey: Any, tmp_path: Path) -> None:
    """Modules of these layers alone, `layers_to_transform`, and the same back."""
    lora, params, adapter, x = make(getkey, layers)
    names = jlora.peft.names("llama")
    plan = lora.plan(params, x)
    jlora.peft.save(tmp_path, plan, adapter, config_of(layers), names)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["layers_to_transform"] == sorted(layers)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    numbers = {int(name.split(".layers.")[1].split(".")[0]) for name in tensors}
    assert numbers == set(layers)
    config, found = jlora.peft.load(tmp_path, params, names)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    assert config.layers == tuple(sorted(layers))
    again = jlora.lora(scanned, config)
    assert again.plan(params, x).trainable == plan.trainable


def test_a_file_of_all_layers_is_whole(getkey: Any, tmp_path: Path) -> None:
    lora = jlora.lora(scanned, LoraConfig("(q|v)_proj/kernel", rank=RANK))
    params, x = make_params(getkey), jnp.ones((3, WIDTH))
    adapter = lora.init(getkey(), params, x)
    names = jlora.peft.names("llama")
    jlora.peft.save(tmp_path, lora.plan(params, x), adapter, names=names)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["layers_to_transform"] is None
    config, found = jlora.peft.load(tmp_path, params, names)
    assert config.layers is None
    assert jax.tree.structure(found) == jax.tree.structure(adapter)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P(None, None, "x")], ids=str)
def test_on_a_mesh(kind: Any, spec: Any, getkey: Any) -> None:
    fn = lambda p, x: jnp.einsum("ltd,ldf->ltf", x, p["up"])
    lora = jlora.lora(fn, LoraConfig("up", rank=2, alpha=3.0, layers=[1, 3]))
    params = {"up": jax.random.normal(getkey(), (5, 4, 6))}
    x = jax.random.normal(getkey(), (5, 3, 4))
    adapter = lora.init(getkey(), params, x)
    adapter = jax.tree.map(lambda v: jax.random.normal(getkey(), v.shape), adapter)
    loss = lambda a, p, x: (lora.apply(p, a, x) ** 2).sum()
    wanted = jax.value_and_grad(loss)(adapter, params, x)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        inputs = jax.device_put(x, NamedSharding(mesh, P()))
        where = jlora.shardings(placed, adapter, mesh=mesh)
        own = jax.tree.map(jax.device_put, adapter, where)
        found = jax.jit(jax.value_and_grad(loss))(own, placed, inputs)
        new = jax.jit(lora.init)(jax.random.key(0), placed, inputs)
    jax.tree.map(lambda u, v: assert_close(u, v, 1e-5), found, wanted)
    assert jax.tree.structure(new) == jax.tree.structure(adapter)


def test_several_batch_axes_count_the_first(getkey: Any) -> None:
    params = {"up": jax.random.normal(getkey(), (3, 2, 4, 5))}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return x + jnp.einsum("etd,edf->etf", x, w).sum(-1, keepdims=True), None

        return jax.lax.scan(layer, x, params["up"])[0]

    x = jax.random.normal(getkey(), (2, 7, 4))
    lora = jlora.lora(fn, LoraConfig("up", rank=2, alpha=3.0, layers=[2]))
    adapter = lora.init(getkey(), params, x)
    assert adapter["up"].a.shape == (1, 2, 4, 2)
    adapter = jax.tree.map(lambda v: jax.random.normal(getkey(), v.shape), adapter)
    entry = adapter["up"]
    change = 1.5 * jnp.einsum("eir,ero->eio", entry.a[0], entry.b[0])
    wanted = fn({"up": params["up"].at[2].add(change)}, x)
    assert_close(lora.apply(params, adapter, x), wanted, 1e-5)


def refusal(config: LoraConfig, getkey: Any) -> str:
    with pytest.raises(TargetError) as error:
        jlora.lora(scanned, config).plan(make_params(getkey), jnp.ones((3, WIDTH)))
    return str(error.value)


def test_unknown_layers_are_named(getkey: Any) -> None:
    message = refusal(config_of([1, 5, 9]), getkey)
    assert "stack of 5 layers" in message and "[5, 9]" in message


def test_a_pattern_of_numbers_is_told_of_layers(getkey: Any) -> None:
    message = refusal(LoraConfig(r"layers/[23]/self_attn/q_proj", rank=2), getkey)
    assert "LoraConfig(layers=[...])" in message and "stack" in message
    message = refusal(LoraConfig(r"layers/\d+/self_attn/q_proj", rank=2), getkey)
    assert "LoraConfig(layers=[...])" in message or "matches none" in message


def test_what_is_no_stack() -> None:
    lora = jlora.lora(lambda p, x: x @ p["w"], LoraConfig("w", rank=2, layers=[0]))
    with pytest.raises(TargetError, match="is no stack of layers"):
        lora.plan({"w": jnp.ones((4, 6))}, jnp.ones((2, 4)))


@pytest.mark.parametrize("layers", [[], [-1], [1, 1], [1.0], 3, "0", [True]])
def test_what_are_no_layers(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"LoraConfig\.layers"):
        LoraConfig("up", layers=layers)


@pytest.mark.parametrize(
    "other",
    [{"variant": "loha"}, {"slices": [(0, 2)]}, {"full": True}, {"bias": "all"}],
)
def test_layers_alone(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers"):
        LoraConfig("up", layers=[0], **other)


def test_a_config_without_layers_is_written_as_before() -> None:
    assert "layers" not in LoraConfig("up").to_dict()
    config = LoraConfig("up", layers=range(2))
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_a_function_of_it_can_be_exported(getkey: Any) -> None:
    lora, params, adapter, x = make(getkey, [1, 3])
    exported = jax_export.export(jax.jit(lora.apply))(params, adapter, x)
    again = jax_export.deserialize(exported.serialize())
    assert_close(again.call(params, adapter, x), lora.apply(params, adapter, x), 1e-6)


def test_arrays_count_as_those_of_factors(getkey: Any) -> None:
    _, _, adapter, _ = make(getkey, [1, 3])
    labels = jlora.optim.factor_labels(adapter)
    assert {(entry.a, entry.b) for entry in labels.values()} == {("a", "b")}
