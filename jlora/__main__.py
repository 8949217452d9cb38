"""The command line: `jlora inspect | convert | merge | diff`, or `python -m jlora`.

Adapters are folders of PEFT, MLX or `jlora.checkpoint`, states of Tunix and Qwix, or
files of diffusers, kohya's scripts or llama.cpp (GGUF); or repositories of the Hugging
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
from ._files.format import Format
from ._formats import FORMATS
from ._formats.options import add_options, add_reading, options, read_all
from ._formats.printing import table
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
        "an adapter: a folder of PEFT or MLX, a checkpoint or one of its steps, a "
        "state of Tunix or Qwix, or a file of diffusers, kohya or GGUF; or a "
        "repository of PEFT's files on the Hub, owner/name or owner/name@revision"
    )
    inspect = command("inspect", _inspect, path=either)
    target = "the folder or file to write"
    convert = command("convert", _convert, source=either, target=target)
    add_options(convert)
    model = "the folder of a Hugging Face model, of safetensors"
    out = "the folder to write, which must not exist"
    command("merge", _merge, base=model, adapter=either, out=out)
    diff = command("diff", _diff, one=either, other=either)
    for added in (inspect, diff):
        add_reading(added)
    return parser


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
            f"{path} is neither a checkpoint nor an adapter of PEFT or MLX, which is a "
            "folder with adapter_config.json and adapter_model.safetensors, or "
            "adapters.safetensors"
        )
    return found or _format(_PEFT)  # which says what is wrong with the file


def _format_to(target: Path, source: Format, asked: str | None) -> Format:
    """Returns the format to write: as asked, by suffix, or that of other folders.

    Raises:
        ValueError: if the one that is asked for is none, or the suffix is that of
            several.
    """
    formats = [*map(_format, FORMATS)] if asked or target.suffix else []
    by_name = {form.name.split()[-1].lower(): form for form in formats}
    if asked:
        if asked not in by_name:
            raise ValueError(f"--to {asked} is none of {sorted(by_name)}")
        return by_name[asked]
    by_suffix = {n: form for n, form in by_name.items() if form.suffix == target.suffix}
    if len(by_suffix) > 1:
        told = " or ".join(f"--to {name}" for name in by_suffix)
        raise ValueError(f"{target} may be a file of several formats: give {told}")
    written = (form for form in map(_format, FORMATS) if form.write)
    folders = (form for form in written if form.suffix is None)
    return next(iter(by_suffix.values()), None) or next(
        form for form in folders if form is not source
    )


def _read(given: Any, *paths: Path) -> list[dict[str, Any]]:
    """Returns the adapters of some paths, of any formats."""
    return read_all(given, paths, [*map(_format_of, paths)])


# --- commands ---


def _inspect(given: Any) -> int:
    """Print a table of an adapter: targets, ranks, norms, spectrum."""
    form = _format_of(given.path)
    # With a base, which no form that shows an adapter takes, `_read` says so.
    if given.base is None and (shown := form.shown(given.path)):
        _say(table(shown.head, shown.rows))
        _say(shown.total)
        _say_untold(shown.untold)
        return SAME
    (adapter,) = _read(given, given.path)
    rows = [summary.row(path, entry) for path, entry in _with_progress(adapter)]
    _say(table(summary.HEAD, rows))
    values = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    _say(f"{len(adapter)} targets, {values:,} values, {size:,} bytes")
    _say_untold(form.told_in_part(given.path, ignore=given.ignore))
    return SAME


def _say_untold(untold: str | None) -> None:
    """Prints what the files do not tell, if there is something."""
    if untold:
        _say(f"not told by the files: {untold}", sys.stderr)


def _convert(given: Any) -> int:
    """Write an adapter in another format: PEFT from a checkpoint, or the reverse."""
    source = _format_of(given.source)
    target = _format_to(given.target, source, given.to)
    if target.write is None:
        raise ValueError(f"jlora reads the states of {target.name}, and writes none")
    placing, asked = options(given, source, target)
    configs, adapter = source.read(given.source, ignore=given.ignore, **placing)
    # Of a model whose shapes or folder are given all is known.
    ignore, placed = given.ignore, not placing.keys().isdisjoint(("params", "base"))
    told = None if placed else source.told_in_part(given.source, ignore=ignore)
    if told := told or source.lost(given.source, target.name, ignore=ignore):
        raise AdapterError(told)
    if target.name != CHECKPOINT:
        _check_apart(given.source, given.target, target)
    target.write(given.target, adapter, configs, overwrite=given.overwrite, **asked)
    _say(f"{given.target}: {len(adapter)} targets")
    if dropped := target.dropped(configs):
        _say(f"{target.name}: {dropped}")
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
    """Write a Hugging Face model, or diffusers' pipeline, with an adapter merged."""
    from . import weights
    from ._peft.merge_files import merge_modules

    def progress(done: int, total: int, name: str) -> None:
        _say(f"{done}/{total} tensors, {name}", sys.stderr)

    if holds_steps(given.adapter) and not _format(_PEFT).holds(given.adapter):
        raise AdapterError(
            f"{given.adapter} is a checkpoint, and merge takes files of PEFT or MLX; "
            f"write them with python -m jlora convert {given.adapter} FOLDER"
        )
    form = _format_of(given.adapter)
    if form.modules is None:
        weights.merge_folder(
            given.base, given.adapter, given.out, ignore=given.ignore, progress=progress
        )
    else:
        own = form.modules(given.adapter, ignore=given.ignore, base=given.base)
        merge_modules(given.base, own, given.out, str(given.adapter), progress)
    _say(f"{given.out}: merged")
    return SAME


def _diff(given: Any) -> int:
    """Compare two adapters; exit code 1 if they differ."""
    one, other = _read(given, given.one, given.other)
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
    _say(table(("path", "‖ΔW₁−ΔW₂‖/‖ΔW₁‖", "what differs"), rows))
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


if __name__ == "__main__":
    sys.exit(main())
