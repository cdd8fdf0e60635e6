"""The README of an adapter's folder: a model card, and the facts in it that an adapter keeps when it is saved anew."""

from __future__ import annotations

import dataclasses
import json
import os
import re

from ..utils.files import atomic_write
from . import files
from .files import CARD_FILE, ScalesConfig

_MARK = "<!-- Written by seal_ops. A card without this line is left as it is. -->"
_FACTS = re.compile(r"^<!-- seal_ops: (\{.*\}) -->$", re.MULTILINE)
# What the paper calls scales of a granularity, and what they are.
METHODS = {
    "head": ("SEAL-H", "one factor per query head"),
    "channel": ("SEAL-C", "one factor per channel of every head"),
}


@dataclasses.dataclass
class CardFacts:
    """What a card says beside the config.

    ``training``: the settings of `seal_ops.train`; ``command``: the command line of that run; ``versions``: package ->
    version then; ``results``: one a task and length, as `seal_ops.card_results` makes them.
    """

    training: dict | None = None
    command: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    results: list[dict] = dataclasses.field(default_factory=list)

    def trained(self, settings: dict) -> None:
        """Notes a training: what was known of an earlier one counts no longer."""
        import torch
        import transformers

        from ..version import __version__

        if self.training is not None:
            self.command = None
        self.training, self.results = dict(settings), []
        self.versions = {"seal_ops": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def read_facts(folder: str) -> CardFacts:
    """The facts in the card of a folder; none where the card is missing, or is not ours."""
    path = os.path.join(folder, CARD_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.loads(_FACTS.search(file.read())[1])
        facts = CardFacts(**content)
        _sections(facts)
        return facts
    except (OSError, TypeError, KeyError, ValueError, AttributeError):
        return CardFacts()


def update_card(save_directory: str | os.PathLike, results: list[dict]) -> str:
    """Writes results into the model card of a saved adapter; returns the card's path.

    Args:
        save_directory: the adapter's folder, or that of a whole model that was saved with its scales.
        results: as `seal_ops.card_results` makes them, of all tasks: they take the place of earlier ones.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a damaged adapter, or a card that somebody has written.
    """
    folder = files.find(os.fspath(save_directory), "update_card")
    config, _, _ = files.read(folder, "update_card")
    path = os.path.join(folder, CARD_FILE)
    if not replaceable(folder):
        raise ValueError(f"seal_ops.update_card: {path} must be a card of seal_ops, got one that somebody has written")
    facts = dataclasses.replace(read_facts(folder), results=results)
    atomic_write(path, text(config, facts))
    return path


def replaceable(folder: str) -> bool:
    """Whether the README of a folder is missing or one of ours, so that it may be written."""
    path = os.path.join(folder, CARD_FILE)
    if not os.path.exists(path):
        return True
    with open(path, encoding="utf-8", errors="replace") as file:
        return _MARK in file.read()


def text(config: ScalesConfig, facts: CardFacts | None = None) -> str:
    """The card of an adapter, with what is known of its training and results."""
    from huggingface_hub import ModelCardData

    facts = facts or CardFacts()
    base = config.base_model_name_or_path
    # The hub accepts only names of its own here; a local folder would make the card invalid.
    on_hub = base is not None and not os.path.exists(base) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
    method, what = METHODS[config.granularity]
    title = f"{method} scales" + (f" for {base}" if on_hub else "")
    count = sum(
        heads * (1 if config.granularity == "head" else channels)
        for heads, channels in zip(config.num_heads, config.head_dim)
    )
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="seal_ops",
        pipeline_tag="text-generation",
        tags=["seal", "attention-scaling", "long-context"],
        model_name=title if facts.results else None,
        eval_results=[_eval_result(result) for result in facts.results] or None,
    )
    lines = [
        "---", data.to_yaml(), "---", _MARK, _comment(facts), "",
        f"# {title}", "",
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
    return "\n".join([*lines, *_sections(facts)]) + "\n"


def _comment(facts: CardFacts) -> str:
    content = json.dumps(dataclasses.asdict(facts), ensure_ascii=False, default=str)
    return f"<!-- seal_ops: {content.replace('<', chr(92) + 'u003c').replace('>', chr(92) + 'u003e')} -->"


def _sections(facts: CardFacts) -> list[str]:
    """Results, training, command and versions, as far as they are known."""
    lines = []
    if facts.results:
        lines += ["", "## Accuracy", "", "With 95 % Wilson intervals, on the same cases.", ""]
        lines += ["| task | tokens | cases | without the scales | with the scales |", "|---|---|---|---|---|"]
        for result in facts.results:
            before, after = result["before"], result["after"]
            lines.append(
                f"| {result['task']} | {result['length']:,} | {after['cases']} | {_cell(before)} | {_cell(after)} |"
            )
    if facts.training:
        lines += ["", "## Training", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in facts.training.items()]
    if facts.command:
        lines += ["", "```bash", facts.command, "```"]
    if facts.versions:
        lines += ["", "Trained with " + ", ".join(f"{name} {value}" for name, value in facts.versions.items()) + "."]
    return lines


def _cell(cell: dict) -> str:
    return f"{cell['accuracy']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"


def _eval_result(result: dict):
    """A result for the card's metadata: the accuracy with the scales; the other one would be read as theirs, too."""
    from huggingface_hub import EvalResult

    after = result["after"]
    return EvalResult(
        task_type="text-generation",
        dataset_type=result["task"],
        dataset_name=f"{result['task']}, prompts of {result['length']} tokens",
        dataset_config=f"{result['length']} tokens",
        metric_type="accuracy",
        metric_name=f"accuracy, 95 % interval {after['low']:.3f} to {after['high']:.3f}, {after['cases']} cases",
        metric_value=round(after["accuracy"], 4),
    )
