"""The command line: `python -m jlora inspect | convert | merge | diff`.

Adapters are folders, of PEFT or of `jlora.checkpoint`. Errors are one line on the
standard error and exit code 2; `diff` exits with 1 if the adapters differ.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import _peft_alone, _spectrum
from ._entries import SlicedFactors, TrainedRows
from ._errors import AdapterError
from ._factors import LoraFactors

Configs = Any
SAME, DIFFERENT, FAILED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except BrokenPipeError:  # who reads the output has seen enough
        return SAME
    except (AdapterError, OSError, ValueError, TypeError, ImportError) as error:
        told = "; ".join(line.strip() for line in str(error).splitlines() if line)
        print(f"python -m jlora {parsed.command}: {told}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jlora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int], *places: str) -> Any:
        added = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        for place in places:
            added.add_argument(place, type=Path)
        added.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="FIELD",
            help="a field of a PEFT config to do without, such as lora_dropout",
        )
        added.set_defaults(run=run)
        return added

    command("inspect", _inspect, "path")
    convert = command("convert", _convert, "source", "target")
    convert.add_argument("--names", metavar="FAMILY", help="llama, gpt2, bert, vit, …")
    convert.add_argument("--base-model", help="written into adapter_config.json")
    convert.add_argument("--profile", choices=("peft", "vllm"), default="peft")
    convert.add_argument("--overwrite", action="store_true")
    command("merge", _merge, "base", "adapter", "out")
    command("diff", _diff, "one", "other")
    return parser


# --- reading either format ---


def _is_peft(path: Path) -> bool:
    from . import peft

    return path.name in (peft.CONFIG, peft.WEIGHTS) or (path / peft.CONFIG).exists()


def _read(path: Path, ignore: Sequence[str]) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of a folder, of either format."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if not _is_peft(path) and path.is_dir() and not any(path.glob("adapter_model.*")):
        from . import checkpoint

        return checkpoint.describe(path).config, checkpoint.restore(path)
    from . import peft

    return _peft_alone.adapter_alone(peft.read_files(path, ignore=ignore))


# --- commands ---


def _inspect(given: Any) -> int:
    """Print a table of an adapter: targets, ranks, norms, spectrum."""
    _, adapter = _read(given.path, given.ignore)
    rows = [_row(path, entry) for path, entry in _with_progress(adapter)]
    print(_table(_HEAD, rows))
    values = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    print(f"{len(adapter)} targets, {values:,} values, {size:,} bytes")
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


def _told(entry: Any) -> Any:
    """Returns slices as the factors they stand for, and rows as their values."""
    if isinstance(entry, SlicedFactors):
        return entry.lowered()
    return entry.values if isinstance(entry, TrainedRows) else entry


def _row(path: str, entry: Any) -> tuple[str, ...]:
    if isinstance(entry, TrainedRows):
        whole = _row(path, entry.values)
        return (path, _shape(entry.kernel_shape), f"{len(entry.rows)} rows", *whole[3:])
    entry = _told(entry)
    if not isinstance(entry, LoraFactors):
        shape, norm = _shape(entry.shape), f"{_norm(entry):.4g}"
        return (path, shape, "full", "", str(entry.dtype), norm, "", "", "", "")
    values = _spectrum.singular_values(_on_host(entry))
    return (
        path,
        _shape(entry.kernel_shape),
        f"{entry.rank}{' dora' if entry.magnitude is not None else ''}",
        f"{entry.scaling:g}",
        str(entry.a.dtype),
        f"{_norm(entry.a):.4g}",
        f"{_norm(entry.b):.4g}",
        f"{np.linalg.norm(values):.4g}",
        f"{values.max():.4g}",
        str(_spectrum.effective_rank(values).max()),
    )


def _convert(given: Any) -> int:
    """Write an adapter in the other format: PEFT from a checkpoint, or the reverse."""
    configs, adapter = _read(given.source, given.ignore)
    if _is_peft(given.source):
        from . import checkpoint

        checkpoint.save(
            given.target, adapter, config=configs, overwrite=given.overwrite
        )
    else:
        _write_peft(given, configs, adapter)
    print(f"{given.target}: {len(adapter)} targets")
    return SAME


def _write_peft(given: Any, configs: Configs, adapter: dict[str, Any]) -> None:
    from . import peft

    shapes = {
        path: jax.ShapeDtypeStruct(entry.kernel_shape, entry.a.dtype)
        if isinstance(entry, LoraFactors)
        else entry
        for path, entry in adapter.items()
    }
    peft.save(
        given.target,
        shapes,
        adapter,
        configs,
        peft.names(given.names) if given.names else None,
        profile=given.profile,
        base_model=given.base_model,
        overwrite=given.overwrite,
    )


def _merge(given: Any) -> int:
    """Write a Hugging Face model with a PEFT adapter merged into its weights."""
    from . import weights

    def progress(done: int, total: int, name: str) -> None:
        print(f"{done}/{total} tensors, {name}", file=sys.stderr)

    weights.merge_folder(
        given.base, given.adapter, given.out, ignore=given.ignore, progress=progress
    )
    print(f"{given.out}: merged")
    return SAME


def _diff(given: Any) -> int:
    """Compare two adapters; exit code 1 if they differ."""
    (_, one), (_, other) = (_read(p, given.ignore) for p in (given.one, given.other))
    rows = [(p, "", f"only in {given.one}") for p in one if p not in other]
    rows += [(p, "", f"only in {given.other}") for p in other if p not in one]
    both = {path: entry for path, entry in one.items() if path in other}
    for path, entry in _with_progress(both):
        told = _difference(entry, other[path])
        if told:
            rows.append((path, *told))
    if not rows:
        print(f"the same: {len(one)} targets")
        return SAME
    print(_table(("path", "‖ΔW₁−ΔW₂‖/‖ΔW₁‖", "what differs"), rows))
    return DIFFERENT


def _difference(one: Any, other: Any) -> tuple[str, str] | None:
    """Returns the relative distance of two entries, and what differs, if at all."""
    one, other = _told(one), _told(other)
    kinds = [isinstance(entry, LoraFactors) for entry in (one, other)]
    if kinds[0] != kinds[1]:
        return "", "factors and a whole leaf"
    if kinds[0] and (one.magnitude is None) != (other.magnitude is None):
        return "", "DoRA's magnitude"
    leaves = [jax.tree.leaves(entry) for entry in (one, other)]
    what = []
    if kinds[0]:
        fields = ("rank", "scaling", "kernel_shape", "axes")
        what = [f for f in fields if getattr(one, f) != getattr(other, f)]
    pairs = list(zip(*leaves, strict=True))
    what += ["dtype"] if any(x.dtype != y.dtype for x, y in pairs) else []
    if not what and all(np.array_equal(x, y) for x, y in pairs):
        return None
    return _relative(one, other), ", ".join(what) or "values"


def _relative(one: Any, other: Any) -> str:
    if not isinstance(one, LoraFactors):
        if one.shape != other.shape:
            return ""
        own, apart = _norm(one), _norm(np.subtract(one, other, dtype=np.float64))
    elif one.axes != other.axes or one.kernel_shape != other.kernel_shape:
        return ""
    else:
        one, other = _on_host(one), _on_host(other)
        own = float(np.linalg.norm(_spectrum.singular_values(one)))
        apart = _spectrum.distance(one, other)
    return f"{apart / own:.3g}" if own else f"{apart:.3g} (of zero)"


# --- printing ---


def _with_progress(adapter: dict[str, Any]) -> Any:
    """Yields the items; a line on a terminal says how far it has come."""
    shown = sys.stderr.isatty()
    for number, item in enumerate(adapter.items(), 1):
        yield item
        if shown:
            end = "\r" if number < len(adapter) else "\r\033[K"
            print(f"{number}/{len(adapter)}", end=end, file=sys.stderr, flush=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(padded)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _on_host(factors: LoraFactors) -> LoraFactors:
    """Returns factors of NumPy arrays, whose spectrum is one in float64."""
    return jax.tree.map(np.asarray, factors)


def _norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))


if __name__ == "__main__":
    sys.exit(main())
