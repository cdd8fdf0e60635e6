"""What PEFT answers when it is given one of our folders: a sentence in place of ``KeyError: 'SEAL'``.

PEFT's list of methods is closed, so the scales cannot be one of them; its table of config classes is open.
"""

from __future__ import annotations

import sys


class SealConfig:
    """Takes the place of PEFT's config class for ``peft_type`` "SEAL"."""

    def __init__(self, **fields):  # by `PeftConfig.from_pretrained`, also in transformers' `load_adapter`
        raise ValueError(
            "peft: the folder must hold an adapter of PEFT, got the scales of seal_ops; seal_ops.load(model, folder) "
            "loads them"
        )

    @classmethod
    def from_pretrained(cls, name_or_path, *args, **kwargs):
        raise ValueError(
            f"peft: {str(name_or_path)!r} must be an adapter of PEFT, got the scales of seal_ops; "
            f"seal_ops.load(model, {str(name_or_path)!r}) loads them"
        )


def register() -> None:
    """Tells PEFT, where it is imported."""
    mapping = sys.modules.get("peft.mapping")
    table = getattr(mapping, "PEFT_TYPE_TO_CONFIG_MAPPING", None)
    if isinstance(table, dict):
        table.setdefault("SEAL", SealConfig)
