"""QLoRA beside LoRA: the same adapter on a base in float32 and on one in nf4.

The base is SmolLM2-135M-Instruct and the data the prompts and replies of
finetune_chat.py, both from PyPI (requirements-finetune.txt). Both runs take the same
steps on the same batches from the same factors. The script prints the plan of the
quantised base, and of each run the held-out loss, the bytes of the base and the bytes
that a gradient needs besides its arguments. On a CPU it takes about two minutes.

    python examples/qlora.py --steps 8 --kind int8 --tile 64
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora

try:
    import chat_data
    import parsing
    import pretrained
    import training
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

console = Console(soft_wrap=True, highlight=False)


class Result(NamedTuple):
    """What one run gives: held-out losses, and bytes of its base and of a gradient."""

    before: float
    after: float
    base: int
    temporaries: int

    def cells(self) -> tuple[str, ...]:
        """Returns the values as a row of the table."""
        losses = f"{self.before:.3f}", f"{self.after:.3f}"
        return (*losses, f"{self.base:,}", f"{self.temporaries:,}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=12, help="training steps of each run")
    add("--kind", choices=("nf4", "int8", "int4", "fp8"), default="nf4", help="stored")
    add("--tile", type=int, default=64, help="weights that share a scale")
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--rows", type=int, default=2, help="rows of a training batch")
    add("--length", type=int, default=64, help="tokens of a row")
    add("--held-out", type=int, default=32, help="pairs to measure the loss on")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="seed of split, order and factors")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    args = parser.parse_args(argv)
    parsing.at_least_one(
        parser, args, "steps", "tile", "rank", "rows", "length", "held_out"
    )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    example = jnp.zeros((1, 8), jnp.int32)
    try:
        base = pretrained.load(args.model)
        sides = chat_data.load_examples(base.tokenizer, args.seed, args.length)
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        lora = jlora.lora(base.model.apply, config)
        plan = lora.plan(base.variables, example)
        stored = jlora.quantize(base.variables, plan, args.kind, tile=args.tile)
        plan = lora.plan(stored, example)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plan), markup=False)
    table = Table("base", "loss before", "after", "bytes of the base", "temporaries")
    results = []
    for name, variables in (("float32", base.variables), (args.kind, stored)):
        console.print(f"training on {name}", markup=False)
        adapter = lora.init(jax.random.key(args.seed), base.variables, example)
        on = dataclasses.replace(base, variables=variables)
        results.append(run(lora.apply, on, adapter, sides, args))
        table.add_row(name, *results[-1].cells())
    console.print(table)
    plain, quantised = results
    console.print(
        f"held-out loss, {args.kind} by float32: {quantised.after / plain.after:.3f}"
    )
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0 if quantised.after < quantised.before else 1


def run(
    apply: Callable[..., Any],
    base: pretrained.Pretrained,
    adapter: Any,
    sides: tuple[list[chat_data.Example], list[chat_data.Example]],
    args: argparse.Namespace,
) -> Result:
    """Trains the adapter on a base and returns what the table shows."""
    train, held_out = sides[0], sides[1][: args.held_out]
    loss = training.make_loss(apply)
    held_out_loss = training.make_held_out_loss(loss, base, held_out)
    data = (train, args.seed, args.rows, args.length)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    inputs = adapter, base.variables, next(chat_data.training_batches(*data))
    memory = gradient.lower(*inputs).compile().memory_analysis()
    before = held_out_loss(adapter)
    batches = chat_data.training_batches(*data)
    adapter = training.fit(
        loss, adapter, base.variables, batches, args.steps, args.lr, console
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base.variables))
    return Result(before, held_out_loss(adapter), size, memory.temp_size_in_bytes)


if __name__ == "__main__":
    sys.exit(main())
