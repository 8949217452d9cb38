"""Trains LoRA, a prefix and bottleneck layers together on a CPU, in about a minute.

The frozen base is SmolLM2-135M-Instruct and the data prompts and replies, both from
PyPI (requirements-finetune.txt). Each method is a tree of its own beside the base; a
step takes one gradient of all of them, for one optimizer. The script prints how many
values are trained and the held-out loss before and after, with `--alone` for each
method on its own too, and exits with 2 if something is missing.

    python examples/prefix_tuning.py --steps 12 --prefix 4 --width 16 --alone
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jlora

try:
    import chat_data
    import pretrained
    import together
    import training
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

# The prefix begins as what the model makes of these words.
WORDS = "<|im_start|>system\nYou are a friendly companion. You chat in short sentences."
METHODS = ("lora", "prompt", "bottleneck")
console = Console(soft_wrap=True, highlight=False)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=20, help="training steps of each run")
    add("--rank", type=int, default=4, help="rank of the factors")
    add("--prefix", type=int, default=8, help="positions of the prefix")
    add("--width", type=int, default=8, help="width of the bottlenecks")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--rows", type=int, default=2, help="rows of a training batch")
    add("--length", type=int, default=64, help="tokens of a row")
    add("--held-out", type=int, default=32, help="pairs to measure the loss on")
    add("--seed", type=int, default=0, help="seed of split, order and new values")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--alone", action="store_true", help="train each method on its own too")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    args = parser.parse_args(argv)
    for name in ("steps", "rank", "prefix", "width", "rows", "length", "held_out"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole story and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    try:
        base = pretrained.load(args.model)
        data = chat_data.load_examples(base.tokenizer, args.seed, args.length)
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        lora = jlora.lora(together.with_bottlenecks(base.model.apply), config)
        new = start(lora, base, args)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    table = Table("trained", "values", "held-out loss before", "after")
    for names in (*((name,) for name in METHODS), METHODS):
        some = {name: new[name] for name in names}
        wanted = args.alone or names == METHODS
        losses = train(lora, base, data, some, args)[:2] if wanted else ()
        values = f"{sum(v.size for v in jax.tree.leaves(some)):,}"
        table.add_row(" + ".join(names), values, *(f"{v:.3f}" for v in losses))
    frozen = sum(v.size for v in jax.tree.leaves(base.variables))
    table.caption = f"beside {frozen:,} frozen values"
    console.print(table)
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0


def start(
    lora: jlora.Lora, base: pretrained.Pretrained, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns the new trees of all methods."""
    one, two = jax.random.split(jax.random.key(args.seed))
    example = jnp.zeros((1, 8), jnp.int32)
    return {
        "lora": lora.init(one, base.variables, {}, example),
        "prompt": together.new_prompt(base, WORDS, args.prefix),
        "bottleneck": together.new_bottleneck(two, base.model.config, args.width),
    }


def train(
    lora: jlora.Lora,
    base: pretrained.Pretrained,
    data: tuple[list[chat_data.Example], list[chat_data.Example]],
    new: dict[str, Any],
    args: argparse.Namespace,
) -> tuple[float, float, dict[str, Any]]:
    """Returns the held-out loss before and after, and what was trained."""
    console.print(f"training {' + '.join(new)}", markup=False)
    loss = training.make_loss(together.make_apply(lora, base.model.config))
    held_out_loss = training.make_held_out_loss(loss, base, data[1][: args.held_out])
    batches = chat_data.training_batches(data[0], args.seed, args.rows, args.length)
    before = held_out_loss(new)
    trained = jax.tree.map(jnp.copy, new)  # each step donates what it was given
    trained = training.fit(
        loss, trained, base.variables, batches, args.steps, args.lr, console
    )
    return before, held_out_loss(trained), trained


if __name__ == "__main__":
    sys.exit(main())
