"""The command line of train_sharded.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import meshes
import sources

# Those that a resumed run may not change: its data and its shapes.
KEPT = ("model", "random_init", "target", "rank", "seed", "batch", "length")
AT_LEAST_ONE = (
    "steps",
    "batch",
    "length",
    "rank",
    "eval_every",
    "devices",
    "num_processes",
)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=20, help="training steps, resumed ones included")
    add("--batch", type=int, default=8, help="rows of a batch, over all devices")
    add("--length", type=int, default=128, help="tokens of a row")
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--replicate", action="store_true", help="whole factors on every device")
    add("--seed", type=int, default=0, help="seed of data, order and factors")
    add("--lr", type=float, default=1e-3, help="learning rate after five steps")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the base and the computation; factors are always float32",
    )
    add("--remat", action="store_true", help="keep no layer's inside for the gradient")
    add("--eval-every", type=int, default=10, help="steps between evaluations")
    add(
        "--out",
        type=Path,
        default=Path("runs/train_sharded"),
        help="folder of the checkpoints, one for all processes",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, if there is one; without this, "
        "checkpoints there are replaced",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default"
    )
    model.add_argument(
        "--random-init",
        choices=sources.SIZES,
        help="random weights and tokens of this size instead",
    )
    _add_devices(parser)
    return parser


def _add_devices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("devices").add_argument
    add(
        "--mesh",
        type=meshes.parse_sizes,
        help="such as data=2,fsdp=2,tensor=2; by default tensor and data get 2 devices "
        "where there are enough, and fsdp the rest",
    )
    add("--devices", type=int, help="host devices per process, instead of accelerators")
    add("--distributed", action="store_true", help="join a pod's or Slurm's processes")
    add("--coordinator", metavar="HOST:PORT", help="process 0, where none is found")
    add("--num-processes", type=int, help="how many processes there are")
    add("--process-id", type=int, help="which of them this one is, from 0")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Returns the options; exits with 2 if they contradict each other."""
    args = parser.parse_args(argv)
    for name in AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {value}")
    given = [v is not None for v in (args.coordinator, args.num_processes)]
    given.append(args.process_id is not None)
    if any(given) and not all(given):
        parser.error("--coordinator, --num-processes and --process-id go together")
    if all(given) and not 0 <= args.process_id < args.num_processes:
        parser.error(
            f"--process-id must be one of 0 to {args.num_processes - 1}, "
            f"got {args.process_id}"
        )
    return args
