"""What train_sharded.py trains: a model on the mesh, its loss, and its batches."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import placement
from jax.sharding import Mesh, NamedSharding
from llama import Llama, LlamaConfig

# "1b" and "8b" have the sizes of Llama 3.2 1B and Llama 3.1 8B.
SIZES = {
    "tiny": LlamaConfig(
        vocab=256, hidden=64, mlp=128, layers=2, heads=4, kv_heads=2, head_dim=16
    ),
    "135m": LlamaConfig(),
    "1b": LlamaConfig(
        vocab=128256,
        hidden=2048,
        mlp=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        rope_base=500_000.0,
    ),
    "8b": LlamaConfig(
        vocab=128256,
        hidden=4096,
        mlp=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        rope_base=500_000.0,
        tied=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A frozen model and what it is trained on.

    `make_loss(apply)` returns `loss(adapter, variables, batch)`, which gives the mean
    and the number of targets. Batches are trees of host arrays with a row axis first,
    the same on every process; `batches(step)` yields those from a step on, so that a
    resumed run sees what it would have seen. `count` is the tokens read in a batch.
    """

    model: Llama
    variables: Any
    make_loss: Callable[..., Callable[..., Any]]
    batches: Callable[[int], Iterator[Any]]
    held_out: Sequence[Any]
    count: Callable[[Any], int]


def load(args: argparse.Namespace, mesh: Mesh) -> Source:
    """Returns what the options name.

    Raises:
        ImportError: If a package is missing.
        OSError: If a file is missing.
        ValueError: If a file isn't what it should be, or no pair fits in a row.
    """
    return _random(args, mesh) if args.random_init else _pretrained(args, mesh)


def _pretrained(args: argparse.Namespace, mesh: Mesh) -> Source:
    """Returns pretrained weights and the chat pairs of finetune_chat.py."""
    try:  # these need packages that random weights do without
        import chat_data
        import pretrained
        import training
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{error.name}` isn't installed; install the extra `jlora[examples]`, or "
            "take random weights with `--random-init tiny`"
        ) from error

    fields = _fields(args, mesh)

    def put(path: str, value: np.ndarray) -> jax.Array:
        spec = placement.leaf_spec(path, value.shape, mesh)
        return placement.put(value.astype(fields["dtype"]), NamedSharding(mesh, spec))

    base = pretrained.load(args.model, put=put, **fields)
    train, held_out = chat_data.load_examples(base.tokenizer, args.seed, args.length)
    if not train or not held_out:
        raise ValueError(f"`--length` {args.length} is too short for the pairs; try 64")
    size = args.batch, args.length
    batches = lambda step: itertools.islice(
        chat_data.training_batches(train, args.seed, *size), step, None
    )
    return Source(
        model=base.model,
        variables=base.variables,
        make_loss=training.make_loss,
        batches=batches,
        held_out=chat_data.all_batches(held_out, *size),
        count=lambda batch: int((batch.segments > 0).sum()),
    )


def _fields(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Returns what the options say of the model besides its sizes."""
    # cuDNN's attention has neither float32 nor rows of odd length.
    fused = args.dtype == "bfloat16" and args.length % 2 == 0
    fused = fused and jax.default_backend() == "gpu"
    return {
        "dtype": jnp.dtype(args.dtype),
        "remat": args.remat,
        "attention": "cudnn" if fused else None,
        "activations": placement.rows(mesh),
        "embeddings": NamedSharding(mesh, placement.EMBEDDINGS),
    }


def _random(args: argparse.Namespace, mesh: Mesh) -> Source:
    """Returns random weights and random tokens, which need no download."""
    config = dataclasses.replace(SIZES[args.random_init], **_fields(args, mesh))
    model = Llama(config)
    batch = lambda step: _random_tokens(args, model.config.vocab, step)
    return Source(
        model=model,
        variables=_random_variables(model, args, mesh),
        make_loss=next_token_loss,
        batches=lambda step: map(batch, itertools.count(step)),
        held_out=[batch(-1), batch(-2)],
        count=lambda batch: batch.size - len(batch),
    )


def _random_variables(model: Llama, args: argparse.Namespace, mesh: Mesh) -> Any:
    """Returns variables that are made in place: no device ever holds all of them."""

    def init() -> Any:
        tokens = jnp.zeros((args.batch, args.length), jnp.int32)
        fresh = model.init(jax.random.key(args.seed), tokens)
        return jax.tree.map(lambda v: v.astype(model.config.dtype), fresh)

    specs = placement.param_specs(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=placement.on_mesh(specs, mesh))()


def _random_tokens(args: argparse.Namespace, vocab: int, step: int) -> np.ndarray:
    """Returns the tokens of a step; low ids are common, which can be learned."""
    numbers = np.random.default_rng((args.seed, step % (1 << 32)))
    uniform = numbers.random((args.batch, args.length + 1))
    return (vocab * uniform**4).astype(np.int32)


def next_token_loss(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns `loss(adapter, variables, tokens)`: per token, and their number."""

    def loss(adapter: Any, variables: Any, tokens: jax.Array) -> Any:
        logits = apply(variables, adapter, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        )
        return jnp.mean(losses), losses.size

    return loss
