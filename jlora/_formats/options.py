"""What `python -m jlora` can be told of the files that it reads and writes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._errors import AdapterError
from .._files.format import Format
from .._files.shapes import read_shapes

# What each option is when it is not given.
_DEFAULTS = {
    "names": None, "params": None, "alpha": None, "base": None, "base_model": None,
    "profile": "peft", "model_type": None, "prefix": None, "architecture": None,
    "convolutions": False,
}  # fmt: skip


def add_reading(command: argparse.ArgumentParser) -> None:
    """Adds what some formats need to be understood."""
    command.add_argument(
        "--alpha",
        type=float,
        help="the alpha of the rules, for states of Tunix and Qwix, which store none",
    )
    told = "the folder of the base: kohya needs its names, GGUF its config.json"
    command.add_argument("--base", type=Path, metavar="FOLDER", help=told)


def add_options(convert: argparse.ArgumentParser) -> None:
    """Adds what `convert` is told of files and of the model that they are for."""
    add_reading(convert)
    convert.add_argument(
        "--to",
        metavar="FORMAT",
        type=str.lower,
        help="what to write: peft, checkpoint, mlx, diffusers, kohya, gguf; else what "
        "TARGET's suffix says, or a folder of PEFT, and from one of PEFT a checkpoint",
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
    _add_options_of_peft(convert)
    _add_options_of_files(convert)
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an adapter in TARGET"
    )


def _add_options_of_peft(convert: argparse.ArgumentParser) -> None:
    """Adds what is said of the files of PEFT that are written."""
    convert.add_argument(
        "--base-model",
        metavar="NAME",
        help="writing PEFT: the base, to be named in adapter_config.json",
    )
    convert.add_argument(
        "--model-type",
        metavar="KIND",
        help="writing PEFT: the kind of the base, model_type in its config.json, where "
        "PEFT has packed experts in another way than for most: llama4_text; for vLLM "
        "gpt_oss, qwen3_5_moe",
    )
    convert.add_argument(
        "--profile",
        choices=("peft", "vllm"),
        default="peft",
        help="writing PEFT: for PEFT, or for what vLLM loads",
    )


def _add_options_of_files(convert: argparse.ArgumentParser) -> None:
    """Adds what is said of the files of other libraries that are written."""
    convert.add_argument(
        "--convolutions",
        action="store_true",
        help="writing torch's names from a checkpoint: kernels of several input axes "
        "are those of convolutions, (*window, in, out), which it does not tell itself",
    )
    convert.add_argument(
        "--prefix",
        metavar="NAME",
        help="writing kohya: what stands before names, such as lora_unet; writing "
        "diffusers: the part of the pipeline, such as unet",
    )
    convert.add_argument(
        "--architecture",
        metavar="NAME",
        help="writing GGUF: llama.cpp's name of the model, if there is no --base",
    )


def read_all(
    given: Any, paths: Sequence[Path], forms: Sequence[Format]
) -> list[dict[str, Any]]:
    """Returns the adapters of some paths, to be looked at.

    A format that knows its alpha is read without one, so that `diff` takes both kinds.

    Raises:
        ValueError: if there is a base, and none of them needs it.
        AdapterError: if adapters of different formats would not be under one kind of
            names without a base.
    """
    if given.base is not None and not any("base" in form.placing for form in forms):
        told = f"{paths[0]} is of {forms[0].name}"
        raise ValueError(f"{told}, which has no place for --base; leave that out")
    if len({form.name for form in forms}) > 1 and not given.base:
        for form, path in zip(forms, paths, strict=True):
            told = form.told_in_part(path, ignore=given.ignore)
            if "base" in form.placing and told:
                raise AdapterError(told)
    every = zip(forms, paths, strict=True)
    return [f.read(p, ignore=given.ignore, **_for(f, given))[1] for f, p in every]


def _for(form: Format, given: Any) -> dict[str, Any]:
    """Returns what is given of the options for reading one format."""
    told = {name: getattr(given, name) for name in ("alpha", "base")}
    return {n: v for n, v in told.items() if v is not None and n in form.placing}


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
    writing = {n: v for n, v in asked.items() if n in target.options}
    vain = [f"--{n.replace('_', '-')}" for n in asked if n not in {*placing, *writing}]
    if vain:
        raise ValueError(
            f"{given.source} is of {source.name} and becomes {target.name}, which has "
            f"no place for {', '.join(vain)}; leave that out"
        )
    if {"convolutions", "names"} <= asked.keys():
        raise ValueError(
            "--names says what the kernels of a family are; leave --convolutions out"
        )
    if "params" in placing:
        placing["params"] = read_shapes(placing["params"])
    if source.of_torch and target.of_torch and "params" not in placing:
        writing["convolutions"] = True
    return placing, writing
