"""The command line: `jlora inspect | convert | merge | diff`, or `python -m jlora`.

Adapters are folders, of PEFT or of `jlora.checkpoint`, or repositories of the Hugging
Face Hub, `owner/name` or `owner/name@revision`, where nothing on disk is called so.
Errors are one line on the standard error and exit code 2; `diff` exits with 1 if the
adapters differ.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from . import __version__
from ._algebra import compare as _compare
from ._algebra import summary
from ._checkpoint.steps import CHECKPOINT, holds_steps
from ._errors import AdapterError
from ._files.format import Configs, Format
from ._files.shapes import read_shapes
from ._formats import FORMATS
from ._peft.files import local

SAME, DIFFERENT, FAILED = 0, 1, 2
_PEFT = "_formats.peft"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        for name in _ADAPTERS & set(vars(parsed)):
            setattr(parsed, name, _on_disk(getattr(parsed, name)))
        return parsed.run(parsed)
    except (AdapterError, OSError, ValueError, TypeError, ImportError) as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines() if line)
        told = lines.replace(":; ", ": ").replace("`overwrite=True`", "--overwrite")
        _say(f"{_program()} {parsed.command}: {told}", sys.stderr)
        return FAILED


def _program() -> str:
    """Returns what was called."""
    return "jlora" if Path(sys.argv[0]).stem == "jlora" else "python -m jlora"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_program(), description=__doc__)
    version = f"jlora {__version__}, jax {jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int], **places: str) -> Any:
        told = (run.__doc__ or "").splitlines()[0]
        added = commands.add_parser(name, help=told, description=told)
        for place, what in places.items():
            kind = str if place in _ADAPTERS else Path
            added.add_argument(place, type=kind, help=what)
        added.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="FIELD",
            help="a field of a PEFT config to do without, such as lora_dropout",
        )
        added.set_defaults(run=run)
        return added

    either = (
        "the folder of an adapter: of PEFT, a checkpoint, or one of its steps; or a "
        "repository of PEFT's files on the Hub, owner/name or owner/name@revision"
    )
    command("inspect", _inspect, path=either)
    convert = command("convert", _convert, source=either, target="the folder to write")
    _add_options_of_peft(convert)
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an adapter in TARGET"
    )
    model = "the folder of a Hugging Face model, of safetensors"
    out = "the folder to write, which must not exist"
    adapter = "the folder of PEFT's, or a repository"
    command("merge", _merge, base=model, adapter=adapter, out=out)
    command("diff", _diff, one=either, other=either)
    return parser


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


# What may be a repository of the Hub.
_ADAPTERS = {"path", "source", "adapter", "one", "other"}


def _on_disk(place: str) -> Path:
    """Returns the path of an adapter; one of the Hub is fetched first."""
    repository, _, revision = place.partition("@")
    if not revision or os.path.lexists(place):
        return local(place)
    return local(repository, revision)


# --- the formats ---


def _format(module: str) -> Format:
    """Returns the format of a module, which may need a library of its own."""
    return importlib.import_module(f".{module}", __package__).FORMAT


def _format_of(path: Path) -> Format:
    """Returns the format of what is there.

    Raises:
        FileNotFoundError: if it is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    found = next((f for f in map(_format, FORMATS) if f.holds(path)), None)
    if found is None and path.is_dir():
        raise FileNotFoundError(
            f"{path} is neither a checkpoint nor an adapter of PEFT, which is a folder "
            "with adapter_config.json and adapter_model.safetensors"
        )
    return found or _format(_PEFT)  # which says what is wrong with the file


def _format_to(target: Path, source: Format) -> Format:
    """Returns the format to write: by the target's suffix, or that of other folders."""
    formats = [*map(_format, FORMATS)] if target.suffix else []
    by_suffix = [form for form in formats if form.suffix == target.suffix]
    folders = (form for form in map(_format, FORMATS) if form.suffix is None)
    return by_suffix[0] if by_suffix else next(f for f in folders if f is not source)


def _read(path: Path, ignore: Sequence[str]) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of a path, of any format."""
    return _format_of(path).read(path, ignore=ignore)


# --- commands ---


def _inspect(given: Any) -> int:
    """Print a table of an adapter: targets, ranks, norms, spectrum."""
    _, adapter = _read(given.path, given.ignore)
    rows = [summary.row(path, entry) for path, entry in _with_progress(adapter)]
    _say(_table(summary.HEAD, rows))
    values = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    _say(f"{len(adapter)} targets, {values:,} values, {size:,} bytes")
    return SAME


def _convert(given: Any) -> int:
    """Write an adapter in the other format: PEFT from a checkpoint, or the reverse."""
    source = _format_of(given.source)
    target = _format_to(given.target, source)
    placing, options = _options(given, source, target)
    configs, adapter = source.read(given.source, ignore=given.ignore, **placing)
    # Of a model whose shapes are given all is known.
    told = None if placing else source.told_in_part(given.source, ignore=given.ignore)
    if told:
        raise AdapterError(told)
    if target.name != CHECKPOINT:
        _check_apart(given.source, given.target, target)
    target.write(given.target, adapter, configs, overwrite=given.overwrite, **options)
    _say(f"{given.target}: {len(adapter)} targets")
    return SAME


def _options(
    given: Any, source: Format, target: Format
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what is given of the options for reading, and of those for writing.

    Raises:
        ValueError: if more is given, or the shapes of the params are none.
    """
    empty = dict.fromkeys(("names", "params", "base_model", "model_type"))
    defaults: dict[str, str | None] = {**empty, "profile": "peft"}
    asked = {n: getattr(given, n) for n in defaults if getattr(given, n) != defaults[n]}
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


def _check_apart(source: Path, target: Path, form: Format) -> None:
    """Raises if files of another format would be written into a checkpoint."""
    if target.is_file() and form.suffix is None:
        raise FileExistsError(f"{target} is a file; give a folder")
    place = target.resolve()
    inside = source.resolve() in (place, *place.parents)
    if holds_steps(target) or (inside and holds_steps(source)):
        raise FileExistsError(
            f"{target} is a checkpoint, or in one, where files of {form.name} have no "
            "place; give a folder elsewhere"
        )


def _merge(given: Any) -> int:
    """Write a Hugging Face model with a PEFT adapter merged into its weights."""
    from . import weights

    def progress(done: int, total: int, name: str) -> None:
        _say(f"{done}/{total} tensors, {name}", sys.stderr)

    if holds_steps(given.adapter) and not _format(_PEFT).holds(given.adapter):
        raise AdapterError(
            f"{given.adapter} is a checkpoint, and merge takes files of PEFT; write "
            f"them with python -m jlora convert {given.adapter} FOLDER"
        )
    weights.merge_folder(
        given.base, given.adapter, given.out, ignore=given.ignore, progress=progress
    )
    _say(f"{given.out}: merged")
    return SAME


def _diff(given: Any) -> int:
    """Compare two adapters; exit code 1 if they differ."""
    (_, one), (_, other) = (_read(p, given.ignore) for p in (given.one, given.other))
    rows = [(p, "", f"only in {given.one}") for p in one if p not in other]
    rows += [(p, "", f"only in {given.other}") for p in other if p not in one]
    both = {path: entry for path, entry in one.items() if path in other}
    for path, entry in _with_progress(both):
        told = _compare.difference(entry, other[path])
        if told:
            rows.append((path, *told))
    if not rows:
        _say(f"the same: {len(one)} targets")
        return SAME
    _say(_table(("path", "‖ΔW₁−ΔW₂‖/‖ΔW₁‖", "what differs"), rows))
    return DIFFERENT


# --- printing ---


def _say(text: str, stream: Any = None) -> None:
    """Prints, whatever becomes of it.

    Who reads the output may have seen enough and be gone, which must not end what is
    being written; and a terminal may lack some letters.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(
            text.encode(encoding, "replace").decode(encoding), file=stream, flush=True
        )
    except BrokenPipeError:
        # Python flushes again at its end, and has to find somewhere to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _with_progress(adapter: dict[str, Any]) -> Any:
    """Yields the items; a line on a terminal says how far it has come."""
    shown = sys.stderr.isatty()
    for number, item in enumerate(adapter.items(), 1):
        yield item
        if shown:
            end = "\r" if number < len(adapter) else "\r\033[K"
            print(f"{number}/{len(adapter)}", end=end, file=sys.stderr, flush=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    plain = lambda cell: (
        cell if cell.isprintable() else repr(cell)
    )  # paths are any text
    lines = [tuple(map(plain, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(padded)


if __name__ == "__main__":
    sys.exit(main())
