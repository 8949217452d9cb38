"""What is told to the command line of the files that are read and written."""

import argparse
from pathlib import Path
from typing import Any

from .._files.format import Format
from .._files.shapes import read_shapes

# What each option is when it is not given.
_DEFAULTS = {
    "names": None, "params": None, "alpha": None, "base_model": None, "profile": "peft",
}  # fmt: skip


def add_alpha(command: argparse.ArgumentParser) -> None:
    """Adds what is said of files that do not tell their scaling."""
    command.add_argument(
        "--alpha",
        type=float,
        help="the alpha of the rules, for states of Tunix and Qwix, which store none",
    )


def add_options(convert: argparse.ArgumentParser) -> None:
    """Adds what `convert` is told of files and of the model that they are for."""
    add_alpha(convert)
    convert.add_argument(
        "--to",
        metavar="FORMAT",
        type=str.lower,
        help="what to write: peft, checkpoint, mlx; else what TARGET's suffix says, or "
        "a folder of PEFT, and from one of PEFT a checkpoint",
    )
    convert.add_argument(
        "--names",
        metavar="FAMILY",
        help="torch's names of a model: llama, gpt2, bert, vit, …; without it names in "
        "PEFT are the paths of kernels, and a checkpoint is for a model with torch's",
    )
    convert.add_argument(
        "--params",
        type=Path,
        metavar="SHAPES",
        help="reading: JSON with the shape of each leaf of the params by path, "
        '{"params/layers_0/up/kernel": [64, 256], ...}, whose paths the checkpoint '
        "then has; in Python jlora.peft.load(folder, params, names) does the same",
    )
    convert.add_argument(
        "--base-model",
        metavar="NAME",
        help="writing PEFT: the base, to be named in adapter_config.json",
    )
    convert.add_argument(
        "--profile",
        choices=("peft", "vllm"),
        default="peft",
        help="writing PEFT: for PEFT, or for what vLLM loads",
    )


def chosen(given: Any, source: Format) -> dict[str, Any]:
    """Returns what is given of the options for reading.

    A format that knows its alpha is read without one, so that `diff` takes both kinds.
    """
    alpha = given.alpha if "alpha" in source.placing else None
    return {} if alpha is None else {"alpha": alpha}


def options(
    given: Any, source: Format, target: Format
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what is given of the options for reading, and of those for writing.

    Raises:
        ValueError: if more is given, or the shapes of the params are none.
    """
    told = {name: getattr(given, name) for name in _DEFAULTS}
    asked = {n: value for n, value in told.items() if value != _DEFAULTS[n]}
    placing = {n: v for n, v in asked.items() if n in source.placing}
    options = {n: v for n, v in asked.items() if n in target.options}
    vain = [f"--{n.replace('_', '-')}" for n in asked if n not in {*placing, *options}]
    if vain:
        raise ValueError(
            f"{given.source} is of {source.name} and becomes {target.name}, which has "
            f"no place for {', '.join(vain)}; leave that out"
        )
    if "params" in placing:
        placing["params"] = read_shapes(placing["params"])
    return placing, options
