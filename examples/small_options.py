"""The command line that classify_images.py and nnx_model.py share."""

import argparse
from collections.abc import Sequence

import parsing


def make_parser(
    description: str | None, *, steps: int, rank: int
) -> argparse.ArgumentParser:
    """Returns a parser of the options that both scripts have."""
    parser = parsing.new_parser(description)
    add = parser.add_argument
    add("--steps", type=int, default=steps, help="steps of each training")
    add("--rank", type=int, default=rank, help="rank of the factors")
    add("--target", default="kernel", help="regex of the kernels to adapt")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Returns the options; exits with 2 if a number is less than 1."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return args
