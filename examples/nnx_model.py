"""Adapts a Flax NNX language model, saves the adapter, and merges it into the model.

The model reads characters. It learns the prose of Python's own documentation, then,
with an adapter, the source of Python's own modules: nothing is downloaded. The loss is
that of a module which is held out. It takes about a minute.

    python examples/nnx_model.py --steps 50 --rank 2 --target "attention/.*/kernel"
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import python_text
import small_options
from flax import nnx
from python_text import CHARACTERS, batches

import jlora
import jlora.checkpoint
import jlora.nnx

try:
    from progress import reporting
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

WIDTH, LENGTH, ROWS = 64, 64, 16
console = Console(soft_wrap=True, highlight=False)


class Block(nnx.Module):
    """Attention and an MLP, each with dropout before the sum."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.drop(self.attention(self.norms[0](x), mask=mask))
        return x + self.drop(self.down(nnx.gelu(self.up(self.norms[1](x)))))


class Reader(nnx.Module):
    """A transformer that predicts the next character of a text."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.characters = nnx.Embed(CHARACTERS, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, CHARACTERS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, mask = self.characters(tokens) + self.positions(at), nnx.make_causal_mask(at)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def cross_entropy(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the loss per character."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def pretrain(model: Reader, rows: jax.Array, steps: int) -> None:
    """Trains all weights of the model in place, as usual with NNX."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Reader, optimizer: nnx.Optimizer, rows: jax.Array) -> jax.Array:
        loss = lambda model: cross_entropy(model(rows[:, :-1]), rows)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    with reporting("pretraining", steps, "characters", console) as report:
        for batch in batches(rows, ROWS, steps, seed=0):
            report(float(step(model, optimizer, batch)), ROWS * LENGTH)


def adapt(wrapped: jlora.nnx.Wrapped, rows: jax.Array, steps: int) -> tuple[Any, Any]:
    """Returns adapter and rest after some steps; keys of dropout move on in `rest`."""
    lora, params, adapter, rest = wrapped
    tx = optax.adam(1e-2)

    @jax.jit  # the params are an argument, not a constant that is compiled in
    def step(adapter: Any, state: Any, rest: Any, params: Any, rows: Any) -> Any:
        def loss(adapter: Any) -> tuple[jax.Array, Any]:
            logits, moved_on = lora.apply(params, adapter, rest, rows[:, :-1])
            return cross_entropy(logits, rows), moved_on

        (value, rest_), grads = jax.value_and_grad(loss, has_aux=True)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, rest_, value

    state = tx.init(adapter)
    with reporting("adapting", steps, "characters", console) as report:
        for batch in batches(rows, ROWS, steps, seed=1):
            adapter, state, rest, value = step(adapter, state, rest, params, batch)
            report(float(value), ROWS * LENGTH)
    return adapter, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole story and returns the exit code."""
    parser = small_options.make_parser(__doc__, steps=300, rank=8)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/nnx_model"), help="for the adapter")
    args, texts = small_options.parse(parser, argv), python_text.load(LENGTH)
    model, tokens = Reader(nnx.Rngs(0)), texts.held_out[:, :-1]
    _, params, rest = jlora.nnx.split(model)
    try:
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        plan = jlora.nnx.lora(model, config).plan(params, rest, tokens)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plan), markup=False)
    pretrain(model, texts.prose, args.steps)
    wrapped = jlora.nnx.wrap(model, config, tokens)
    adapter, rest = adapt(wrapped, texts.code, args.steps)
    known = {"config": config, "base": wrapped.params}
    jlora.checkpoint.save(args.out, adapter, **known, overwrite=True)
    restored = jlora.checkpoint.restore(args.out, base=wrapped.params)
    console.print(f"adapter written to {args.out} and read again")

    tuned = jlora.nnx.merge_into(model, restored, rest)
    model.eval(), tuned.eval()  # without dropout
    lora = jlora.nnx.lora(model, config)
    adapted, _ = jax.jit(lora.apply)(wrapped.params, adapter, rest, tokens)
    logits = {"before": model(tokens), "adapted": adapted, "merged": tuned(tokens)}
    losses = [float(cross_entropy(v, texts.held_out)) for v in logits.values()]
    for name, loss in zip(logits, losses, strict=True):
        console.print(f"held-out loss, {name}: {loss:.3f}")
    before, after, merged = losses
    return 0 if after < before and abs(merged - after) < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
