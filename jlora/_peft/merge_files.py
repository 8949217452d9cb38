"""The folder of a model, or of a pipeline of models, with an adapter merged into it."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .._errors import AdapterError
from .._files.model_files import model_config, parts_of, weights_of
from .._torch.modules import TorchModule
from .config import PeftConfig, fields, told_by_keys
from .merge import check_places, copy_rest, write_merged
from .read import AdapterFiles
from .torch_base import changes_of

Progress = Callable[[int, int, str], None]


def merge_files(
    source: Path,
    files: AdapterFiles,
    target: Path,
    *,
    extend_tables: bool = False,
    progress: Progress = lambda done, total, name: None,
) -> None:
    """Writes a model with an adapter merged, see `jlora.weights.merge_folder`.

    Args:
        source: the folder of the model.
        files: what the adapter's files hold.
        target: the folder to write, which appears when it is complete.
        extend_tables: as for `merge_folder`.
        progress: as for `merge_folder`.
    """
    weights = weights_of(source)
    config = model_config(source)
    changes = changes_of(weights, files, config, extend_tables=extend_tables)
    with _beside(target) as beside:
        copy_rest(source, beside, weights.files)
        write_merged(changes, beside, progress)


def merge_modules(
    source: Path,
    modules: Sequence[TorchModule],
    target: Path,
    where: str,
    progress: Progress = lambda done, total, name: None,
) -> None:
    """Writes a model, or a pipeline of diffusers, with torch modules merged.

    Of a pipeline the names of modules begin with that of its part, `unet.…`. So may
    those for a model that is one part.

    Args:
        source: the folder of the model or the pipeline.
        modules: with their scalings.
        target: the folder to write, which must not exist.
        where: the name of the adapter's file, for messages.
        progress: as for `merge_folder`.

    Raises:
        FileExistsError: if `target` exists.
        AdapterError: if the modules do not fit the weights.
    """
    check_places(source, target)
    parts = parts_of(source)
    if not parts:
        named = _without_part(modules, source)
        merge_files(source, _files(named, where), target, progress=progress)
        return
    by_part: dict[str, list[TorchModule]] = {}
    for module in modules:
        by_part.setdefault(module.name.partition(".")[0], []).append(module)
    if strangers := sorted(set(by_part) - set(parts)):
        raise AdapterError(
            f"{where} adapts {strangers[:5]}, and {source} has weights of "
            f"{[*parts]} alone"
        )
    with _beside(target) as beside:
        merged = [parts[part] for part in by_part]
        chosen = lambda folder, names: [n for n in names if Path(folder, n) in merged]
        shutil.copytree(source, beside, ignore=chosen, dirs_exist_ok=True)
        for part, own in by_part.items():
            files = _files([_renamed(module) for module in own], where)
            merge_files(parts[part], files, beside / part, progress=progress)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Gives a folder that becomes `target` when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield beside
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _without_part(modules: Sequence[TorchModule], source: Path) -> list[TorchModule]:
    """Returns the modules by their names in a model that may be one part."""
    weights = weights_of(source)
    there = lambda own: any(f"{module.name}.weight" in weights for module in own)
    parts = {module.name.partition(".")[0] for module in modules}
    bare = [_renamed(module) for module in modules if "." in module.name]
    alone = len(parts) == 1 and len(bare) == len(modules)
    return bare if alone and not there(modules) and there(bare) else list(modules)


def _renamed(module: TorchModule) -> TorchModule:
    return dataclasses.replace(module, name=module.name.partition(".")[2])


def _files(modules: Sequence[TorchModule], where: str) -> AdapterFiles:
    """Returns modules as what a folder of PEFT holds, chosen by its keys alone."""
    config = PeftConfig(ignored=told_by_keys(fields()))
    scalings = {module.name: module.scaling for module in modules}
    named = {module.name: module for module in modules}
    return AdapterFiles(config, named, {}, where, scalings=scalings)
