"""The methods by their names, with the learning rates of the paper (arXiv 2501.15225, line retrieval on 7B models)."""

from ..adapters.model_card import METHODS

NAMES = {
    granularity: name for granularity, (name, _) in METHODS.items()
}  # what the paper calls scales of a granularity
GRANULARITIES = {name: granularity for granularity, name in NAMES.items()}
LEARNING_RATES = {"SEAL-H": 1e-2, "SEAL-C": 2e-2, "LoRA": 2e-4, "DoRA": 2e-4}

# QEFT (arXiv 2410.08661) on 7B models: constant rate, batches of 16, one epoch, the gradient's norm cut at this.
COLUMNS_CLIP = 0.3
_COLUMNS_RATE, _COLUMNS, _COLUMNS_POWER = 5e-6, 128, 0.371


def columns_rate(columns: int) -> float:
    """The paper's learning rate for weak columns, 5e-6 for 128 and 1.4e-5 for 8; the power law through both between
    them and beyond."""
    return _COLUMNS_RATE * (_COLUMNS / columns) ** _COLUMNS_POWER
