"""Adapts a function of a plain dict: JAX and optax, no Flax.

The images are scikit-learn's handwritten digits. The MLP learns them as they are; then
an adapter, beside the frozen params, learns them mirrored. It takes a few seconds.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora

try:
    from progress import reporting
    from rich.console import Console
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200, help="of both trainings")
steps = parser.parse_args().steps
if steps < 1:
    parser.error(f"--steps must be at least 1, got {steps}")
console = Console(soft_wrap=True, highlight=False)


def dense(seed: int, n: int, m: int) -> dict[str, jax.Array]:
    kernel = jax.nn.initializers.lecun_normal()(jax.random.key(seed), (n, m))
    return {"kernel": kernel, "bias": jnp.zeros((1, m))}


def mlp(params: Any, x: jax.Array) -> jax.Array:
    apply = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    return apply("head", jax.nn.gelu(apply("middle", jax.nn.gelu(apply("first", x)))))


def train(name: str, apply: Any, frozen: Any, trained: Any, x: Any, y: Any) -> Any:
    def loss(trained: Any, frozen: Any, x: Any, y: Any) -> jax.Array:
        logits = apply(*frozen, trained, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit  # what is frozen is an argument, not a constant that is compiled in
    def step(trained: Any, state: Any, frozen: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, frozen, x, y)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    tx = optax.adam(3e-3)
    state = tx.init(trained)
    with reporting(name, steps, "images", console) as report:
        for _ in range(steps):
            trained, state, value = step(trained, state, frozen, x, y)
            report(float(value), len(y))
    return trained


x, labels = load_digits(return_X_y=True)
x = (x / 16).astype("float32")
flipped = x.reshape(-1, 8, 8)[:, :, ::-1].reshape(x.shape)
x, _, new, test, y, wanted = train_test_split(x, flipped, labels, random_state=0)
params = {"first": dense(0, 64, 128), "middle": dense(1, 128, 128)}
params = train("upright", mlp, (), params | {"head": dense(2, 128, 10)}, x, y)

lora = jlora.lora(mlp, jlora.LoraConfig("kernel", rank=8))
console.print(str(lora.plan(params, new)), markup=False)
adapter = lora.init(jax.random.key(3), params, new)
adapter = train("mirrored", lora.apply, (params,), adapter, new, y)
merged = jlora.merge(params, adapter)  # a plain dict again, for the plain `mlp`

logits = [mlp(params, test), lora.apply(params, adapter, test), mlp(merged, test)]
for name, found in zip(("before", "adapted", "merged"), logits, strict=True):
    console.print(f"{name}: {(found.argmax(axis=1) == wanted).mean():.1%} right")
