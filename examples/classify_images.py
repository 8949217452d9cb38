"""Adapts an image classifier, its convolutions too, and compares it with fine-tuning.

The images are scikit-learn's handwritten digits. A Flax conv net learns them as they
are; then it is given a few that are turned by 90 degrees and inverted. It learns those
with LoRA, and for comparison with all weights, in as many steps. The table says how
often each is right on held-out images, turned or not. It takes less than a minute.

    python examples/classify_images.py --steps 50 --rank 2 --target "convs_.*/kernel"
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_options

import jlora

try:
    import digits
    from digits import Images
    from progress import reporting
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

BATCH = 64
console = Console(soft_wrap=True, highlight=False)


class ConvNet(nn.Module):
    """Two convolutions, the later one with a stride, and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (features, stride) in enumerate([(16, 1), (32, 2)]):
            x = nn.Conv(features, (3, 3), stride, name=f"convs_{i}")(x)
            x = nn.gelu(nn.GroupNorm(8, name=f"norms_{i}")(x))
        x = nn.gelu(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


class Model(NamedTuple):
    """What is trained, and the function that takes it after what is frozen."""

    apply: Callable[..., jax.Array]
    frozen: tuple[Any, ...]
    trained: Any

    def logits(self, images: Images) -> jax.Array:
        """Returns the logits of images."""
        return jax.jit(self.apply)(*self.frozen, self.trained, images.x)

    def accuracy(self, images: Images) -> float:
        """Returns the share of images that it is right about."""
        return float((self.logits(images).argmax(axis=1) == images.y).mean())

    def fit(self, name: str, images: Images, steps: int, rate: float) -> "Model":
        """Returns the model after some steps of AdamW."""
        tx = optax.adamw(optax.cosine_decay_schedule(rate, steps))

        def loss(trained: Any, frozen: Any, x: Any, y: Any) -> jax.Array:
            logits = self.apply(*frozen, trained, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        @jax.jit  # what is frozen is an argument, not a constant that is compiled in
        def step(trained: Any, state: Any, frozen: Any, x: Any, y: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(trained, frozen, x, y)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

        trained, state, random = (
            self.trained,
            tx.init(self.trained),
            np.random.default_rng(0),
        )
        with reporting(name, steps, "images", console) as report:
            for _ in range(steps):
                rows = random.integers(len(images.y), size=BATCH)
                batch = images.x[rows], images.y[rows]
                trained, state, value = step(trained, state, self.frozen, *batch)
                report(float(value), BATCH)
        return self._replace(trained=trained)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code."""
    parser = small_options.make_parser(__doc__, steps=200, rank=4)
    add = parser.add_argument
    add("--images", type=int, default=300, help="turned images to learn from")
    args = small_options.parse(parser, argv)
    upright, upright_test = digits.load()
    turned, test = digits.shifted(upright), digits.shifted(upright_test)
    few = Images(turned.x[: args.images], turned.y[: args.images])
    net, example = ConvNet(), few.x[:1]
    variables = net.init(jax.random.key(0), example)
    try:
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        lora = jlora.lora(net.apply, config)
        plan = lora.plan(variables, example)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plan), markup=False)

    base = Model(net.apply, (), variables)
    base = base.fit("pretraining", upright, args.steps, 3e-3)
    console.print(f"right on upright images: {base.accuracy(upright_test):.1%}")
    adapter = lora.init(jax.random.key(1), base.trained, example)
    adapted = Model(lora.apply, (base.trained,), adapter)
    adapted = adapted.fit("LoRA", few, args.steps, 1e-2)
    full = base.fit("full fine-tuning", few, args.steps, 3e-3)
    before, after = base.accuracy(test), adapted.accuracy(test)
    table = Table("", "weights trained", "right on turned images")
    table.add_row("before", "0", f"{before:.1%}")
    table.add_row("LoRA", f"{plan.trainable:,}", f"{after:.1%}")
    table.add_row("full fine-tuning", f"{plan.total:,}", f"{full.accuracy(test):.1%}")
    console.print(table)
    return 0 if check_merged(net, adapted, test) and after > before else 1


def check_merged(net: ConvNet, adapted: Model, images: Images) -> bool:
    """Merges the adapter and returns whether the predictions stay the same."""
    variables = jlora.merge(*adapted.frozen, adapted.trained)
    found, expected = (
        Model(net.apply, (), variables).logits(images),
        adapted.logits(images),
    )
    off = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
    same = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    console.print(
        f"merged: logits off by {off:.1e}, {same:.1%} of predictions the same"
    )
    return off < 1e-4 and same > 0.99


if __name__ == "__main__":
    sys.exit(main())
