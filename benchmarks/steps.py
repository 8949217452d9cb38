"""The training steps that are compared, over the plain models of `models.py`.

Each is `step(trained, state, params, batch) -> (trained, state, params, batch)`: what a
user would jit, AdamW included, with what is trained and its state donated. All low-rank
steps start from the same factors, with `b` not zero.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from cases import PORTABLE
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import Layer, Linears, Params, plain
from placing import inside, whole_along_rows
from timing import Contender

import jlora
from jlora._product.gpu_probe import fault

RANK, ALPHA = 16, 32.0
SCALING = ALPHA / RANK
OPTIMIZER = optax.adamw(1e-4)
SPREAD = "jlora, spread"  # on a mesh, with its factors in parts
GATHERED = "jlora, gathered"  # on a mesh, its factors gathered once a step


def adapter_of(
    lora: jlora.Lora, params: Params, batch: Any, seed: int = 2, **options: Any
) -> jlora.Adapter:
    """Returns an adapter whose every factor has random values.

    Beside params on a mesh it is laid out by `jlora.shardings`, to which options go.
    """
    adapter = lora.init(jax.random.key(seed), params, batch)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    draw = lambda k, leaf: leaf + 0.01 * jax.random.normal(k, leaf.shape, leaf.dtype)
    adapter = treedef.unflatten(list(map(draw, keys, leaves)))
    if not on_a_mesh(params):
        return adapter
    return jax.device_put(adapter, jlora.shardings(params, adapter, **options))


def on_a_mesh(tree: Any) -> bool:
    """Returns whether arrays lie on several devices."""
    return any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(tree))


def lora_of(
    model: Any,
    rank: int = RANK,
    fn: Callable[..., Any] | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> jlora.Lora:
    """Returns the model's loss, or `fn`, with every linear of its layers adapted.

    Options are those of `jlora.lora`.
    """
    target = f"layers/(.*/)?({'|'.join(model.kernels)})"
    config = jlora.LoraConfig(target, rank=rank, alpha=rank * SCALING, dtype=dtype)
    return jlora.lora(model.loss if fn is None else fn, config, **options)


def as_layers(adapter: jlora.Adapter, params: Params) -> Params:
    """Returns the params with `NAME_a` and `NAME_b` beside each adapted kernel."""
    layers = params["layers"]
    stacked = isinstance(layers, Mapping)
    new = dict(layers) if stacked else [dict(layer) for layer in layers]
    for path, factors in adapter.items():
        *place, name = path.split("/")[1:]
        layer = new if stacked else new[int(place[0])]
        layer[f"{name}_a"], layer[f"{name}_b"] = factors.a, factors.b
    return {**params, "layers": new}


def factored(x: jax.Array, layer: Layer, names: Sequence[str]) -> list[jax.Array]:
    """`x·W + (s·x·a)·b`, the backward left to JAX: what everybody writes by hand."""
    outputs = []
    for name in names:
        a, b = layer[f"{name}_a"].astype(x.dtype), layer[f"{name}_b"].astype(x.dtype)
        outputs.append(x @ layer[name] + (SCALING * (x @ a)) @ b)
    return outputs


def merged(x: jax.Array, layer: Layer, names: Sequence[str]) -> list[jax.Array]:
    """`x·(W + s·a·b)` under autodiff: the kernel is formed at each step."""
    outputs = []
    for name in names:
        kernel = layer[name]
        delta = SCALING * (layer[f"{name}_a"] @ layer[f"{name}_b"])
        outputs.append(x @ (kernel + delta.astype(kernel.dtype)))
    return outputs


def trained_step(loss: Callable[..., jax.Array]) -> Callable[..., tuple[Any, ...]]:
    """Returns the AdamW step of `loss(trained, params, batch)`."""

    def step(trained: Any, state: Any, params: Params, batch: Any) -> tuple[Any, ...]:
        _, gradients = jax.value_and_grad(loss)(trained, params, batch)
        updates, state = OPTIMIZER.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, params, batch

    return step


def frozen_step(model: Any, mesh: Mesh | None = None) -> Callable[..., tuple[Any, ...]]:
    """Returns the limit: forward, and backward to the inputs of the first layer.

    With a mesh, inside of a `shard_map` over it.
    """
    loss = lambda inputs, params, batch: model.loss(params, batch, inputs)
    loss = inside(mesh, loss, of_rows=True)

    def step(out: Any, params: Params, batch: jax.Array) -> tuple[Any, ...]:
        inputs = model.embed(params, batch)
        return jax.value_and_grad(loss)(inputs, params, batch), params, batch

    return step


def low_rank_losses(model: Any) -> dict[str, Callable[..., jax.Array]]:
    """Returns the losses over an adapter: jlora's and those written by hand.

    Where its kernel runs, on Hopper GPUs, also jlora's with `contraction="factored"`,
    which does without. (`fused.py` compares their values.)
    """

    def ours(**options: Any) -> Callable[..., jax.Array]:
        lora = lora_of(model, **options)
        return lambda adapter, params, batch: lora.apply(params, adapter, batch)

    def by_hand(linears: Linears) -> Callable[..., jax.Array]:
        return lambda adapter, params, batch: model.loss(
            as_layers(adapter, params), batch, linears=linears
        )

    portable = {PORTABLE: ours(contraction="factored")} if fault() is None else {}
    return {
        "jlora": ours(),
        **portable,
        "factored, autodiff": by_hand(factored),
        "merged at apply": by_hand(merged),
    }


def compiled(step: Callable[..., Any], state: Sequence[Any], donated: int) -> Any:
    """Returns a step compiled for its state, of which the first few are donated.

    Only these are returned: an executable copies what it hands through, so that each
    run would write the frozen params once more.
    """
    # What comes out is what goes in next.
    out = where(tuple(state[:donated])) if on_a_mesh(state) else None
    return jitted(step, donated, out).lower(*state).compile()


def jitted(step: Callable[..., Any], donated: int, out: Any = None) -> Any:
    """Returns a step that gives back what it is donated, at these places if any."""
    changed = lambda *state: step(*state)[:donated]
    return jax.jit(changed, donate_argnums=tuple(range(donated)), out_shardings=out)


def where(tree: Any) -> Any:
    """Returns the sharding of each array."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def contenders(model: Any, params: Params, batch: jax.Array) -> dict[str, Contender]:
    """Returns the steps that need no other library, compiled."""
    return {name: make() for name, make in makers(model, params, batch).items()}


def makers(
    model: Any, params: Params, batch: jax.Array, mesh: Mesh | None = None
) -> dict[str, Callable[[], Contender]]:
    """Returns what makes each contender: of a large model, not all fit at once.

    With a mesh, the losses are computed inside of a `shard_map` over it.
    """

    def frozen() -> Contender:
        step = frozen_step(model, mesh)
        state = (jax.jit(step)(0.0, params, batch)[0], params, batch)
        return Contender("frozen limit", compiled(step, state, 1), state)

    def full() -> Contender:
        own = jax.tree.map(jnp.copy, params)
        loss = lambda trained, _, batch: model.loss(trained, batch, linears=plain)
        return contender("full fine-tuning", loss, own, None, batch, mesh)

    def low_rank(
        name: str, loss: Callable[..., jax.Array], **options: Any
    ) -> Contender:
        adapter = adapter_of(lora_of(model), params, batch, **options)
        return contender(name, loss, adapter, params, batch, mesh)

    def gathered() -> Contender:
        adapter, loss = adapter_of(lora_of(model), params, batch), losses["jlora"]
        places = whole_along_rows(where(adapter))
        at_use = lambda value: jax.lax.with_sharding_constraint(value, places)
        first = lambda adapter, *rest: loss(at_use(adapter), *rest)
        return contender(GATHERED, first, adapter, params, batch)

    made = {"frozen limit": frozen}
    losses = low_rank_losses(model)
    for name, loss in losses.items():
        made[name] = functools.partial(low_rank, name, loss)
    if on_a_mesh(params) and mesh is None:
        made[SPREAD] = functools.partial(low_rank, SPREAD, losses["jlora"], spread=True)
        if "fsdp" in jax.tree.leaves(params)[0].sharding.mesh.shape:
            made[GATHERED] = gathered
    return made | {"full fine-tuning": full}


def contender(
    name: str,
    loss: Callable[..., jax.Array],
    trained: Any,
    params: Any,
    batch: Any,
    mesh: Mesh | None = None,
) -> Contender:
    """Returns the AdamW step of `loss(trained, params, batch)`, compiled.

    With a mesh, of that loss inside of a `shard_map` over it.
    """
    step = trained_step(inside(mesh, loss))
    state = (trained, started(trained), params, batch)
    return Contender(name, compiled(step, state, 2), state)


def started(trained: Any) -> Any:
    """Returns the first state of the optimizer: its moments are where factors are."""
    state = OPTIMIZER.init(trained)
    if not on_a_mesh(trained):
        return state
    everywhere = NamedSharding(jax.tree.leaves(trained)[0].sharding.mesh, P())
    place = lambda leaf: leaf if on_a_mesh(leaf) else jax.device_put(leaf, everywhere)
    return jax.tree.map(place, state)
