"""Trains a variant of LoRA that jlora does not have: fifteen lines, and all the rest.

Each kernel trains a small square matrix between cosines that are fixed:
`ΔW = s · C_in · core · C_outᵀ`. That is all that is written here; plans, gradients,
meshes, checkpoints and merging are jlora's. A conv net that knows upright digits learns
turned ones (see classify_images.py), its kernels cut along all devices that there are,
beside LoRA with about as many trained values. The adapter is saved, restored onto the
devices and merged. It takes less than a minute on a CPU.

    python examples/own_variant.py --devices 8 --rank 16
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import small_options
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
import jlora.checkpoint

try:
    import digits
    from classify_images import ConvNet, Model, check_merged, console
    from digits import Images
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")


@jlora.register_variant("cosine")
class CosineFactors(jlora.VariantEntry):
    """A core (*batch, rank, rank) between the first cosines of both sides."""

    core: jax.Array

    @property
    def rank(self) -> int:
        """The number of cosines on each side."""
        return self.core.shape[-1]

    @staticmethod
    def shapes(axes: Any, shape: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Says what is trained: it starts from zero, as there is no other `new`."""
        return {"core": (*(shape[i] for i in axes.batch), rank, rank)}

    def lowered(self) -> jlora.LoraFactors:
        """Gives the two factors of the same change."""
        inputs, outputs = self.axes.fans(self.kernel_shape)
        a = jnp.matmul(cosines(inputs, self.rank), self.core)
        return self.factors(a, cosines(outputs, self.rank).T)


def cosines(size: int, count: int) -> jax.Array:
    """Returns `count` orthonormal columns (size, count) of the cosine transform."""
    angles = (jnp.arange(size) + 0.5)[:, None] * jnp.arange(count)[None] / size
    columns = jnp.cos(jnp.pi * angles)
    return columns / jnp.linalg.norm(columns, axis=0, keepdims=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code."""
    parser = small_options.make_parser(__doc__, steps=150, rank=16)
    add = parser.add_argument
    add("--images", type=int, default=300, help="turned images to learn from")
    add("--devices", type=int, help="host devices, instead of accelerators")
    add("--out", type=Path, default=Path("runs/own_variant"), help="the adapter")
    args = small_options.parse(parser, argv)
    if args.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    upright, _ = digits.load()
    turned, test = map(digits.shifted, digits.load())
    few, net = Images(turned.x[: args.images], turned.y[: args.images]), ConvNet()
    shapes = jax.eval_shape(net.init, jax.random.key(0), few.x[:1])
    configs = {
        "LoRA": jlora.LoraConfig(args.target, rank=1, alpha=1),
        "cosine": jlora.LoraConfig(args.target, rank=args.rank, variant="cosine"),
    }
    loras = {name: jlora.lora(net.apply, config) for name, config in configs.items()}
    try:
        plans = {n: lora.plan(shapes, few.x[:1]) for n, lora in loras.items()}
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plans["cosine"]), markup=False)

    variables = jax.jit(net.init)(jax.random.key(0), few.x[:1])
    base = Model(net.apply, (), variables).fit("pretraining", upright, args.steps, 3e-3)
    params, before = place(base.trained), base.accuracy(test)
    table = Table("", "values trained", "right on turned images")
    table.add_row("before", "0", f"{before:.1%}")
    models = {}
    for name, lora in loras.items():
        adapter = lora.init(jax.random.key(1), params, few.x[:1])
        adapter = jax.device_put(adapter, jlora.shardings(params, adapter))
        model = Model(lora.apply, (params,), adapter)
        models[name] = model.fit(name, few, args.steps, 1e-2)
        right = f"{models[name].accuracy(test):.1%}"
        table.add_row(name, f"{plans[name].trainable:,}", right)
    console.print(table)
    restored = saved_and_restored(models["cosine"], configs["cosine"], args.out)
    is_same = bool(
        jnp.array_equal(restored.logits(test), models["cosine"].logits(test))
    )
    console.print(f"written to {args.out} and restored: the same logits, {is_same}")
    learned = restored.accuracy(test) > before
    return 0 if is_same and learned and check_merged(net, restored, test) else 1


def place(variables: Any) -> Any:
    """Cuts kernels along their output features, where all devices get as many."""
    count = jax.device_count()
    mesh = Mesh(jax.devices(), ("model",), axis_types=(AxisType.Auto,))
    console.print(f"{count} {'device' if count == 1 else 'devices'}")

    def where(leaf: jax.Array) -> NamedSharding:
        fits = leaf.ndim > 1 and leaf.shape[-1] % count == 0
        axes = (*[None] * (leaf.ndim - 1), "model") if fits else ()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.device_put(variables, jax.tree.map(where, variables))


def saved_and_restored(model: Model, config: jlora.LoraConfig, out: Path) -> Model:
    """Returns the model with its adapter as a file brings it back, on the devices."""
    (params,), adapter = model.frozen, model.trained
    jlora.checkpoint.save(out, adapter, config=config, base=params, overwrite=True)
    again = jlora.checkpoint.restore(out, like=adapter, base=params)
    return model._replace(trained=again)


if __name__ == "__main__":
    sys.exit(main())
