"""The weights of a Hugging Face model: a folder of safetensors, read and merged.

A second door to safetensors. `open_weights` gives a torch model's tensors by name
without reading them all, as `jlora.peft.params_from_torch` takes them; `merge_folder`
adds an adapter into such a folder, one file at a time.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ._files.model_files import Weights as Weights
from ._files.model_files import weights_of
from ._formats import mlx
from ._peft.files import read_files
from ._peft.merge import check_places
from ._peft.merge_files import merge_files
from ._peft.read import without
from ._peft.torch_base import torch_base as torch_base


def open_weights(path: Any) -> Weights:
    """Returns the tensors of a safetensors file, or of a model's folder, by name.

    A folder's are those that transformers loads, of `model.safetensors` or else of the
    files that its index names, and without either those of every file. What else lies
    there, such as Mistral's `consolidated.safetensors`, the same weights under other
    names, is left. Only the headers are read, and every claim in them is checked.

    Args:
        path: the file or the folder.

    Raises:
        FileNotFoundError: if there is none, or one that the index names is missing.
        UnsafeFormatError: if a file is a link or none of a file system's.
        CorruptFileError: if a header or the index is not what the format allows.
        AdapterError: if two files have a tensor of the same name.
    """
    return weights_of(Path(path))


def merge_folder(
    base: Any,
    adapter: Any,
    out: Any,
    *,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    extend_tables: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    revision: str | None = None,
) -> None:
    """Writes a Hugging Face model with an adapter merged into its weights.

    The adapter is a folder of PEFT's, or of MLX's where the modules have the names of
    the weights, as MLX saves them or, of experts, as torch does; the factors of a tied
    table then act in the head too.

    Each sum is formed in float32 (or the dtype of the weight, if wider) and rounded
    once to the dtype of the weight. Files are written one after the other, under the
    names of the base, with the other files of its folder, but for weights that
    `open_weights` does not take and their indices: they would not be merged. `out`
    appears when it is complete.

    Tensors have the names that they have on disk, and adapters those of the modules of
    transformers, before or since its version 5, of the whole model or of its language
    model alone: `model_type` says which modules were renamed and which experts are
    packed.

    Where table and head of a language model are one tensor and the adapter changes one
    of them, or both apart, two are written, and `config.json` says so by
    `tie_word_embeddings`, as transformers does. Of tables that the adapter has tied
    (`ensure_weight_tying`) one is.

    Args:
        base: the folder of the model.
        adapter: the folder of the adapter, or a repository of the Hub, as for
            `jlora.peft.load`.
        out: the folder to write, which must not exist.
        ignore: fields of the adapter's config to do without, as for `jlora.peft.load`.
        leave_out: modules of the adapter that are not merged, as for `jlora.peft.load`.
        extend_tables: whether tables take the rows that were added to the vocabulary
            before the adapter was trained, which its file has then; `config.json` has
            the new number of them.
        progress: called with the number of tensors written, of all, and the file.
        revision: of the adapter's repository, as for `jlora.peft.load`.

    Raises:
        FileExistsError: if `out` exists.
        NotADirectoryError: if `base` is one file of a model.
        UnsupportedFeatureError: if weights that change are quantised: of another dtype
            than float16, bfloat16, float32 or float64. All are named.
        NonFiniteError: if sums are too large for the dtype of their weight. All are
            named.
        AdapterError: if the adapter does not fit the weights, or cannot be read.
    """
    check_places(Path(base), Path(out))
    if mlx.holds(Path(adapter)):
        names = weights_of(Path(base))
        read = mlx.as_peft(Path(adapter), ignore=ignore, names=names)
    else:
        read = read_files(adapter, ignore=ignore, revision=revision)
    merge_files(
        Path(base),
        without(read, leave_out),
        Path(out),
        extend_tables=extend_tables,
        progress=progress,
    )
