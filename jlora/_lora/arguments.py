"""Mistakes with the arguments of `jlora.lora`, each named as that mistake."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._adapter.config import LoraConfig
from .._params.given import described
from .._params.paths import FlatParams, PyTree, is_floating
from .._plan.match import match

FORGOTTEN_KEY = (
    ". It is the first argument, before those of the function, as in "
    "`lora.init(jax.random.key(0), params, x)`: is it forgotten?"
)

# What is to be given in place of a model, by the library of its class.
_MODELS = {
    "flax.linen": "the Linen module {name}: give its apply function, as in "
    "`jlora.lora(model.apply, config)`, or use `jlora.linen.wrap(model, config)`",
    "flax.nnx": "the NNX model {name}, which holds its params: use "
    "`jlora.nnx.wrap(model, config, x)`",
    "equinox": "the Equinox model {name}, which holds its params: take them apart by "
    "`params, static = eqx.partition(model, eqx.is_array)`, and give "
    "`lambda params, x: eqx.combine(params, static)(x)`",
    "keras": "the Keras model {name}, which holds its params: give a function of them "
    "that calls `model.stateless_call`",
    "torch": "the torch module {name}: a function of JAX arrays is needed",
}


def check_function(fn: Any) -> None:
    """Raises unless `fn` is a function that can take params.

    Raises:
        TypeError: that says what to give in place of a model.
    """
    takes = "`jlora.lora` takes a function of the params"
    if library := _model_library(fn):
        name = fn.__name__ if isinstance(fn, type) else type(_owner(fn)).__name__
        raise TypeError(f"{takes}, got {_MODELS[library].format(name=name)}")
    if callable(fn):
        return
    if isinstance(fn, LoraConfig):
        raise TypeError(f"{takes} first and the config second: they are swapped")
    found = [n for n in ("apply", "apply_fn") if callable(getattr(fn, n, None))]
    hint = f"; give its `.{found[0]}`" if found else ""
    raise TypeError(f"{takes}, got {described(fn)}{hint}")


def check_configs(config: Any) -> tuple[LoraConfig, ...]:
    """Returns one config, or several, as a tuple.

    Raises:
        TypeError: if they are none.
    """
    several = tuple(config) if isinstance(config, list | tuple) else (config,)
    if several and all(isinstance(one, LoraConfig) for one in several):
        return several
    wrong = next((one for one in several if not isinstance(one, LoraConfig)), None)
    told = described(wrong) if several else "an empty list"
    hint = ""
    if isinstance(wrong, str):
        hint = f": give `jlora.LoraConfig({wrong!r})`"
    elif wrong is LoraConfig:
        hint = ": call it, `jlora.LoraConfig(target, rank=8)`"
    elif type(wrong).__name__ == "LoraConfig":
        hint = f" of {type(wrong).__module__}: give `jlora.LoraConfig(target, rank=8)`"
    elif isinstance(wrong, Mapping):
        hint = ": give `jlora.LoraConfig(**config)`"
    raise TypeError(f"`config` must be one or more `LoraConfig`, got {told}{hint}")


def _owner(fn: Any) -> Any:
    """Returns the model whose call a callable is, or the callable without wrappers."""
    while True:
        bound = getattr(fn, "__self__", None)
        if bound is not None and getattr(fn, "__name__", "") == "__call__":
            return bound
        inner = fn.func if isinstance(fn, functools.partial) else None
        inner = inner or getattr(fn, "__wrapped__", None)
        if inner is None or bound is not None or isinstance(fn, type):
            return fn
        fn = inner


def _model_library(fn: Any) -> str | None:
    """Returns the library of a model, or of a class of models; None for a function.

    They are known by the names of their classes, so that no library need be imported.
    """
    owner = _owner(fn)
    kind = owner if isinstance(owner, type) else type(owner)
    for base in kind.__mro__:
        for library in _MODELS:
            named = base.__name__ in ("Module", "Layer", "Model")
            if named and f"{base.__module__}.".startswith((f"{library}.", "torch.nn.")):
                return _that_holds_params(library, owner)
    return None


def _that_holds_params(library: str, owner: Any) -> str | None:
    """Returns the library, but for Equinox's wrappers of functions."""
    if library != "equinox" or isinstance(owner, type):
        return library
    return library if any(map(is_floating, jax.tree.leaves(owner))) else None


# where the params are


def check_place_of_params(
    fn: Callable[..., Any],
    configs: Sequence[LoraConfig],
    argnum: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Raises if one bare array is taken for the params, and others look like them.

    Or some arrays in a dict or list, where configs without a target would adapt them.

    Raises:
        TypeError: that says where the params are.
    """
    flat = FlatParams.of(args[argnum])
    inputs = not any("/" in path for path in flat.paths)
    if not inputs or _looks_like_params(args[argnum]):
        return
    if flat.paths != ("",) and all(config.target for config in configs):
        return
    others = {**dict(enumerate(args)), **kwargs}
    del others[argnum]
    place = next(
        (key for key, tree in others.items() if _looks_like_params(tree)), None
    )
    if place is not None or (flat.paths == ("",) and _closed_over(fn)):
        raise TypeError(where_params_are(fn, configs, argnum, args, kwargs, place))


def where_params_are(
    fn: Callable[..., Any],
    configs: Sequence[LoraConfig],
    argnum: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    place: int | str | None = None,
) -> str:
    """Returns a sentence on where the params seem to be; empty if where they should.

    Args:
        fn: the function.
        configs: the configs, of which one matches leaves of the params.
        argnum: which argument is taken for them.
        args: the positional arguments.
        kwargs: the keyword arguments.
        place: which argument they are, if that is known.
    """
    if place is None and _looks_like_params(args[argnum]):
        return ""
    given = f"argument {argnum} is taken for the params (`argnum={argnum}`), and is "
    given += described(args[argnum])
    if place is None:
        place = _matched_elsewhere(configs, argnum, args, kwargs)
    if isinstance(place, int):
        return f"{given}. The params seem to be argument {place}: `argnum={place}`"
    if place is not None:
        return (
            f"{given}. The params seem to be the keyword argument {place!r}: give a "
            "function that takes them by position"
        )
    if closed := _closed_over(fn):
        return (
            f"{given}. The function closes over {closed}: params are an argument of "
            f"the function, as in `lambda params, x: ...`, or are not adapted"
        )
    if FlatParams.of(args[argnum]).paths == ("",):
        return (
            f"{given}: params are a tree that the function takes as an argument; say "
            "which by `argnum`"
        )
    return ""


def _matched_elsewhere(
    configs: Sequence[LoraConfig],
    argnum: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> int | str | None:
    """Returns the first other argument with leaves that a config matches by name."""
    for key, tree in {**dict(enumerate(args)), **kwargs}.items():
        flat = _flat(tree)
        if key == argnum or flat is None or flat.paths in ((), ("",)):
            continue
        named = [config for config in configs if config.target is not None]
        if any(match(config, flat) for config in named) or _looks_like_params(tree):
            return key
    return None


def _looks_like_params(tree: PyTree) -> bool:
    """Whether a tree has leaves under the names of kernels, of two axes or more."""
    flat = None if jax.tree_util.all_leaves([tree]) else _flat(tree)
    if flat is None:
        return False
    kernel = lambda p, v: is_floating(v) and len(v.shape) > 1 and _NAMES & {*p}
    pairs = zip(flat.paths, flat.leaves, strict=True)
    return any(kernel(path.split("/"), leaf) for path, leaf in pairs)


_NAMES = {"params", "kernel", "embedding", "weight", "weights", "w"}


def _flat(tree: PyTree) -> FlatParams | None:
    try:
        return FlatParams.of(tree)
    except ValueError:  # no paths of its own
        return None


def _closed_over(fn: Any) -> str:
    """Names the trees of params, and the models, that a function closes over."""
    if isinstance(fn, functools.partial):
        held = any(map(_looks_like_params, [*fn.args, *fn.keywords.values()]))
        return "an argument of `functools.partial`" if held else _closed_over(fn.func)
    function = _owner(fn)
    own = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return ""
    found = inspect.getclosurevars(function)
    around = {**found.globals, **found.nonlocals, "self": own}
    is_model = lambda value: _model_library(value) in ("equinox", "flax.nnx")
    held = lambda value: _looks_like_params(value) or is_model(value)
    return ", ".join(f"`{name}`" for name, value in around.items() if held(value))
