"""Adapters in the format of Hugging Face PEFT, and the weights of torch models.

The door to safetensors: `load` and `save` read and write a folder with
`adapter_config.json` and `adapter_model.safetensors`, as PEFT, transformers and vLLM
do; `params_from_torch` and `params_to_torch` take the base itself through the same map
of names. Files are not trusted: pickles and links are refused, every claim is checked
before memory is taken, and each field of the config is honoured or refused by name.
Both take a repository of the Hugging Face Hub, too, where `huggingface_hub` is
installed (`jlora[hub]`).

Example:
    >>> import jax, jax.numpy as jnp, jlora, jlora.peft, tempfile
    >>> params = {"params": {"query": {"kernel": jnp.ones((5, 7))}}}
    >>> model = lambda params, x: x @ params["params"]["query"]["kernel"]
    >>> config = jlora.LoraConfig("query", rank=2, alpha=6.0)
    >>> adapter = jlora.lora(model, config).init(jax.random.key(0), params, jnp.ones(5))
    >>> folder = tempfile.mkdtemp()
    >>> jlora.peft.save(folder, params, adapter, config)
    >>> found, loaded = jlora.peft.load(folder, params)
    >>> found.rank, found.alpha, loaded["params/query/kernel"].a.shape
    (2, 6.0, (5, 2))
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from ._adapter.config import LoraConfig
from ._adapter.factors import Adapter
from ._errors import AdapterError
from ._files.safetensors import MAX_BYTES as MAX_BYTES
from ._params.given import check_path, described
from ._params.paths import PyTree
from ._params.quantized import dequantized
from ._peft.arrays import on_device, on_host
from ._peft.files import CONFIG as CONFIG
from ._peft.files import WEIGHTS as WEIGHTS
from ._peft.files import read_files as read_files
from ._peft.read import configured_adapter, without
from ._peft.save import save as save
from ._torch.families import names as names
from ._torch.fitting import hint_of_names
from ._torch.leaves import check_all_used, leaf_from_torch, leaves_to_torch
from ._torch.named_params import Base
from ._torch.names import Names, bind_all
from ._torch.names import Rule as Rule


def load(
    path: Any,
    params_or_plan: PyTree,
    names: Names = None,
    *,
    ignore: Collection[str] = (),
    leave_out: Collection[str] = (),
    allow_nonfinite: bool = False,
    max_bytes: int = MAX_BYTES,
    revision: str | None = None,
) -> tuple[LoraConfig | tuple[LoraConfig, ...], Adapter]:
    """Returns the config and the adapter of a PEFT folder, or one of the Hub.

    Args:
        path: the folder, or one of its two files; or a repository of the Hub, text of
            the form "owner/name" that nothing on disk is called. Of that the two files
            are fetched, and no other, into the cache of `huggingface_hub`; HF_TOKEN,
            HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are heeded as ever.
        params_or_plan: the params that the adapter is for, as arrays or shapes, or a
            plan of a `jlora.lora` that adapts them. A plan knows the roles of all axes;
            the params alone will do for kernels under Flax's names.
        names: rules between paths and torch's modules, see `Rule` and `names`; None
            for the mechanical map (`params/a/b/kernel` is `a.b`).
        ignore: fields of the config that are done without, such as "lora_dropout". What
            the keys of the file tell as well they tell then: which modules are adapted
            (for "target_modules", "exclude_modules" and the layers, such as patterns
            that are not matched for files), ranks, biases, magnitudes, what is whole.
        leave_out: modules that are not read, such as "vision_tower": all in whose names
            these whole parts follow each other.
        allow_nonfinite: whether NaNs and infinities are taken.
        max_bytes: the largest file that is read.
        revision: of a repository the branch, the tag or the commit; by default its main
            branch.

    Returns:
        The config, or several where targets differ, for `jlora.lora`; and the adapter,
        with the values and dtypes of the file. Layers of a stack that the file does not
        adapt have zeros in both factors: no delta, no gradient. Experts have factors of
        their own, and the configs say so by `batch`: both are for programs that compute
        all experts for every token, too.

    Raises:
        HubError: if a repository is not there, cannot be reached or may not be read.
        UnsafeFormatError: if a file is a pickle or a link.
        CorruptFileError: if a file is not what its format allows.
        UnsupportedFeatureError: if it needs what jlora has not, by name.
        NonFiniteError: if it holds NaNs or infinities.
        AdapterError: with everything that does not fit the params.
    """
    check_path(path, "jlora.peft.load(path, params, names)")
    files = read_files(
        path,
        ignore=ignore,
        allow_nonfinite=allow_nonfinite,
        max_bytes=max_bytes,
        revision=revision,
    )
    base = Base.of(params_or_plan, names)
    try:
        configs, entries = configured_adapter(without(files, leave_out), base)
    except AdapterError as error:
        hint = hint_of_names(files.modules, params_or_plan, names)
        if type(error) is not AdapterError or not hint:
            raise
        raise AdapterError(f"{error}\n{hint}") from None
    return configs, jax.tree.map(on_device, entries)


def params_from_torch(
    state_dict: Mapping[str, Any],
    params_or_plan: PyTree,
    names: Names = None,
    *,
    ignore: Collection[str] = (),
) -> PyTree:
    """Returns params with the weights of a torch model.

    Args:
        state_dict: NumPy arrays by torch's names; any mapping, such as one that reads a
            tensor when it is asked for it.
        params_or_plan: the params, as arrays or shapes, or a plan of them that knows
            the roles of the kernels' axes.
        names: as for `load`.
        ignore: names of tensors, or how they end, that no leaf takes.

    Returns:
        A tree like the params, of NumPy arrays in the dtypes of the params.

    Raises:
        AdapterError: with every leaf without a rule or a tensor, every tensor without a
            leaf, or the first that does not fit.

    Example:
        >>> import numpy as np, jlora.peft
        >>> params = {"params": {"out": {"kernel": np.zeros((2, 3), np.float32)}}}
        >>> weights = {"out.weight": np.arange(6.0).reshape(3, 2)}
        >>> jlora.peft.params_from_torch(weights, params)["params"]["out"]["kernel"]
        array([[0., 2., 4.],
               [1., 3., 5.]], dtype=float32)
    """
    nested = isinstance(state_dict, dict) and any(
        isinstance(value, Mapping) for value in state_dict.values()
    )
    if nested or not isinstance(state_dict, Mapping):
        raise TypeError(
            "`state_dict` is a mapping from torch's names to arrays, got "
            f"{described(state_dict)}. The order is "
            "`jlora.peft.params_from_torch(state_dict, params, names)`"
        )
    base = Base.of(params_or_plan, names)
    bind_all(list(base.leaves), names)
    wanted = {n: path for path in base.leaves for _, n in base.names_of(path)}
    missing = [f"{n!r} ({path!r})" for n, path in wanted.items() if n not in state_dict]
    if missing:
        raise AdapterError(
            f"the state dict lacks {len(missing)} tensors: {', '.join(missing[:10])}"
        )
    check_all_used(base, state_dict, ignore)
    get = lambda name: np.asarray(state_dict[name])
    new = {
        path: leaf_from_torch(base, path, get).astype(leaf.dtype)
        for path, leaf in base.leaves.items()
    }
    return base.params.replace(new)


def params_to_torch(
    params: PyTree, names: Names = None, *, plan: Any = None
) -> dict[str, np.ndarray]:
    """Returns the state dict of the torch model with these params.

    Args:
        params: the params, as arrays; merged ones, for example. Quantised kernels are
            made dense.
        names: as for `load`.
        plan: a plan that knows the roles of the kernels' axes, where they are in doubt.

    Raises:
        AdapterError: if a leaf has no rule, or its axes are in doubt.

    Example:
        >>> import numpy as np, jlora.peft
        >>> params = {"params": {"out": {"kernel": np.zeros((2, 3), np.float32)}}}
        >>> jlora.peft.params_to_torch(params)["out.weight"].shape
        (3, 2)
    """
    known = {t.path: t.axes for t in plan.targets if t.axes} if plan else {}
    base = Base.of(params, names, known)
    bind_all(list(base.leaves), names)
    value = lambda path: np.asarray(on_host(dequantized(base.leaves[path], path)))
    return leaves_to_torch(base, base.leaves, value)
