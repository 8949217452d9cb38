"""Adapts a language model with LoRA so that it finds the reply to a prompt.

The encoder is the first layers of SmolLM2-135M and the mean of what they return; the
texts are the prompts and replies of finetune_chat.py, both from PyPI
(requirements-finetune.txt). The loss is InfoNCE: each prompt must be nearer to its own
reply than to the other ones of the batch. The script prints the plan, and before and
after, for held-out pairs, that loss and the share of prompts whose own reply is the
nearest (recall@1) or one of the five nearest. Much of the corpus is trivia, where a
small model can't know the answer; recall rises by little. On a CPU it takes a minute.

    python examples/embed_sentences.py --steps 20 --layers 4 --target "(q|v)_proj"
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

import jlora

try:
    import chat_data
    import encoder
    import parsing
    import pretrained
    import retrieval
    import training
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

console = Console(soft_wrap=True, highlight=False)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=80, help="training steps")
    add("--layers", type=int, default=2, help="layers of the encoder")
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--rows", type=int, default=24, help="pairs of a batch")
    add("--length", type=int, default=16, help="tokens of a text")
    add("--held-out", type=int, default=64, help="pairs to measure recall on")
    add("--temperature", type=float, default=0.1, help="of the softmax of cosines")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="seed of split, order and factors")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    args = parser.parse_args(argv)
    parsing.at_least_one(parser, args, "steps", "layers", "rank", "length")
    if min(args.rows, args.held_out) < 2:
        parser.error("--rows and --held-out must be at least 2: replies are compared")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole story and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    try:
        base = encoder.first_layers(pretrained.load(args.model), args.layers)
        sides = chat_data.split(chat_data.load_conversations(), args.seed)
        train, held_out = sides[0], retrieval.different(sides[1], args.held_out)
        batches = retrieval.batches(
            base.tokenizer, train, args.seed, args.rows, args.length
        )
        encode, first = encoder.make_encode(base.model), next(batches)
        mean = retrieval.mean_of(encode, base.variables, first)
        variables = {**base.variables, "mean": mean}
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        lora = jlora.lora(retrieval.make_embed(encode), config)
        plan = lora.plan(variables, first.prompts)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plan), markup=False)
    console.print(f"{len(train)} pairs to train on, {len(held_out)} held out")
    adapter = lora.init(jax.random.key(args.seed), variables, first.prompts)
    loss = retrieval.make_loss(lora.apply, args.temperature)
    pairs = retrieval.tokenize(base.tokenizer, held_out, args.length)
    similarities = jax.jit(retrieval.make_similarities(lora.apply))
    evaluate = jax.jit(loss)

    def judge(adapter: Any, moment: str) -> float:
        value = float(evaluate(adapter, variables, pairs)[0])
        cosines = similarities((variables, adapter), pairs)
        one, five = (retrieval.recall(cosines, nearest) for nearest in (1, 5))
        told = f"{moment}: held-out loss {value:.3f}, recall@1 {one:.3f}, @5 {five:.3f}"
        console.print(told)
        return value

    before = judge(adapter, "before")
    adapter = training.fit(
        loss,
        adapter,
        variables,
        batches,
        args.steps,
        args.lr,
        console,
        count_tokens=lambda batch: sum(side.real.sum() for side in batch),
    )
    after = judge(adapter, "after")
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0 if after < before else 1


if __name__ == "__main__":
    sys.exit(main())
