"""Train SVDiff as a PEFT method with Hugging Face's Trainer: a small language model learns another word order.

    python examples/trainer/train.py

The base is a Llama of 85,000 parameters, trained here on English sentences of one pattern. The adapter teaches it a
dialect: adjectives after nouns, the verb at the end. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import svdiff.peft
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

NOUNS = ("cat", "dog", "mouse", "bird", "fox", "hen", "cow", "horse")
ADJECTIVES = ("small", "big", "old", "young", "red", "quick")
VERBS = ("sees", "chases", "hears", "follows", "finds", "likes")
WORDS = ("<start>", "<end>", "the", *NOUNS, *ADJECTIVES, *VERBS)
START, END = 0, 1

ENGLISH = "the {a} {n} {v} the {b} {m}"
DIALECT = "the {n} {a} the {m} {b} {v}"


def sentences(pattern: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Token ids of sentences of one word order, as the Trainer takes them."""
    rng = random.Random(f"{pattern}/{seed}")
    found = []
    for _ in range(count):
        (n, m), (a, b) = rng.sample(NOUNS, 2), rng.sample(ADJECTIVES, 2)
        words = pattern.format(n=n, m=m, a=a, b=b, v=rng.choice(VERBS)).split()
        ids = torch.tensor([START, *map(WORDS.index, words), END])
        found.append({"input_ids": ids, "labels": ids})
    return found


def is_right(text: str, pattern: str) -> bool:
    """Whether a sentence has this word order."""
    kinds = (
        {key: "|".join(NOUNS) for key in "nm"} | {key: "|".join(ADJECTIVES) for key in "ab"} | {"v": "|".join(VERBS)}
    )
    return re.fullmatch(pattern.format(**{key: f"({words})" for key, words in kinds.items()}), text) is not None


@torch.no_grad()
def written(model: Any, count: int) -> list[str]:
    """Sentences that the model makes up."""
    model.eval()
    torch.manual_seed(0)
    start = torch.full((count, 1), START, device=model.device)
    ids = model.generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=10)
    return [" ".join(WORDS[i] for i in row if i > END) for row in ids.tolist()]


def trainer_of(model: Any, data: Any, held_out: Any, *, steps: int, lr: float, seed: int, output_dir: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=32,
        per_device_eval_batch_size=200,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the adapter")
    parser.add_argument("--base_steps", type=int, default=300, help="of the base")
    parser.add_argument("--lr", type=float, default=2e-2, help="of the shifts; 1e-3 for a model of common size")
    parser.add_argument("--seed", type=int, default=0, help="of weights, sentences and batches")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/trainer"), help="for the base and the adapter")
    options = parser.parse_args(arguments)
    base_dir, adapter_dir = options.output_dir / "base", options.output_dir / "adapter"

    set_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    english, english_test = sentences(ENGLISH, 4000, options.seed), sentences(ENGLISH, 200, options.seed + 1)
    dialect, dialect_test = sentences(DIALECT, 2000, options.seed), sentences(DIALECT, 200, options.seed + 1)
    how = {"seed": options.seed, "output_dir": options.output_dir}
    trainer = trainer_of(model, english, english_test, steps=options.base_steps, lr=3e-3, **how)
    trainer.train()
    trainer.save_model(str(base_dir))

    model = get_peft_model(LlamaForCausalLM.from_pretrained(base_dir), svdiff.peft.SVDiffConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    trainer = trainer_of(model, dialect, dialect_test, steps=options.steps, lr=options.lr, **how)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(adapter_dir))
    print(f"loss on the dialect: {before:.3f} before, {after:.3f} after")

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_dir), adapter_dir)
    with model.disable_adapter():
        by_base = written(model, 200)
    for name, texts in (("base", by_base), ("adapter", written(model, 200))):
        shares = [sum(is_right(text, pattern) for text in texts) / len(texts) for pattern in (ENGLISH, DIALECT)]
        print(f"{name:8} English {shares[0]:6.1%}  dialect {shares[1]:6.1%}  such as: {texts[0]}")
    size = (adapter_dir / "adapter_model.safetensors").stat().st_size
    print(f"{adapter_dir}: {size:,} bytes; the base has {(base_dir / 'model.safetensors').stat().st_size:,}")


if __name__ == "__main__":
    main()
