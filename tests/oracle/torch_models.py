"""The torch models of the golden cases, and the LoRA that PEFT puts into each.

Needs torch, peft and transformers. Every number comes from the name of its tensor, so
that nothing depends on torch's random numbers, and no two sizes of a model are equal
where that is possible, so that no transposition can hide.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

Arrays = dict[str, np.ndarray]


def uniform(name: str, shape: Iterable[int], bound: float = 1.0) -> np.ndarray:
    """Returns float32 numbers of U(-bound, bound) that depend on the name alone."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return (bound * random.uniform(-1, 1, tuple(shape))).astype(np.float32)


def integers(name: str, shape: Iterable[int], below: int) -> np.ndarray:
    """Returns int64 numbers below `below` that depend on the name alone."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return random.integers(0, below, tuple(shape))


def base_value(name: str, shape: torch.Size) -> np.ndarray:
    """Returns the base weights of a name: scales near 1, matrices of variance 1/fan."""
    if len(shape) < 2:
        return uniform(name, shape, 0.2) + (0.0 if name.endswith("bias") else 1.0)
    fan = int(np.prod(shape[1:])) if len(shape) != 3 else shape[-1]
    return uniform(name, shape, float(np.sqrt(3 / fan)))


@torch.no_grad()
def fill_base(model: nn.Module) -> nn.Module:
    """Gives a model its numbers and returns it, in evaluation mode."""
    for name, parameter in model.named_parameters():
        values = torch.from_numpy(base_value(name, parameter.shape))
        parameter.copy_(values.to(parameter.dtype))
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with one LoRA.

    Attributes:
        build: makes the model, with whatever numbers.
        config: the fields of `peft.LoraConfig`.
        inputs: the arrays that the model takes, as NumPy makes them.
        call: the output of a model for its inputs.
        refused: the model and config exist only to make a file that jlora refuses.
        dtype: the dtype of the factors on disk.
        converted: save as a plain adapter what starts from a changed base (PiSSA).
        out_proj_once: PEFT computes with the delta of `out_proj` twice; see README.md.
    """

    build: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], tuple[np.ndarray, ...]]
    call: Callable[..., torch.Tensor] = lambda model, *inputs: model(*inputs)
    refused: bool = False
    dtype: torch.dtype = torch.float32
    converted: bool = False
    out_proj_once: bool = False


class Mlp(nn.Module):
    """Two linear maps and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(7, 11)
        self.lin1 = nn.Linear(11, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, 3)."""
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 13)
        self.down = nn.Linear(13, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the shape of `x`."""
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Three numbered layers and a head, below `model` as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, 4)."""
        for layer in self.model.layers:
            x = layer(x)
        return self.head(x)


class Convolved(nn.Module):
    """A convolution, the mean over what it slides over, and a head."""

    def __init__(self, conv: nn.Module, features: int) -> None:
        super().__init__()
        self.conv = conv
        self.head = nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, 3)."""
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(2))


class Embedded(nn.Module):
    """A table of embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (batch, time, 4)."""
        return self.head(torch.tanh(self.embed(tokens)))


class Attention(nn.Module):
    """torch's own attention, whose query, key and value are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the shape of `x`."""
        return self.attn(x, x, x, need_weights=False)[0]


class TransposedMlp(nn.Module):
    """The `Conv1D` of GPT-2, a linear map that keeps `(in, out)`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = transformers.pytorch_utils.Conv1D(11, 7)
        self.proj = transformers.pytorch_utils.Conv1D(5, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, 5)."""
        return self.proj(torch.tanh(self.fc(x)))


class Experts(nn.Module):
    """Experts as two parameters, `(experts, out, in)` or the other way round."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (4, 10, 6), (4, 6, 5)
        turn = (lambda s: (s[0], s[2], s[1])) if is_transposed else (lambda s: s)
        self.gate_up_proj = nn.Parameter(torch.zeros(turn(up)))
        self.down_proj = nn.Parameter(torch.zeros(turn(down)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (experts, batch, 6) for `x` of that shape."""
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, up = torch.bmm(x, up).chunk(2, dim=-1)
        return torch.bmm(nn.functional.silu(gate) * up, down)


class Mixture(nn.Module):
    """A router whose probabilities scale what each expert gets."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = Experts(is_transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the shape of `x`, (batch, 6)."""
        shares = torch.softmax(self.router(x), -1)
        return x + self.experts(shares.T[:, :, None] * x).sum(0)


class Product(nn.Module):
    """A raw parameter `(in, out)` that a product uses as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, 11)."""
        return x @ self.table


class Mixed(nn.Module):
    """A product with a raw parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Product()
        self.head = nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, 3)."""
        return self.head(torch.tanh(self.mixer(x)))


def tiny_llama(**overrides: Any) -> nn.Module:
    """Two layers, four queries to two keys, heads whose sizes do not add up to 24."""
    sizes = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    config = transformers.LlamaConfig(**(sizes | overrides))
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    """One layer, whose linear maps are `Conv1D`s and whose q, k and v are one."""
    config = transformers.GPT2Config(
        vocab_size=37,
        n_embd=24,
        n_inner=40,
        n_layer=1,
        n_head=3,
        n_positions=16,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_bert() -> nn.Module:
    """One layer and a classifier."""
    config = transformers.BertConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=5,
        attn_implementation="eager",
    )
    return transformers.BertForSequenceClassification(config)


def tiny_vit() -> nn.Module:
    """One layer on four patches of an image, and a classifier."""
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=8,
        patch_size=4,
        num_channels=3,
        num_labels=5,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(config)


def logits(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Returns what a model of transformers calls its logits."""
    return model(*inputs).logits


def numbers(*shape: int) -> Callable[[], tuple[np.ndarray]]:
    """Returns a maker of one array of real inputs."""
    return lambda: (uniform("x", shape),)


def tokens(below: int, *shape: int) -> Callable[[], tuple[np.ndarray]]:
    """Returns a maker of one array of tokens."""
    return lambda: (integers("tokens", shape, below),)


def _lora(rank: int, alpha: float, targets: Any, **rest: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "target_modules": targets, **rest}


def _conv(
    conv: Callable[[], nn.Module],
    features: int,
    *shape: int,
    use_dora: bool = False,
    **rest: Any,
) -> Case:
    config = _lora(4, 6, ["conv"], use_dora=use_dora)
    build = lambda: Convolved(conv(), features)
    return Case(build, config, numbers(2, *shape), **rest)


_MLP = numbers(4, 7)
_STACK = numbers(5, 6)
_EXPERTS = numbers(5, 6)
_TEXT = tokens(37, 2, 6)

CASES = {
    "linear": Case(Mlp, _lora(3, 6, ["lin0", "lin1"]), _MLP),
    "dropout": Case(Mlp, _lora(3, 4, ["lin0"], lora_dropout=0.1), _MLP),
    "linear_regex": Case(
        Stack, _lora(3, 4, r"model\.layers\.(0|2)\.(up|down)"), _STACK
    ),
    "rslora": Case(Stack, _lora(4, 5, ["up", "down"], use_rslora=True), _STACK),
    "patterns": Case(
        Stack,
        _lora(
            3,
            5,
            ["up", "down", "head"],
            rank_pattern={"layers.1.up": 5, "^head": 2},
            alpha_pattern={"down": 12, "^model.layers.2.up": 7},
        ),
        _STACK,
    ),
    "exclude_modules": Case(
        Stack, _lora(3, 6, ["up", "down"], exclude_modules=["layers.1.up"]), _STACK
    ),
    "layers_to_transform": Case(
        Stack,
        _lora(
            3,
            6,
            ["up", "head"],
            layers_to_transform=[0, 2],
            layers_pattern="layers",
        ),
        _STACK,
    ),
    "all_linear": Case(Stack, _lora(2, 3, "all-linear"), _STACK),
    "bf16": Case(Mlp, _lora(3, 6, ["lin0", "lin1"]), _MLP, dtype=torch.bfloat16),
    "conv1d": _conv(lambda: nn.Conv1d(5, 7, 3, padding=2), 7, 5, 8),
    "conv2d": _conv(lambda: nn.Conv2d(5, 7, (3, 2), stride=2, padding=1), 7, 5, 8, 6),
    "conv2d_1x1": _conv(lambda: nn.Conv2d(5, 7, 1), 7, 5, 4, 3),
    "conv3d": _conv(lambda: nn.Conv3d(3, 7, (3, 2, 1)), 7, 3, 5, 4, 2),
    "embedding": Case(Embedded, _lora(3, 6, ["embed", "head"]), tokens(17, 2, 5)),
    "embedding_tied": Case(
        lambda: tiny_llama(tie_word_embeddings=True, num_hidden_layers=1),
        _lora(3, 6, ["embed_tokens", "q_proj"], ensure_weight_tying=True),
        tokens(41, 2, 6),
        logits,
    ),
    "mha": Case(
        Attention, _lora(3, 6, ["attn"]), numbers(2, 5, 12), out_proj_once=True
    ),
    "fan_in_fan_out": Case(
        TransposedMlp, _lora(3, 6, ["fc", "proj"], fan_in_fan_out=True), _MLP
    ),
    "bias_all": Case(Mlp, _lora(3, 6, ["lin1"], bias="all"), _MLP),
    "bias_lora_only": Case(Mlp, _lora(3, 6, ["lin0"], bias="lora_only"), _MLP),
    "modules_to_save": Case(Mlp, _lora(3, 6, ["lin0"], modules_to_save=["head"]), _MLP),
    "experts_one": Case(
        Mixture,
        _lora(3, 6, [], target_parameters=["experts.down_proj"]),
        _EXPERTS,
    ),
    "experts_two": Case(
        Mixture,
        _lora(
            3,
            6,
            ["router"],
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
            rank_pattern={"experts.gate_up_proj": 2},
        ),
        _EXPERTS,
    ),
    "experts_transposed": Case(
        lambda: Mixture(True),
        _lora(
            3,
            6,
            [],
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        ),
        _EXPERTS,
    ),
    "parameter_2d": Case(
        Mixed, _lora(3, 6, [], target_parameters=["mixer.table"]), _MLP
    ),
    "parameter_linear": Case(
        Mlp, _lora(3, 6, [], target_parameters=["lin0.weight"]), _MLP
    ),
    "pissa": Case(
        Mlp,
        _lora(2, 3, ["lin0", "lin1"], init_lora_weights="pissa"),
        _MLP,
        converted=True,
    ),
    "olora_rslora": Case(
        Mlp,
        _lora(2, 3, ["lin0", "lin1"], init_lora_weights="olora", use_rslora=True),
        _MLP,
        converted=True,
    ),
    "llama": Case(
        tiny_llama,
        _lora(
            3,
            6,
            [
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ],
            task_type="CAUSAL_LM",
        ),
        tokens(41, 2, 6),
        logits,
    ),
    "gpt2": Case(
        tiny_gpt2,
        _lora(3, 6, ["c_attn", "c_fc"], fan_in_fan_out=True),
        _TEXT,
        logits,
    ),
    "bert": Case(
        tiny_bert,
        _lora(3, 6, ["query", "value", "intermediate.dense"], task_type="SEQ_CLS"),
        _TEXT,
        logits,
    ),
    "vit": Case(
        tiny_vit,
        _lora(3, 6, ["q_proj", "o_proj", "projection"], modules_to_save=["classifier"]),
        numbers(2, 3, 8, 8),
        logits,
    ),
    "dora": Case(Mlp, _lora(3, 6, ["lin0"], use_dora=True), _MLP),
    "dora_stack": Case(Stack, _lora(3, 5, ["up", "down"], use_dora=True), _STACK),
    "dora_conv": _conv(
        lambda: nn.Conv2d(5, 7, (3, 2), stride=2, padding=1), 7, 5, 8, 6, use_dora=True
    ),
    "dora_embedding": Case(
        Embedded, _lora(3, 6, ["embed", "head"], use_dora=True), tokens(17, 2, 5)
    ),
    "lora_bias": Case(Mlp, _lora(3, 6, ["lin0"], lora_bias=True), _MLP),
    "lora_bias_stack": Case(Stack, _lora(3, 5, ["up"], lora_bias=True), _STACK),
    "trainable_tokens": Case(
        Embedded,
        _lora(3, 6, ["head"], trainable_token_indices={"embed": [0, 3]}),
        tokens(17, 2, 5),
        refused=True,
    ),
    "conv_grouped": _conv(
        lambda: nn.Conv2d(6, 8, 3, groups=2), 8, 6, 5, 4, refused=True
    ),
    "conv_dilated": _conv(
        lambda: nn.Conv2d(5, 7, 3, dilation=2), 7, 5, 8, 6, refused=True
    ),
}


def base_model(name: str) -> nn.Module:
    """Returns the model of a case with its numbers, without an adapter."""
    return fill_base(CASES[name].build())


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    """Returns the inputs of a case as tensors."""
    return tuple(torch.from_numpy(x) for x in CASES[name].inputs())
