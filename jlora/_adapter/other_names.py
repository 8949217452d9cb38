"""What other libraries call the fields of a config, for who comes from there."""

import difflib
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

# The field that means the same, or a sentence on what does.
OTHER_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "scale": "`alpha=`, for scaling = alpha/rank",
    "scaling": "`alpha=`, for scaling = alpha/rank",
    "target_modules": "target",
    "target_parameters": "target",
    "targets": "target",
    "module_path": "target",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "exclude_modules": "exclude",
    "lora_bias": "bias",
    "init_lora_weights": "init",
    "trainable_token_indices": "rows",
    "projection_prng_key": "projection_seed",
    "modules_to_save": "a config of its own, `jlora.LoraConfig(pattern, full=True)`",
    "rank_pattern": "several configs, of which the first that matches decides",
    "alpha_pattern": "several configs, of which the first that matches decides",
    "fan_in_fan_out": "nothing: the program tells which axes are inputs",
    "eva_config": "`jlora.eva`",
    "corda_config": "`jlora.corda`",
    "loftq_config": "`jlora.loftq`",
    "lora_ga_config": "`jlora.lora_ga`",
    "weight_qtype": "`jlora.quantize`",
    "task_type": "an argument of `jlora.peft.save`",
    "base_model_name_or_path": "`base_model` of `jlora.peft.save`",
    "peft_type": "nothing: leave it out",
    "inference_mode": "nothing: leave it out",
}
# What fills factors by looking at kernels, gradients or inputs, in PEFT a value of
# `init_lora_weights`.
FROM_DATA = ("corda", "eva", "loftq", "lora_ga", "milora", "olora", "pissa")


def knows_other_names(cls: Class) -> Class:
    """Returns a class of keyword arguments whose errors know other libraries' names."""
    init = cls.__init__
    parameters = inspect.signature(init).parameters
    fields = list(parameters)[1:]
    kinds = [parameters[name].kind for name in fields]
    positional = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        _check(cls.__name__, fields, positional, args, kwargs)
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


def _check(
    name: str,
    fields: list[str],
    positional: int,
    args: Collection[Any],
    kwargs: Mapping[str, Any],
) -> None:
    if len(args) > positional:
        given = ", ".join(map(repr, args))
        raise TypeError(
            f"`{name}` takes {positional} argument by position, its {fields[0]}, got "
            f"{given}; give the others by name, as in `{name}({fields[0]}, rank=8)`"
        )
    unknown = [key for key in kwargs if key not in fields]
    if unknown:
        told = "; ".join(_told(key, kwargs[key], fields) for key in unknown)
        raise TypeError(f"`{name}` has no {told}. Its fields are {', '.join(fields)}")


def _told(key: str, value: Any, fields: list[str]) -> str:
    if key == "init_lora_weights" and isinstance(value, str):
        method = value.lower().partition("_niter")[0].replace("-", "_")
        if method in FROM_DATA:
            return f"`{key}`: call `jlora.{method}` with a new adapter"
    if key in ("layers_pattern", "layers_to_transform"):
        field = (
            "`layers=`" if "layers" in fields else "a pattern such as `layers_[0-3]`"
        )
        return f"`{key}`: give {field}"
    same = OTHER_NAMES.get(key)
    if same in fields:
        return f"`{key}`: here it is `{same}=`"
    if same is not None:
        return f"`{key}`: what does that here is {same}"
    near = difflib.get_close_matches(key, fields, n=1)
    return f"`{key}`" + (f" (is `{near[0]}=` meant?)" if near else "")
