"""What `train_step.py` runs: models in their sizes, and what is expected of each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from models import Chain, Decoder
from other_models import MixtureOfExperts, VisionTransformer

MODELS = ("decoder", "chain", "vit", "moe")
SIZES = ("cpu", "d2048", "d4096", "8b")
Times = Mapping[str, Mapping[str, float]]
FROZEN, JLORA, FULL = "frozen limit", "jlora", "full fine-tuning"
PORTABLE = "jlora, factored"  # without the kernel, where that is chosen
OF_FROZEN, OF_FULL = f"{JLORA} / {FROZEN}", f"{JLORA} / {FULL}"

ON_CPU = {
    "decoder cpu": {
        OF_FROZEN: "<= 1.15",
        OF_FULL: "<= 0.64",
        "factored, autodiff / jlora": ">= 1.35",
        "merged at apply / jlora": ">= 1.5",
    },
    "chain cpu": {OF_FROZEN: "<= 1.05"},
}


def on_gpu(of_frozen: str) -> dict[str, str]:
    """Returns what is expected on a GPU, of both ways of jlora."""
    expected = {
        OF_FROZEN: of_frozen,
        OF_FULL: "<= 0.80",
        "PyTorch PEFT, compiled / jlora": ">= 1.6",
        "PyTorch PEFT, eager / jlora": ">= 2.5",
        "Qwix, Linen / jlora": ">= 1.1",
        "Qwix, NNX / jlora": ">= 1.1",
    }
    return expected | {n.replace(JLORA, PORTABLE): t for n, t in expected.items()}


TARGETS = {
    **ON_CPU,
    "decoder d2048": on_gpu("<= 1.11"),
    "decoder d4096": on_gpu("<= 1.06"),
    "decoder d4096, no remat": on_gpu("<= 1.08"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to run.

    Attributes:
        label: says model, size and what is changed of it.
        model: the model.
        only: the contenders that run, all where empty.
        devices: how many it runs on.
        targets: ratio -> what is expected of it.
    """

    label: str
    model: Any
    only: tuple[str, ...] = ()
    devices: int = 1
    targets: Mapping[str, str] = dataclasses.field(default_factory=dict)


def cases(
    models: tuple[str, ...], sizes: tuple[str, ...], changes: Mapping[str, Any]
) -> list[Case]:
    """Returns the cases of models in sizes, fields changed where they exist."""
    pairs = dict.fromkeys((n, size_of(n, size)) for size in sizes for n in models)
    made = [case(name, size, changes) for name, size in pairs]
    if ("decoder", "d4096") in pairs and "remat" not in changes:
        made.append(case("decoder", "d4096", {**changes, "remat": False}))
    return made


def size_of(name: str, size: str) -> str:
    """Returns the size that a model has: there is one ViT for GPUs."""
    return "b" if name == "vit" and size != "cpu" else size


def case(name: str, size: str, changes: Mapping[str, Any]) -> Case:
    """Returns one case."""
    base = preset(name, size)
    fields = {field.name for field in dataclasses.fields(base)}
    changed = {
        field: value
        for field, value in changes.items()
        if field in fields and value != getattr(base, field)
    }
    label = ", ".join([f"{name} {size}", *map(worded, changed.items())])
    only = (FROZEN, JLORA, PORTABLE) if size == "8b" else ()
    model = dataclasses.replace(base, **changed)
    return Case(label, model, only, targets=TARGETS.get(label, {}))


def worded(change: tuple[str, Any]) -> str:
    """Returns a changed field in words."""
    field, value = change
    if field == "dtype":
        return jnp.dtype(value).name
    words = {"scan": ("unrolled", "scanned"), "remat": ("no remat", "remat")}
    return words[field][value]


def preset(name: str, size: str) -> Any:
    """Returns a model in a size; sizes but "cpu" are for GPUs, in bfloat16."""
    if size == "cpu":
        small = {"decoder": Decoder, "chain": Chain}
        small |= {"vit": VisionTransformer, "moe": MixtureOfExperts}
        return small[name]()
    return {
        "decoder": decoder,
        "chain": chain,
        "vit": vision_transformer,
        "moe": mixture_of_experts,
    }[name](size)


def decoder(size: str) -> Decoder:
    """Returns a Llama-like decoder."""
    shapes: dict[str, dict[str, int]] = {
        "d2048": {"d": 2048, "ffn": 5632, "layers": 16, "batch": 8, "seq": 1024},
        "d4096": {"d": 4096, "ffn": 11008, "layers": 8, "batch": 2, "seq": 4096},
        "8b": {"d": 4096, "ffn": 14336, "layers": 32, "batch": 2, "seq": 4096},
    }
    heads = {"heads": shapes[size]["d"] // 128, "kv_heads": shapes[size]["d"] // 128}
    rest = {"vocab": 32000}
    if size == "8b":
        heads["kv_heads"] = 8
        # Logits of all tokens at once would take as much room as the weights.
        rest = {"vocab": 128256, "loss_chunks": 16}
    return Decoder(
        **shapes[size], **heads, **rest, dtype=jnp.bfloat16, remat=True, scan=True
    )


def chain(size: str) -> Chain:
    """Returns square linears on 8192 rows."""
    d = 2048 if size == "d2048" else 4096
    return Chain(d=d, layers=12, batch=8, seq=1024, dtype=jnp.bfloat16)


def vision_transformer(_: str) -> VisionTransformer:
    """Returns ViT-B."""
    return VisionTransformer(
        d=768, ffn=3072, layers=12, heads=12, batch=64, dtype=jnp.bfloat16
    )


def mixture_of_experts(size: str) -> MixtureOfExperts:
    """Returns a decoder with eight experts a layer."""
    d, ffn = (2048, 2816) if size == "d2048" else (4096, 5632)
    return MixtureOfExperts(
        d=d,
        ffn=ffn,
        layers=4,
        heads=d // 128,
        kv_heads=d // 128,
        experts=8,
        vocab=32000,
        batch=8,
        seq=1024,
        dtype=jnp.bfloat16,
    )


def utilization(
    name: str, model: Any, adapter_params: int, seconds: float
) -> float | None:
    """Returns the share of the device's peak, None where either is not known.

    A token takes `4·N + 6·P + 3·A` operations: N the weights that multiply, twice
    forward and twice backward to the inputs; P the adapter's; A those of the attention
    forward, half of the square for it is causal. What is computed again is not counted.
    """
    kind = jax.devices()[0].device_kind
    known = any(name in kind for name in ("H100", "H200"))
    if type(model) is not Decoder or not known or model.dtype != jnp.bfloat16:
        return None
    layer = sum(ins * outs for ins, outs in model.kernel_shapes().values())
    weights = model.layers * layer + model.d * model.vocab
    attention = model.layers * 2 * model.seq * model.d
    per_weight = 6 if "full" in name else 4
    trained = 0 if name == FROZEN or "full" in name else adapter_params
    operations = per_weight * weights + 6 * trained + 3 * attention
    return operations * model.tokens / seconds / 989e12


def ratios(summary: Times) -> dict[str, float]:
    """Returns jlora's medians by the limits', and the rivals' by jlora's."""
    made = {}
    for own in (own for own in (JLORA, PORTABLE) if own in summary):
        time = summary[own]["median"]
        for name, each in summary.items():
            if name in (FROZEN, FULL):
                made[f"{own} / {name}"] = time / each["median"]
            elif name not in (JLORA, PORTABLE):
                made[f"{name} / {own}"] = each["median"] / time
    return made
