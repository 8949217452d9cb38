"""The command line: `jlora inspect | convert | merge | diff`, or `python -m jlora`.

Adapters are those of PEFT, MLX, `jlora.checkpoint`, Tunix and Qwix. Errors are one line
on the standard error and exit code 2; `diff` exits with 1 if the adapters differ.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import __version__
from ._adapter.entries import kernel_shape
from ._adapter.factors import LoraFactors
from ._adapter.variants import variant_of_entry
from ._algebra import compare as _compare
from ._algebra.spectrum import effective_rank, singular_values
from ._checkpoint.steps import CHECKPOINT, holds_steps
from ._errors import AdapterError
from ._files.format import Configs, Format
from ._formats import FORMATS
from ._formats.options import add_alpha, add_options, chosen, options

SAME, DIFFERENT, FAILED = 0, 1, 2
_PEFT = "_formats.peft"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
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
            added.add_argument(place, type=Path, help=what)
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
        "the folder of an adapter: of PEFT, of MLX, a checkpoint, or one step of it"
    )
    add_alpha(command("inspect", _inspect, path=either))
    convert = command("convert", _convert, source=either, target="the folder to write")
    add_options(convert)
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an adapter in TARGET"
    )
    model = "the folder of a Hugging Face model, of safetensors"
    out = "the folder to write, which must not exist"
    command("merge", _merge, base=model, adapter="that of PEFT or MLX", out=out)
    add_alpha(command("diff", _diff, one=either, other=either))
    return parser


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
            f"{path} is neither a checkpoint nor an adapter of PEFT or MLX, which is a "
            "folder with adapter_config.json and adapter_model.safetensors, or "
            "adapters.safetensors"
        )
    return found or _format(_PEFT)  # which says what is wrong with the file


def _format_to(target: Path, source: Format, asked: str | None) -> Format:
    """Returns the format to write: as asked, by suffix, or that of other folders.

    Raises:
        ValueError: if the one that is asked for is none.
    """
    formats = [*map(_format, FORMATS)] if asked or target.suffix else []
    if asked:
        by_name = {form.name.split()[-1].lower(): form for form in formats}
        if asked not in by_name:
            raise ValueError(f"--to {asked} is none of {sorted(by_name)}")
        return by_name[asked]
    by_suffix = [form for form in formats if form.suffix == target.suffix]
    written = (form for form in map(_format, FORMATS) if form.write)
    folders = (form for form in written if form.suffix is None)
    return by_suffix[0] if by_suffix else next(f for f in folders if f is not source)


def _read(path: Path, given: Any) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of a path, of any format."""
    source = _format_of(path)
    return source.read(path, ignore=given.ignore, **chosen(given, source))


# --- commands ---


def _inspect(given: Any) -> int:
    """Print a table of an adapter: targets, ranks, norms, spectrum."""
    _, adapter = _read(given.path, given)
    rows = [_row(path, entry) for path, entry in _with_progress(adapter)]
    _say(_table(_HEAD, rows))
    values = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    _say(f"{len(adapter)} targets, {values:,} values, {size:,} bytes")
    return SAME


_HEAD = (
    "path",
    "kernel",
    "rank",
    "scaling",
    "dtype",
    "‖a‖",
    "‖b‖",
    "‖ΔW‖",
    "σ₁",
    "99 %",
)


def _row(path: str, entry: Any) -> tuple[str, ...]:
    factors = _compare.told(entry)
    if not isinstance(factors, LoraFactors):
        norm = f"{_compare.norm(factors):.4g}"
        note = variant_of_entry(entry).note(entry)
        shape, dtype = _shape(kernel_shape(entry)), str(factors.dtype)
        return (path, shape, note, "", dtype, norm, "", "", "", "")
    entry = factors
    values = singular_values(_compare.on_host(entry))
    return (
        path,
        _shape(entry.kernel_shape),
        f"{entry.rank}{variant_of_entry(entry).note(entry)}",
        f"{entry.scaling:g}",
        str(entry.a.dtype),
        f"{_compare.norm(entry.a):.4g}",
        f"{_compare.norm(entry.b):.4g}",
        f"{np.linalg.norm(values):.4g}",
        f"{values.max():.4g}",
        str(effective_rank(values).max()),
    )


def _convert(given: Any) -> int:
    """Write an adapter in another format: PEFT from a checkpoint, or the reverse."""
    source = _format_of(given.source)
    target = _format_to(given.target, source, given.to)
    if target.write is None:
        raise ValueError(f"jlora reads the states of {target.name}, and writes none")
    placing, asked = options(given, source, target)
    configs, adapter = source.read(given.source, ignore=given.ignore, **placing)
    # Of a model whose shapes are given all is known.
    ignore, placed = given.ignore, "params" in placing
    told = None if placed else source.told_in_part(given.source, ignore=ignore)
    if told := told or source.lost(given.source, target.name, ignore=ignore):
        raise AdapterError(told)
    if target.name != CHECKPOINT:
        _check_apart(given.source, given.target, target)
    target.write(given.target, adapter, configs, overwrite=given.overwrite, **asked)
    _say(f"{given.target}: {len(adapter)} targets")
    return SAME


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
    """Write a Hugging Face model with an adapter merged into its weights."""
    from . import weights

    def progress(done: int, total: int, name: str) -> None:
        _say(f"{done}/{total} tensors, {name}", sys.stderr)

    if holds_steps(given.adapter) and not _format(_PEFT).holds(given.adapter):
        raise AdapterError(
            f"{given.adapter} is a checkpoint, and merge takes files of PEFT or MLX; "
            f"write them with python -m jlora convert {given.adapter} FOLDER"
        )
    weights.merge_folder(
        given.base, given.adapter, given.out, ignore=given.ignore, progress=progress
    )
    _say(f"{given.out}: merged")
    return SAME


def _diff(given: Any) -> int:
    """Compare two adapters; exit code 1 if they differ."""
    (_, one), (_, other) = (_read(p, given) for p in (given.one, given.other))
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


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


if __name__ == "__main__":
    sys.exit(main())
