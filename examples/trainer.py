"""The same training inside transformers' Trainer: samples are the dataset, `Collator` makes the batches.

    python examples/trainer.py --model models/seal-tiny --length 2048 --output trainer-scales

Trainer brings several GPUs (`torchrun`, `accelerate launch`), logging and schedules; pip install accelerate.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import seal_ops
from seal_ops.training.collator import Collator
from seal_ops.training.recipe import LEARNING_RATES, NAMES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/seal-tiny")
parser.add_argument("--granularity", default="channel", choices=["head", "channel"])
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--samples", type=int, default=50)
parser.add_argument("--output", default="trainer-scales")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
scales = seal_ops.attach(model, args.granularity)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=LEARNING_RATES[NAMES[args.granularity]],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,  # off
        logging_steps=10,
        save_steps=25,  # kilobytes each: the callback leaves the frozen model out
        report_to=[],
        remove_unused_columns=False,  # samples are objects, not columns
    ),
    train_dataset=seal_ops.tasks.lines(tokenizer, length=args.length, samples=args.samples),
    data_collator=Collator(),
    callbacks=[seal_ops.SealCallback(save_base_model=False)],
)
trainer.train()
scales.save_pretrained(args.output)
