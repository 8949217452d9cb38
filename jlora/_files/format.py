"""What a file format of adapters is to the command line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Configs: TypeAlias = Any  # a `LoraConfig`, or several


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is printed of an adapter that its files describe, and do not tell whole.

    Attributes:
        head: the names of the columns.
        rows: a line for each module, and for each leaf that is trained whole.
        total: what they are together.
        untold: what the files do not tell.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: str
    untold: str | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format of adapters: how its files are known, read and written.

    Attributes:
        name: for messages.
        holds: whether a path that exists has an adapter in the format; it may be asked
            for any file or folder.
        read: `read(path, *, ignore=())` returns the configs, and the entries by path,
            of what is there, without the params that the adapter was made for; `ignore`
            are fields of the format's own config to do without. What is wrong with the
            files is an `AdapterError`.
        write: `write(path, adapter, configs, *, overwrite=False, **options)` writes
            them; a FileExistsError if something is there that may not be replaced. None
            of a format that is only read.
        suffix: how the names of its files end, if the format is one of files; that of
            the target chooses the format to write.
        options: those of `python -m jlora convert` that `write` takes: "names",
            "base_model", "profile", "model_type", "prefix", "architecture", "base".
        placing: those that `read` takes, to place what is there in a model: "names",
            "params", the shapes of its leaves by path, and "base", its folder; "alpha",
            which `inspect` and `diff` take, too.
        told_in_part: `told_in_part(path, *, ignore=())` says what the files do not tell
            of an adapter without its params, which can be shown and is not converted
            then, or None.
        shown: `shown(path)` gives what `inspect` prints of an adapter whose entries
            only its params would tell, or None where `read` gives the entries.
        of_torch: whether what `read` gives without params has the names and layouts of
            torch's modules, so that a kernel of several input axes is that of a
            convolution. `write` takes that as `convolutions=True` then.
        modules: `modules(path, *, ignore=(), base=None)` gives the torch modules with
            factors, for `merge`, or None where that reads the files itself.
        lost: `lost(path, target, *, ignore=())` says what the format with the name
            `target` would not keep of the files, which are not converted to it then, or
            None.
        dropped: `dropped(configs)` says what this format does not keep of an adapter,
            and does without, or None.
    """

    name: str
    holds: Callable[[Path], bool]
    read: Callable[..., tuple[Configs, dict[str, Any]]]
    write: Callable[..., None] | None
    suffix: str | None = None
    options: tuple[str, ...] = ()
    placing: tuple[str, ...] = ()
    told_in_part: Callable[..., str | None] = lambda path, *, ignore=(): None
    shown: Callable[[Path], Shown | None] = lambda path: None
    of_torch: bool = False
    modules: Callable[..., Any] | None = None
    lost: Callable[..., str | None] = lambda path, target, *, ignore=(): None
    dropped: Callable[[Configs], str | None] = lambda configs: None
