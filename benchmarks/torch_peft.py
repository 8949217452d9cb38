"""PyTorch's side of `train_step.py`: PEFT on a plain decoder, in a process of its own.

It takes one JSON argument, says on a line of standard output what it is, and then
answers each line of standard input with a line of JSON: `NAME` runs one training step
of that contender and tells its seconds; `check FILE` tells loss and gradient norm on
the weights of a NumPy archive.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
EAGER, COMPILED = "PyTorch PEFT, eager", "PyTorch PEFT, compiled"
FULL = "PyTorch full, compiled"
Config = dict[str, Any]


class Layer(nn.Module):
    """One layer: RMS norms, rotary attention, a gated MLP."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads = (config["heads"], config["kv_heads"])
        for name, (ins, outs) in config["kernels"].items():
            setattr(self, name, nn.Linear(ins, outs, bias=False))
        self.norm_1 = nn.RMSNorm(config["d"], eps=1e-6)
        self.norm_2 = nn.RMSNorm(config["d"], eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns the outputs (batch, seq, d)."""
        h, (heads, kv_heads) = self.norm_1(x), self.heads
        split = lambda y, n: y.unflatten(-1, (n, -1)).transpose(1, 2)
        q = rotate(split(self.q(h), heads), cos, sin)
        k = rotate(split(self.k(h), kv_heads), cos, sin)
        v = split(self.v(h), kv_heads)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != kv_heads
        )
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """The decoder and its loss."""

    def __init__(self, config: Config):
        super().__init__()
        d, vocab = config["d"], config["vocab"]
        self.remat = config["remat"]
        self.embedding = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["layers"]))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.head = nn.Linear(d, vocab, bias=False)
        half = d // config["heads"] // 2
        frequencies = 1e4 ** (-torch.arange(half, dtype=torch.float32) / half)
        positions = torch.arange(config["seq"], dtype=torch.float32)
        angles = positions[:, None] * frequencies
        # In the dtype of the activations, as Transformers does it.
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the mean cross-entropy of tokens (batch, seq + 1)."""
        x = self.embedding(tokens[:, :-1])
        for layer in self.layers:
            if self.remat:
                x = checkpoint(
                    layer,
                    x,
                    self.cos,
                    self.sin,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, seq, dim), two halves."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def with_peft(config: Config) -> nn.Module:
    """Returns the decoder with PEFT's LoRA on all linears of its layers."""
    lora = peft.LoraConfig(
        r=config["rank"],
        lora_alpha=config["alpha"],
        target_modules=list(KERNELS),
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    # Factors in the dtype of the base, the faster way: float32 ones would be
    # multiplied in float32, there being no autocast.
    return peft.get_peft_model(Decoder(config), lora, autocast_adapter_dtype=False)


class Steps:
    """The training steps of all contenders, built when they are first asked for."""

    def __init__(self, config: Config):
        self.config, self.built = config, {}
        shape = (config["batch"], config["seq"] + 1)
        self.tokens = torch.randint(config["vocab"], shape, device=config["device"])

    def step(self, name: str) -> Callable[[], None]:
        """Returns the step of a contender."""
        if name not in self.built:
            self.built[name] = self._build(name)
        return self.built[name]

    def _build(self, name: str) -> Callable[[], None]:
        if name not in (EAGER, COMPILED, FULL):
            raise ValueError(f"no contender {name!r}")
        if name == FULL:
            return self._step(torch.compile(Decoder(self.config)))
        # One model for both: the frozen weights are there once.
        if "peft" not in self.built:
            self.built["peft"] = with_peft(self.config)
        model = self.built["peft"]
        return self._step(torch.compile(model) if name == COMPILED else model)

    def _step(self, model: nn.Module) -> Callable[[], None]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=True)

        def step() -> None:
            model(self.tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def timed(step: Callable[[], None], device: str) -> float:
    """Returns the seconds of a step, until its results are there."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check(config: Config, path: str) -> dict[str, float]:
    """Returns loss and gradient norm on an archive of parameter name -> array."""
    arrays = dict(np.load(path))
    tokens = torch.as_tensor(arrays.pop("tokens"), device=config["device"]).long()
    model = with_peft(config)
    state = {name: torch.as_tensor(array) for name, array in arrays.items()}
    model.base_model.model.load_state_dict(state)
    loss = model(tokens)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sum(float(g.float().square().sum()) for g in gradients) ** 0.5
    return {"loss": loss.item(), "norm": norm}


def answer(line: str, steps: Steps) -> dict[str, Any]:
    """Returns the answer to one line."""
    try:
        if line.startswith("check "):
            return check(steps.config, line.removeprefix("check "))
        return {"seconds": timed(steps.step(line), steps.config["device"])}
    except torch.OutOfMemoryError:
        steps.built.pop(line, None)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    # Outside of the handler, whose traceback holds on to tensors.
    torch.cuda.empty_cache()
    return {"error": "out of memory"}


def main() -> None:
    """Serves until its input ends."""
    # Compilers print; the lines of the protocol must stay alone.
    out, sys.stdout = sys.stdout, sys.stderr
    say = lambda value: print(json.dumps(value), file=out, flush=True)
    config = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, config["dtype"]))
    torch.set_default_device(config["device"])
    torch.set_float32_matmul_precision("high")  # as XLA multiplies float32 on GPUs
    say({"torch": torch.__version__, "peft": peft.__version__})
    steps = Steps(config)
    for line in sys.stdin:
        say(answer(line.strip(), steps))


if __name__ == "__main__":
    main()
