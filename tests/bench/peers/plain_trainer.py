"""What people write without this project: PEFT and transformers' Trainer, float32, padding, every logit.

Runs as a process of its own and prints its figures as one JSON line.
"""

import argparse
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)


def encoded(tokenizer: Any, path: Path) -> list[dict[str, list[int]]]:
    """Prompt and completion through the chat template; the prompt is not learned."""
    examples = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        examples.append({
            "input_ids": before + after,
            "attention_mask": [1] * (len(before) + len(after)),
            "labels": [-100] * len(before) + after,
        })  # fmt: skip
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the unquantised model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    examples = encoded(tokenizer, args.data)
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=str(args.out.with_name(f"{args.out.name}.scratch")),
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.floor(0.05 * args.epochs * math.ceil(len(examples) / args.batch_size)),
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=50,
            seed=args.seed,
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    began_s = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began_s
    trainer.model.save_pretrained(args.out)
    tokens = args.epochs * sum(len(example["input_ids"]) for example in examples)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_memory_bytes": peak_bytes}))


if __name__ == "__main__":
    main()
