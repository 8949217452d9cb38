#!/usr/bin/env bash
# peft 0.17.1 to 0.20.0: `bias="lora_only"` trains the biases of adapted modules and saves none of them.
#
# Guessed: a file whose config says `bias: lora_only` has these biases. Seen: it has the
# factors alone, without a warning; loaded again, the biases are those of the base. With
# `bias="all"` they are saved, and PEFT 0.21 saves them for both.
# For LoRA in JAX: such files of a year ago compute something else than what was trained.
# A reader should refuse them or be told to do without.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install -q)
# The CPU wheel of torch, where pip finds it; else PyPI's, which is large.
"${pip[@]}" torch==2.13.0+cpu || "${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==4.57.6
cat > "$folder/see.py" <<'PY'
import sys
import warnings

warnings.simplefilter("error", UserWarning)  # nothing warns of it
import peft
import torch
from safetensors.torch import load_file

for bias in ("lora_only", "all"):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7))
    config = peft.LoraConfig(r=2, target_modules=["0"], bias=bias)
    adapted = peft.get_peft_model(model, config)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert sum(name.endswith(".bias") for name in trained) == 1, trained
    adapted.save_pretrained(f"{sys.argv[1]}/{bias}")
    names = load_file(f"{sys.argv[1]}/{bias}/adapter_model.safetensors")
    saved = any(name.endswith(".bias") for name in names)
    assert saved == (bias == "all" or sys.argv[2] == "saved"), (bias, [*names])
PY
for release in 0.17.1 0.18.1 0.19.1 0.20.0; do
  "${pip[@]}" "peft==$release"
  HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/see.py" "$folder/$release" lost
done
"${pip[@]}" transformers==5.24.0
for release in 0.21.0 0.21.2; do
  "${pip[@]}" "peft==$release"
  HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/see.py" "$folder/$release" saved
done
echo "PEFT 0.17.1 to 0.20.0 save no bias that lora_only trained, and say nothing; 0.21 does"
