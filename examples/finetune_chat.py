"""Gives a small chat model a new tone on a CPU, with LoRA, in about two minutes.

The frozen base is SmolLM2-135M-Instruct and the data a thousand prompts and replies,
both from PyPI (requirements-finetune.txt). The script prints the plan, trains, compares
held-out loss and replies before and after, saves the adapter and reloads it, and merges
it into the base. It exits with 1 if a check fails and with 2 if something is missing.

    python examples/finetune_chat.py --steps 20 --rank 4 --target "(q|v)_proj"
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import jlora

try:
    import chat_data
    import generation
    import pretrained
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

ROWS = 4  # of packed pairs in a batch, about 500 tokens
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
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=45, help="training steps")
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--seed", type=int, default=0, help="seed of split, order and factors")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--out", type=Path, default=Path("runs/finetune_chat"), help="for the adapter")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    args = parser.parse_args(argv)
    if min(args.steps, args.rank) < 1:
        parser.error("--steps and --rank must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole story and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    example = jnp.zeros((1, 8), jnp.int32)
    try:
        base = pretrained.load(args.model)
        train, held_out = chat_data.load_examples(base.tokenizer, args.seed)
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        lora = jlora.lora(base.model.apply, config)
        plan = lora.plan(base.variables, example)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plan), markup=False)
    console.print(f"{len(train)} pairs to train on, {len(held_out)} held out")
    adapter = lora.init(jax.random.key(args.seed), base.variables, example)

    loss = make_loss(lora.apply)
    held_out_loss = make_held_out_loss(loss, base, held_out)
    answer = make_answer(lora.apply, base)
    before = held_out_loss(adapter), answer(adapter)
    console.print(f"held-out loss before: {before[0]:.3f}")
    batches = chat_data.training_batches(train, ROWS, args.seed)
    adapter = fit(loss, adapter, base.variables, batches, args.steps, args.lr)
    after = held_out_loss(adapter), answer(adapter)
    console.print(f"held-out loss after:  {after[0]:.3f}")
    for prompt, old, new in zip(PROMPTS, before[1], after[1], strict=True):
        text = f"\n> {prompt}\n  before: {old}\n  after:  {new}"
        console.print(text, markup=False)

    passed = check(lora, base, config, adapter, held_out, args.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_gb = peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, KiB here
    wall = time.perf_counter() - began
    console.print(f"\nwall time {wall:.0f} s, peak memory {peak_gb:.1f} GB")
    return 0 if passed else 1


def make_loss(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns `loss(adapter, variables, batch)`: per reply token, and their number."""

    def loss(
        adapter: Any, variables: Any, batch: chat_data.Batch
    ) -> tuple[jax.Array, jax.Array]:
        mask = packed_mask(batch.segments)
        logits = apply(variables, adapter, batch.tokens, mask=mask, at=batch.at)
        wanted = batch.targets != chat_data.IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), jnp.where(wanted, batch.targets, 0)
        )
        count = jnp.sum(wanted)
        return jnp.sum(losses * wanted) / jnp.maximum(count, 1), count

    return loss


def packed_mask(segments: jax.Array) -> jax.Array:
    """Returns the mask (batch, time, keys) under which pairs don't see each other."""
    time = segments.shape[1]
    causal = jnp.tril(jnp.ones((1, time, time), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def make_held_out_loss(
    loss: Callable[..., Any],
    base: pretrained.Pretrained,
    examples: Sequence[chat_data.Example],
) -> Callable[[Any], float]:
    """Returns a function from an adapter to the loss per held-out reply token."""
    evaluate = jax.jit(loss)
    batches = chat_data.all_batches(examples, ROWS)

    def held_out_loss(adapter: Any) -> float:
        found = [evaluate(adapter, base.variables, batch) for batch in batches]
        return float(sum(v * n for v, n in found) / sum(n for _, n in found))

    return held_out_loss


def make_answer(
    apply: Callable[..., Any], base: pretrained.Pretrained
) -> Callable[[Any], list[str]]:
    """Returns a function from an adapter to the replies to `PROMPTS`."""
    stop = base.tokenizer.token_to_id("<|im_end|>")
    generate = generation.make_generate(apply, base.model.config, stop=stop, length=32)
    prompts = [chat_data.chat_prompt(text) for text in PROMPTS]

    def answer(adapter: Any) -> list[str]:
        weights = (base.variables, adapter)
        return generation.replies(generate, weights, base.tokenizer, prompts)

    return answer


def fit(
    loss: Callable[..., Any],
    adapter: Any,
    variables: Any,
    batches: Iterator[chat_data.Batch],
    steps: int,
    lr: float,
) -> Any:
    """Returns the adapter after `steps` steps of AdamW, with a progress bar."""
    schedule = optax.warmup_cosine_decay_schedule(
        lr / 10, lr, warmup_steps=steps // 10, decay_steps=steps, end_value=lr / 10
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    # The base is an argument, not a constant; what is trained is donated.
    @jax.jit(donate_argnums=(0, 1))
    def step(adapter: Any, state: Any, variables: Any, batch: Any) -> Any:
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, _), grads = grad(adapter, variables, batch)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = tx.init(adapter)
    with progress_bar() as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"), speed=0.0)
        for _ in range(steps):
            began, batch = time.perf_counter(), next(batches)
            adapter, state, value = step(adapter, state, variables, batch)
            value = float(value)  # waits for the step
            speed = (batch.segments > 0).sum() / (time.perf_counter() - began)
            bar.update(task, advance=1, loss=value, speed=speed)
    return adapter


def progress_bar() -> Progress:
    """Returns a progress bar with the loss and the speed."""
    return Progress(
        TextColumn("{task.description} {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        console=console,
    )


def check(
    lora: jlora.Lora,
    base: pretrained.Pretrained,
    config: jlora.LoraConfig,
    adapter: Any,
    examples: Sequence[chat_data.Example],
    out: Path,
) -> bool:
    """Saves, reloads and merges the adapter; returns whether the logits agree."""
    batch = chat_data.all_batches(examples[: 2 * ROWS], ROWS)[0]
    adapted, plain = jax.jit(lora.apply), jax.jit(base.model.apply)
    save(out, adapter, config)
    reloaded = restore(out, adapter)
    expected = adapted(base.variables, adapter, batch.tokens)
    found = {
        "reloaded": (adapted(base.variables, reloaded, batch.tokens), 0.0),
        "merged": (plain(jlora.merge(base.variables, adapter), batch.tokens), 1e-4),
    }
    console.print(f"\nadapter written to {out}")
    passed = True
    for name, (logits, limit) in found.items():
        off = float(jnp.max(jnp.abs(logits - expected)) / jnp.max(jnp.abs(expected)))
        passed &= off <= limit
        verdict = "ok" if off <= limit else "FAILED"
        console.print(f"{name}: logits off by {off:.1e} (limit {limit:.0e}): {verdict}")
    return passed


def save(out: Path, adapter: Any, config: jlora.LoraConfig) -> None:
    """Writes the adapter with Orbax, and its config beside it as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out.absolute() / "adapter", adapter, force=True)


def restore(out: Path, like: Any) -> Any:
    """Returns the adapter that `save` wrote, with the structure of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(out.absolute() / "adapter", like)


if __name__ == "__main__":
    sys.exit(main())
