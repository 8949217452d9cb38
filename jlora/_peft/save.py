"""An adapter as the files of a PEFT folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from .._adapter.check import check_adapter
from .._adapter.config import LoraConfig
from .._adapter.entries import axes_of, lowered
from .._adapter.factors import LoraFactors
from .._adapter.instead import check_order
from .._errors import AdapterError
from .._files.atomic import write_files
from .._files.hub import check_repository, push
from .._files.processes import on_first
from .._files.safetensors import check_finite, file_bytes
from .._params.given import check_path, described
from .._params.paths import PyTree
from .._torch.assemble import modules_of
from .._torch.layout import spread
from .._torch.modules import by_name
from .._torch.named_params import Base
from .._torch.names import Names, bind_all
from .arrays import named_arrays, on_host
from .config_file import config_json
from .files import CONFIG, WEIGHTS, weights_bytes
from .keys import PREFIX
from .own import KINDS, own_files, own_json
from .rows import has_rows, write_rows
from .vllm import for_vllm
from .whole import write_whole
from .write import (
    check_some,
    check_writable,
    config_of,
    layers_of,
    tensors_of,
    with_attention_outputs,
)


def save(
    path: Any,
    params_or_plan: PyTree,
    adapter: Mapping[str, Any],
    config: LoraConfig | Sequence[LoraConfig] = (),
    names: Names = None,
    *,
    profile: str = "peft",
    kind: str = "LORA",
    base_model: str | None = None,
    task_type: str | None = None,
    model_type: str | None = None,
    overwrite: bool = False,
    push_to: str | None = None,
) -> None:
    """Writes an adapter as a PEFT folder, and sends it to the Hub if that is asked for.

    Values and dtypes are those of the adapter; factors of different dtypes that become
    one module's are written in one that holds the values of all. The same adapter gives
    the same bytes, in whatever order its paths are.

    Experts have factors of their own in PEFT. Where those of an adapter share one, as
    they do in a program that computes all of them for every token, it is repeated.

    PEFT trains modules whole, with all that is below them, and those whose names end
    with the name of one. What of these the adapter lacks is written along, with the
    values of the params.

    Both files are written beside, read back and renamed. Where they replace others, the
    old config is taken away first and the new one comes last: a save that is killed
    leaves the old pair, the new one, or a folder without a config, which every reader
    refuses. On several hosts every process calls it, and the first one writes and
    sends; what goes wrong there is raised on all of them.

    Args:
        path: the folder.
        params_or_plan: what the adapter was made for, as for `load`.
        adapter: the factors by path, and arrays for what is trained whole.
        config: the config, or configs, of the adapter: alphas are written as they were
            given. Without it they are worked out from the scalings.
        names: as for `load`.
        profile: "peft", or "vllm" for what vLLM and tpu-inference load: one rank and
            one alpha for all modules, experts apart, and nothing that they would drop.
        kind: "LORA", in whose files what other variants change is written as plain
            factors; or "LOHA", "LOKR", "VERA", "IA3" for PEFT's own files of these, of
            an adapter all of whose entries are that variant. VeRA's projections are
            written along. jlora reads such a file as plain factors again, and scales
            as scales.
        base_model: the name of the base on the Hub, or its folder.
        task_type: PEFT's, such as "CAUSAL_LM".
        model_type: the kind of the base, as its `config.json` has it, for "vllm": the
            experts of "gpt_oss" and "qwen3_5_moe" stay packed.
        overwrite: whether an adapter that is there may be replaced, in the folder and
            in the repository, whose history keeps the old one.
        push_to: a repository of the Hub, "owner/name": when the folder is written, its
            two files are sent there in one commit on the main branch. One that is not
            there is made, and is private.

    Raises:
        FileExistsError: if one is there and `overwrite` is False.
        HubError: if the repository cannot be reached or may not be written; the folder
            is written then.
        NonFiniteError: if the adapter holds NaNs or infinities.
        UnsupportedFeatureError: if the profile lacks what the adapter needs.
        AdapterError: if the adapter is empty, does not fit the params, or has no names
            or the same for several leaves.
    """
    if profile not in ("peft", "vllm"):
        raise ValueError(f"`profile` is 'peft' or 'vllm', got {profile!r}")
    if kind not in KINDS or (kind != "LORA" and profile != "peft"):
        raise ValueError(f"`kind` is one of {KINDS}, for 'peft', got {kind!r}")
    check_path(path, _ORDER)
    if push_to is not None:
        repository = push_to
        on_first(lambda: check_repository(repository))
    _check_order(params_or_plan, adapter, config)
    check_writable(adapter, kind)
    several = (config,) if isinstance(config, LoraConfig) else tuple(config)
    about = {"base_model": base_model, "task_type": task_type}
    if kind == "LORA":
        how = profile, model_type
        files = _lora_files(params_or_plan, adapter, several, names, how, about)
    else:
        files = _own_files(params_or_plan, adapter, several, names, kind, about)

    def write() -> None:
        write_files(Path(path), files, overwrite=overwrite)
        if push_to is not None:
            push(push_to, files, overwrite=overwrite)

    on_first(write)


def _lora_files(
    params_or_plan: PyTree,
    adapter: Mapping[str, Any],
    configs: Sequence[LoraConfig],
    names: Names,
    how: tuple[str, str | None],
    about: Mapping[str, str | None],
) -> dict[str, bytes]:
    """Returns the files of an adapter as LoRA, whatever its variants."""
    profile, model_type = how
    given = sorted(adapter.items())
    rows = {p: jax.tree.map(on_host, e) for p, e in given if has_rows(e)}
    given = [(path, entry) for path, entry in given if path not in rows]
    entries = {p: jax.tree.map(on_host, lowered(e, None)) for p, e in given}
    factors = {p: e for p, e in entries.items() if isinstance(e, LoraFactors)}
    arrays = {p: e for p, e in entries.items() if not isinstance(e, LoraFactors)}
    axes = {path: entry.axes for path, entry in {**factors, **rows}.items()}
    base = Base.of(params_or_plan, names, axes)
    check_adapter(base.params, adapter)
    bind_all([*entries, *rows], names)
    check_finite(named_arrays({**entries, **rows}), "the adapter")
    factors = {p: spread(f, base.axes(p)) for p, f in factors.items()}
    modules = with_attention_outputs(modules_of(factors, base))
    check_some(modules, {**entries, **rows})
    if profile == "vllm":
        modules = for_vllm(modules, [*arrays, *rows], model_type)
    whole, fields = write_whole(arrays, list(by_name(modules)), base)
    trained, which = write_rows(rows, base)
    whole, fields = whole | trained, fields | which
    fields |= layers_of(adapter, modules)
    said = dataclasses.replace(config_of(modules, configs, base), **fields)
    if isinstance(said.target_modules, str):  # beside a regex PEFT refuses layers
        said = dataclasses.replace(said, layers_to_transform=None)
    tensors = {**tensors_of(modules), **{PREFIX + n: t for n, t in whole.items()}}
    plain = [m.steps for m in modules if not m.is_parameter]
    turned = any("fan_in_fan_out" in steps for steps in plain)
    scalings = {m.name: m.scaling for m in modules if not m.brought_by}
    return {
        WEIGHTS: weights_bytes(tensors, scalings),
        CONFIG: config_json(said, fan_in_fan_out=turned, **about),
    }


def _own_files(
    params_or_plan: PyTree,
    adapter: Mapping[str, Any],
    configs: Sequence[LoraConfig],
    names: Names,
    kind: str,
    about: Mapping[str, str | None],
) -> dict[str, bytes]:
    """Returns the files of an adapter as PEFT's own of its variant."""
    if not adapter:
        raise AdapterError("the adapter cannot be saved: it is empty")
    entries = {p: jax.tree.map(on_host, e) for p, e in sorted(adapter.items())}
    axes = {p: a for p, e in entries.items() if (a := axes_of(e)) is not None}
    base = Base.of(params_or_plan, names, axes)
    check_adapter(base.params, adapter)
    bind_all([*entries], names)
    check_finite(named_arrays(entries), "the adapter")
    tensors, fields = own_files(kind, entries, configs, base)
    if not tensors:
        raise AdapterError("the adapter cannot be saved: all of it is zero")
    weights = file_bytes(tensors, lambda dense: {"format": "pt"})
    return {WEIGHTS: weights, CONFIG: own_json(fields, **about)}


_ORDER = "jlora.peft.save(path, params_or_plan, adapter, config, names)"


def _check_order(params_or_plan: Any, adapter: Any, config: Any) -> None:
    """Raises for arguments at each other's places.

    Raises:
        TypeError: that says the order.
        AdapterError: likewise, if the params and the adapter are swapped.
    """
    check_order(params_or_plan, adapter, f"The order is `{_ORDER}`")
    configs = config if isinstance(config, list | tuple) else (config,)
    wrong = [one for one in configs if not isinstance(one, LoraConfig)]
    if wrong:
        raise TypeError(
            f"`config` is one or more `LoraConfig`, got {described(wrong[0])}. The "
            f"order is `{_ORDER}`"
        )
