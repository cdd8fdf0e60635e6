"""Scales learned from preferences: TRL's DPOTrainer, with the base model as the reference, on the same weights.

    pip install trl
    python examples/preferences.py --model models/seal-tiny --output preferred-scales

A row is a prompt, the answer to prefer and one to avoid: here the right number of a line and another line's.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import seal_ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/seal-tiny")
parser.add_argument("--granularity", default="channel", choices=["head", "channel"])
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--samples", type=int, default=50)
parser.add_argument("--output", default="preferred-scales")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
scales = seal_ops.attach(model, args.granularity)

samples = seal_ops.tasks.lines(tokenizer, length=args.length, samples=args.samples)
wrong = [sample.answer for sample in samples[1:] + samples[:1]]
rows = [{"prompt": sample.prompt, "chosen": sample.answer, "rejected": other} for sample, other in zip(samples, wrong)]

trainer = DPOTrainer(
    model,
    ref_model=seal_ops.reference_model(model),  # the scales are off in it; costs no memory
    args=DPOConfig(
        output_dir=args.output,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=2e-2 if args.granularity == "channel" else 1e-2,
        lr_scheduler_type="constant",
        max_length=None,
        bf16=False,
        logging_steps=10,
        save_steps=25,
        report_to=[],
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[seal_ops.SealCallback(save_base_model=False)],
)
trainer.train()
scales.save_pretrained(args.output)
