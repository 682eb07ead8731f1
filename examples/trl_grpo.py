"""TRL's GRPOTrainer with the fused ops as its LM head: needs trl and fdpg_kernels, runs on a CPU in half a minute.

    python examples/trl_grpo.py

Written against trl 1.16. Its `_get_per_token_logps_and_entropies` calls `model(..., labels=labels, fused_lm_head=True)`
and takes per-token log-probs and entropies from what comes back. `FusedGRPOTrainer` answers that call with
`linear_logprob`; all else is TRL's: loss, options, generation, metrics. The call still goes through the model's own
forward, which DDP, FSDP and PEFT rely on.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from types import MethodType

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from fdpg_kernels import linear_logprob

FOLDER = Path(__file__).resolve().parent / "tiny-python-lm"


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose log-probs, entropies and their gradients come from `linear_logprob`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            if model is not None:
                answer_fused_calls(model.get_base_model() if hasattr(model, "peft_config") else model, self.temperature)


def answer_fused_calls(model: PreTrainedModel, temperature: float) -> None:
    """`model(..., labels=labels, fused_lm_head=True)` gives log-probs and entropies [B, T-1] of labels [B, T].

    Where a label is -100 (prompts, padding) both are 0. A model that multiplies its logits by a number (Granite,
    Cohere) would multiply its hidden states by it here.
    """
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    other_calls = model.forward

    @functools.wraps(other_calls)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return other_calls(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]  # [B, T-1, D]
        head = self.get_output_embeddings()
        logprob, entropy, _ = linear_logprob(
            hidden, head.weight, labels, bias=head.bias, temperature=temperature, softcap=softcap, return_entropy=True
        )
        return FusedCausalLMOutput(log_probs=logprob, entropy=entropy)

    model.forward = MethodType(forward, model)


def short(completions: list[str], **_) -> list[float]:
    """Reward: 1 for a function body of at most two lines. Any function of the texts could stand here."""
    return [float(text.strip().count("\n") <= 1) for text in completions]


def make_trainer(
    trainer_class: type[GRPOTrainer], output_dir: str, model: PreTrainedModel | None = None, **options
) -> GRPOTrainer:
    """A trainer of the tiny model that writes Python functions, or of another with its tokens."""
    settings = GRPOConfig(
        output_dir,
        per_device_train_batch_size=32,  # completions: 8 of each of 4 signatures
        num_generations=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    trainer = trainer_class(
        model or AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32"),
        short,
        settings,
        Dataset.from_list([json.loads(line) for line in (FOLDER / "prompts/train.jsonl").open()]),
        processing_class=AutoTokenizer.from_pretrained(FOLDER),
    )
    trainer.remove_callback(PrinterCallback)  # thirty figures a step
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(FusedGRPOTrainer, folder, max_steps=11, max_completion_length=32)
        trainer.train()
    for row in trainer.state.log_history:
        if "reward" in row and row["step"] % 5 == 1:
            reward, entropy = float(row["reward"]), float(row["entropy"])
            print(f"step {row['step']:2}: {100 * reward:.0f} % are short, entropy {entropy:.2f} nats a token")


if __name__ == "__main__":
    main()
