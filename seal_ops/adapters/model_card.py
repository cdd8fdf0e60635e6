"""The README of an adapter's folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

from .files import CARD_FILE, ScalesConfig

_MARK = "<!-- Written by seal_ops. A card without this line is left as it is. -->"
# What the paper calls scales of a granularity, and what they are.
METHODS = {
    "head": ("SEAL-H", "one factor per query head"),
    "channel": ("SEAL-C", "one factor per channel of every head"),
}


def replaceable(folder: str) -> bool:
    """Whether the README of a folder is missing or one of ours, so that it may be written."""
    path = os.path.join(folder, CARD_FILE)
    if not os.path.exists(path):
        return True
    with open(path, encoding="utf-8", errors="replace") as file:
        return _MARK in file.read()


def text(config: ScalesConfig, training: Mapping | None = None) -> str:
    """The card of an adapter.  ``training``: name -> value of its training's settings, where they are known."""
    base = config.base_model_name_or_path
    # The hub accepts only names of its own here; a local folder would make the card invalid.
    on_hub = base is not None and not os.path.exists(base) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
    method, what = METHODS[config.granularity]
    count = sum(
        heads * (1 if config.granularity == "head" else channels)
        for heads, channels in zip(config.num_heads, config.head_dim)
    )
    lines = [
        "---", *([f"base_model: {json.dumps(base)}"] if on_hub else []), "library_name: seal_ops",
        "tags:", "- seal", "- attention-scaling", "- long-context", "---", _MARK, "",
        f"# {method} scales" + (f" for {base}" if on_hub else ""), "",
        f"These are learned scales of attention ({method}, {what}; arXiv 2501.15225): they multiply the attention "
        f"output before its projection.", "",
        "| | |", "|---|---|", f"| base model | {base or 'not recorded'} |", f"| model type | {config.model_type} |",
        f"| method | {method} (`granularity={config.granularity!r}`) |",
        f"| layers with scales | {len(config.layers)} |",
        f"| learned numbers | {count} |", "",
        "```python", "import seal_ops", "from transformers import AutoModelForCausalLM", "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base if on_hub else 'BASE-MODEL')})",
        "scales = seal_ops.load(model, \"THIS-FOLDER-OR-REPOSITORY\")",
        "seal_ops.merge(model)  # optional: plain weights, no cost at inference", "```", "",
        "The folder is read by `seal_ops.load`, not by `peft.PeftModel.from_pretrained`; "
        "`seal_ops.ia3.export_ia3` writes an (IA)³ adapter for PEFT.",
    ]  # fmt: skip
    if training:
        lines += [
            "",
            "## Training",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in training.items()),
        ]
    return "\n".join(lines) + "\n"
