"""Replies sampled from a policy, and what they are worth."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import chat_data
import generation
import jax
import numpy as np
import pretrained

import jlora


class Rollout(NamedTuple):
    """Prompts, padded on the left, with the replies sampled to them, and rewards.

    `replied` says which tokens of a reply were sampled, the one that ends it included;
    `advantages` are those of whole replies.
    """

    prompts: jax.Array
    padding: jax.Array
    replies: jax.Array
    replied: jax.Array
    advantages: jax.Array


def share_matched(text: str, pattern: str) -> float:
    """Returns the share of the characters of a text that a regex matches.

    Spaces don't count.

    >>> share_matched("so it goes everywhere", "[a-z]+ ")
    0.4444444444444444
    """
    count = lambda part: sum(not character.isspace() for character in part)
    matched = sum(count(match[0]) for match in re.finditer(pattern, text))
    return matched / max(count(text), 1)


def advantages(rewards: np.ndarray, group: int) -> np.ndarray:
    """Returns the rewards, standardized among the replies to the same prompt.

    References:
        Shao et al., DeepSeekMath <https://arxiv.org/abs/2402.03300>, 2024, section 4.1.
    """
    grouped = rewards.reshape(-1, group)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    return (centred / (grouped.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)


def sampled_tokens(replies: np.ndarray, stop: int) -> np.ndarray:
    """Returns which tokens of the replies are not filling behind the first `stop`."""
    ended = np.cumsum(replies == stop, axis=1) - (replies == stop)
    return ended == 0


class Game:
    """A model, prompts that fit, and sampling for rewards."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.base = base = pretrained.load(args.model)
        config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
        self.lora = jlora.lora(base.model.apply, config)
        self.stop = chat_data.stop_token(base.tokenizer)
        self.generate = generation.make_generate(
            self.lora.apply, base.model.config, stop=self.stop, length=args.length
        )
        sides = chat_data.split(chat_data.load_conversations(), args.seed)
        self.train, self.held_out = (self._fitting(pairs) for pairs in sides)
        if min(len(self.train), len(self.held_out)) < args.prompts:
            raise ValueError(f"`--width` {args.width} is too short for the prompts")
        self.judged = self.held_out[: args.prompts]

    def _fitting(self, pairs: Sequence[chat_data.Pair]) -> list[str]:
        encode, template = self.base.tokenizer.encode, chat_data.chat_prompt
        fits = lambda text: len(encode(template(text)).ids) <= self.args.width
        return sorted(filter(fits, {pair.prompt for pair in pairs}))

    def play(
        self, adapter: Any, prompts: Sequence[str], key: jax.Array
    ) -> tuple[Rollout, np.ndarray, list[str]]:
        """Returns sampled replies as a rollout, their rewards, and their texts."""
        args, asked = self.args, map(chat_data.chat_prompt, prompts)
        each = [prompt for prompt in asked for _ in range(args.samples)]
        padded = generation.pad_left(self.base.tokenizer, each, args.width)
        replies = self.generate((self.base.variables, adapter), *padded, key)
        texts = self.base.tokenizer.decode_batch(np.asarray(replies).tolist())
        found = [share_matched(text, args.wanted) for text in texts]
        rewards = np.array(found, np.float32)
        replied = sampled_tokens(np.asarray(replies), self.stop)
        ahead = advantages(rewards, args.samples)
        return Rollout(*padded, replies, replied, ahead), rewards, texts
