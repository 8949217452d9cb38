"""A Llama of 130,000 weights for the notebooks, pretrained on English chats in seconds.

The `chatterbot-corpus` package has chats in other languages too, which are what an
adapter can teach it.
"""

from collections.abc import Iterable

import chat_data
import data_packages
import jax
import jax.numpy as jnp
import training
import yaml
from llama import Llama, LlamaConfig
from pretrained import Pretrained
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = LlamaConfig(
    vocab=512, hidden=64, mlp=192, layers=2, heads=4, kv_heads=2, head_dim=16
)
LENGTH = 64  # tokens of a row
Talks = list[list[str]]
Data = tuple[list[chat_data.Example], list[chat_data.Example]]


def load_talks(language: str) -> Talks:
    """Returns the conversations of a language of the `chatterbot-corpus` package."""
    if language == "english":
        return chat_data.load_conversations()
    folder = data_packages.locate("chatterbot_corpus") / "data" / language
    files = sorted(folder.glob("*.yml"))
    found = [yaml.safe_load(f.read_text("utf-8"))["conversations"] for f in files]
    return [talk for talks in found for talk in talks if isinstance(talk, list)]


def train_tokenizer(texts: Iterable[str], vocab: int = CONFIG.vocab) -> Tokenizer:
    """Returns a tokenizer of bytes and of what is frequent in the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_data(languages: Iterable[str]) -> tuple[Tokenizer, dict[str, Data]]:
    """Returns a tokenizer for all languages, and the examples of each.

    Those are a pair: the examples to train on, and those held out.
    """
    talks = {language: load_talks(language) for language in languages}
    texts = (text for some in talks.values() for talk in some for text in talk)
    tokenizer = train_tokenizer(texts)
    data = {}
    for language, some in talks.items():
        train, held_out = (
            chat_data.encode(tokenizer, pairs, LENGTH)
            for pairs in chat_data.split(some, seed=0)
        )
        data[language] = train, held_out
    return tokenizer, data


def pretrain(tokenizer: Tokenizer, data: Data, steps: int = 200) -> Pretrained:
    """Returns a model all of whose weights were trained on the examples."""
    model = Llama(CONFIG)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    # The loss of an adapter, with the weights themselves in its place.
    loss = training.make_loss(
        lambda _, trained, *args, **kwargs: model.apply(trained, *args, **kwargs)
    )
    batches = chat_data.training_batches(data[0], seed=0, rows=8, length=LENGTH)
    quiet = Console(quiet=True)
    variables = training.fit(loss, variables, {}, batches, steps, 1e-2, quiet)
    return Pretrained(model, variables, tokenizer)
