"""What `python -m jlora` can be told of the files that it reads and writes."""

import argparse
from pathlib import Path


def add_base(command: argparse.ArgumentParser) -> None:
    """Adds the base, which some formats need to be understood."""
    told = "the folder of the base: kohya needs its names, GGUF its config.json"
    command.add_argument("--base", type=Path, metavar="FOLDER", help=told)


def add_options(convert: argparse.ArgumentParser) -> None:
    """Adds what `convert` can be told."""
    _add_options_of_peft(convert)
    _add_options_of_files(convert)
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an adapter in TARGET"
    )


def _add_options_of_peft(convert: argparse.ArgumentParser) -> None:
    """Adds what is said of the files of PEFT that are written."""
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
        help="reading PEFT: JSON with the shape of each leaf of the params by path, "
        '{"params/layers_0/up/kernel": [64, 256], ...}, whose paths the checkpoint '
        "then has; in Python jlora.peft.load(folder, params, names) does the same",
    )
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
        "--format",
        metavar="NAME",
        help="the format to write, where the end of TARGET's name is that of several: "
        "diffusers or kohya, of .safetensors",
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
