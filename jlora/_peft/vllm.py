"""What vLLM takes of a PEFT adapter: plain modules of one rank and one scaling."""

import dataclasses
from collections.abc import Collection, Sequence

from .._errors import UnsupportedFeatureError
from .._torch.fused import split
from .._torch.modules import TorchModule
from .write import commonest, without

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


# The kinds of models whose experts vLLM has packed, as PEFT has them.
_PACKED = frozenset(("gpt_oss", "qwen3_5_moe", "qwen3_5_moe_text"))


def for_vllm(
    modules: Sequence[TorchModule], whole: Collection[str], model_type: str | None
) -> list[TorchModule]:
    """Returns the modules as vLLM loads them: one rank, one scaling, experts apart.

    Ranks are padded with zeros, and `b` takes the difference of scalings; both leave
    the deltas as they are.

    Args:
        modules: the modules, one at least.
        whole: the paths of what is trained whole.
        model_type: the kind of the model, which says whether its experts are packed.

    Raises:
        UnsupportedFeatureError: if vLLM would drop or misread something.
    """
    _check(modules, whole)
    if model_type in _PACKED:
        apart = [*modules]
    else:
        apart = [single for m in modules for single in _experts_apart(m, model_type)]
    largest = max(module.rank for module in apart)
    ranks = [rank for rank in _VLLM_RANKS if rank >= largest]
    if not ranks:
        raise UnsupportedFeatureError(
            f"vLLM takes ranks up to {_VLLM_RANKS[-1]}, and {largest} is needed"
        )
    scaling = commonest((module.scaling for module in apart), 1.0)
    return [module.scaled_to(scaling).padded_to(ranks[0]) for module in apart]


def _check(modules: Sequence[TorchModule], whole: Collection[str]) -> None:
    kinds = {
        "drops what is trained whole": whole,
        "has no adapters of convolutions": [m.name for m in modules if m.window],
        "has no names for the adapters of a fused attention": [
            m.name for m in modules if "mha" in m.steps or m.brought_by
        ],
        "drops the magnitudes of DoRA": [
            m.name for m in modules if m.magnitude is not None
        ],
    }
    wrong = [f"{k}: {sorted(set(names))[:5]}" for k, names in kinds.items() if names]
    if wrong:
        raise UnsupportedFeatureError(
            f"vLLM {'; it '.join(wrong)}; merge them into the params instead"
        )


def _experts_apart(module: TorchModule, model_type: str | None) -> list[TorchModule]:
    if not module.is_parameter:
        return [module]
    if model_type is None and "fan_in_fan_out" in module.steps:
        # As in GPT-OSS, where gate and up are no halves but alternate.
        raise UnsupportedFeatureError(
            f"{module.name!r} is kept as (experts, in, out), and whether vLLM has the "
            "experts of such a model packed its kind says: give `model_type`, such as "
            '"gpt_oss"'
        )
    owner, _, parameter = module.name.rpartition(".")
    if parameter not in _VLLM_EXPERTS:
        raise UnsupportedFeatureError(
            f"vLLM knows experts as gate_up_proj and down_proj, not {module.name!r}"
        )
    names = _VLLM_EXPERTS[parameter]
    width = module.b.shape[1] // len(names)
    place = f"{owner}.{module.expert or 0}"
    binding = without(module.binding, "experts")
    return [
        dataclasses.replace(part, name=f"{place}.{name}", expert=None, binding=binding)
        for name, part in zip(names, split(module, [width] * len(names)), strict=True)
        if part is not None
    ]
