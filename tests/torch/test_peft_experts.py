"""Experts in PEFT's files, from and to programs that compute all of them densely."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import assert_close
from safetensors.numpy import load_file

import jlora
import jlora.peft

E, D, F, RANK, ALPHA = 3, 5, 7, 2, 6.0
NAMES = [
    ("up", "mlp.experts.up_proj", "experts"),
    ("down", "mlp.experts.down_proj", "experts"),
]
SIZES = jnp.array([4, 0, 2])


def dense(params: Any, x: jax.Array) -> jax.Array:
    """All experts for every token, summed in the second product."""
    up = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]))
    return jnp.einsum("tef,efd->td", up, params["down"])


def ragged(params: Any, x: jax.Array) -> jax.Array:
    up = jnp.tanh(lax.ragged_dot(x, params["up"], SIZES))
    return lax.ragged_dot(up, params["down"], SIZES)


def make_params() -> tuple[dict[str, jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    up = jax.random.normal(keys[0], (E, D, F))
    down = jax.random.normal(keys[1], (E, F, D))
    return {"up": up, "down": down}, jax.random.normal(keys[2], (6, D))


def make_adapter(lora: jlora.Lora, *args: Any) -> dict[str, Any]:
    fresh = lora.init(jax.random.key(1), *args)
    draw = lambda v: jax.random.normal(jax.random.key(v.size), v.shape)
    return jax.tree.map(draw, fresh)


def config(**settings: Any) -> jlora.LoraConfig:
    return jlora.LoraConfig(["up", "down"], rank=RANK, alpha=ALPHA, **settings)


def in_peft(folder: Path, depth: int, rank: int = RANK) -> np.ndarray:
    """The delta of a parameter as PEFT forms it: `(experts, in, out)`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    place = "base_model.model.mlp.experts" + ".base_layer" * depth
    a, b = (tensors[f"{place}.lora_{x}.weight"] for x in "AB")
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["r"] == rank and a.shape[0] == E * rank == b.shape[1]
    a, b = a.reshape(E, rank, -1), b.reshape(b.shape[0], rank, E)
    return said["lora_alpha"] / rank * np.einsum("ore,eri->eio", b, a)


@pytest.mark.parametrize("batch", [None, 0])
@pytest.mark.parametrize("fn", [dense, ragged])
def test_saved_experts_have_the_same_deltas(fn: Any, batch: Any, tmp_path: Path):
    params, x = make_params()
    lora = jlora.lora(fn, config(batch=batch))
    adapter, plan = make_adapter(lora, params, x), lora.plan(params, x)
    shared = adapter["up"].a.ndim, adapter["down"].b.ndim
    assert shared == ((2, 2) if fn is dense and batch is None else (3, 3))
    jlora.peft.save(tmp_path, plan, adapter, lora.configs, NAMES)
    # The last parameter is the outermost.
    for path, depth in (("down", 0), ("up", 1)):
        wanted = np.asarray(jlora.delta(adapter[path]))
        np.testing.assert_allclose(in_peft(tmp_path, depth), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("known", ["dense", "ragged", "params"])
def test_loaded_experts_are_for_both_programs(known: str, tmp_path: Path):
    params, x = make_params()
    named = {f"{k}/kernel": v for k, v in params.items()}
    rules = [(f"{path}/kernel", *rest) for path, *rest in NAMES]
    programs = {
        name: lambda p, x, fn=fn: fn({k: p[f"{k}/kernel"] for k in params}, x)
        for name, fn in (("dense", dense), ("ragged", ragged))
    }
    lora = jlora.lora(programs["dense"], jlora.LoraConfig(rank=RANK, alpha=ALPHA))
    adapter = make_adapter(lora, named, x)
    jlora.peft.save(tmp_path, lora.plan(named, x), adapter, lora.configs, rules)
    base: Any = named
    if known != "params":
        base = jlora.lora(programs[known], lora.configs).plan(named, x)
    found, loaded = jlora.peft.load(tmp_path, base, rules)
    assert isinstance(found, jlora.LoraConfig) and found.batch == (0,)
    for name, fn in programs.items():
        own = jlora.lora(fn, found)
        assert_close(
            own.apply(named, loaded, x), fn(jlora.merge(named, adapter), x), 1e-5
        )
        # A new adapter of this config is of the same kind.
        fresh = own.init(jax.random.key(2), named, x)
        assert jax.tree.structure(fresh) == jax.tree.structure(loaded), name
        assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, loaded)
        plan = own.plan(named, x)
        jlora.peft.save(tmp_path / name, plan, loaded, found, rules)
    first, again = (tmp_path / n / "adapter_model.safetensors" for n in programs)
    assert first.read_bytes() == again.read_bytes()


def test_layers_of_experts_and_parts_of_a_fused_parameter(tmp_path: Path):
    """A scanned stack; torch keeps gate and up in one parameter of each layer."""
    rules = [
        (n, f"layers.{{i}}.experts.gate_up_proj[{i}]", "experts")
        for i, n in enumerate(("gate", "up"))
    ]

    def model(params: Any, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            gate, up = (jnp.einsum("td,edf->tef", h, layer[n]) for n in ("gate", "up"))
            return jnp.tanh(gate * up).mean(1)[:, :D], None

        return lax.scan(body, x, params)[0]

    keys = jax.random.split(jax.random.key(3), 2)
    params = {
        n: jax.random.normal(k, (2, E, D, F))
        for n, k in zip(("gate", "up"), keys, strict=True)
    }
    x = make_params()[1]
    lora = jlora.lora(model, jlora.LoraConfig(rank=RANK, alpha=ALPHA))
    adapter, plan = make_adapter(lora, params, x), lora.plan(params, x)
    assert adapter["up"].axes == jlora.KernelAxes((0,), (2,), (1, 3))
    jlora.peft.save(tmp_path, plan, adapter, lora.configs, rules)
    found, loaded = jlora.peft.load(tmp_path, plan, rules)
    assert loaded["up"].axes == jlora.KernelAxes((0, 1), (2,), (3,))
    for path, entry in adapter.items():
        np.testing.assert_allclose(
            jlora.delta(loaded[path]), jlora.delta(entry), rtol=0, atol=1e-4
        )
    own = jlora.lora(model, found)
    expected = model(jlora.merge(params, adapter), x)
    assert_close(own.apply(params, loaded, x), expected, 1e-5)


def test_vllm_gets_experts_apart(tmp_path: Path):
    params, x = make_params()
    model = lambda p, x: jnp.einsum("ted,edf->tf", x, p["down"])
    x = jnp.stack([jnp.tile(x, (1, 2))[:, :F]] * E, 1)
    lora = jlora.lora(model, jlora.LoraConfig("down", rank=RANK, alpha=ALPHA))
    adapter = make_adapter(lora, params, x)
    plan, names = lora.plan(params, x), NAMES[1:]
    jlora.peft.save(tmp_path, plan, adapter, lora.configs, names, profile="vllm")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    for e in range(E):
        place = f"base_model.model.mlp.experts.{e}.down_proj.lora_"
        found = tensors[f"{place}B.weight"] @ tensors[f"{place}A.weight"]
        wanted = jlora.delta(adapter["down"])[e].T
        found = said["lora_alpha"] / said["r"] * found
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_a_parameter_of_one_expert_is_packed_like_others(n: int, tmp_path: Path):
    draw = np.random.default_rng(0).normal
    axes = jlora.KernelAxes((0,), (1,), (2,))
    a, b = (jnp.asarray(draw(size=(n, *s)), "float32") for s in [(D, RANK), (RANK, F)])
    factors = jlora.LoraFactors(a, b, axes, ALPHA / RANK)
    params = {"experts": {"kernel": jnp.ones((n, D, F))}}
    names = [("experts", "mlp.experts.up_proj", "experts+fan_in_fan_out")]
    jlora.peft.save(tmp_path, params, {"experts/kernel": factors}, (), names)
    _, found = jlora.peft.load(tmp_path, params, names)
    deltas = jlora.delta(found["experts/kernel"]), jlora.delta(factors)
    np.testing.assert_allclose(*deltas, rtol=1e-6)


def test_weights_of_experts_with_the_plan_of_a_dense_program():
    params, x = make_params()
    plan = jlora.lora(dense, config()).plan(params, x)
    torch = {
        f"mlp.experts.{n}_proj": np.asarray(params[n]).transpose(0, 2, 1)
        for n in params
    }
    found = jlora.peft.params_from_torch(torch, plan, NAMES)
    assert_close(found, params, 0.0)
    back = jlora.peft.params_to_torch(params, NAMES, plan=plan)
    assert_close(back, torch, 0.0)


def test_an_axis_of_experts_in_doubt_is_told(tmp_path: Path):
    """The first axis is the input, so that it counts no experts."""
    params = {"up": make_params()[0]["up"].transpose(1, 0, 2)}
    x, model = make_params()[1], lambda p, x: jnp.einsum("td,def->tef", x, p["up"])
    lora = jlora.lora(model, jlora.LoraConfig("up", rank=RANK, alpha=ALPHA))
    adapter, plan = make_adapter(lora, params, x), lora.plan(params, x)
    names = NAMES[:1]
    with pytest.raises(jlora.AdapterError, match=r"'up'.*axis 0.*LoraConfig\(batch"):
        jlora.peft.save(tmp_path, plan, adapter, lora.configs, names)
    own = jlora.lora(model, jlora.LoraConfig("up", rank=RANK, alpha=ALPHA, batch=1))
    adapter, plan = make_adapter(own, params, x), own.plan(params, x)
    jlora.peft.save(tmp_path, plan, adapter, own.configs, names)
    found, loaded = jlora.peft.load(tmp_path, plan, names)
    assert isinstance(found, jlora.LoraConfig) and found.batch == (1,)
    np.testing.assert_array_equal(loaded["up"].b, adapter["up"].b)
