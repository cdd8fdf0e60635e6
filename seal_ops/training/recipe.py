"""The methods by their names, with the learning rates of the paper (arXiv 2501.15225, line retrieval on 7B models)."""

from ..adapters.model_card import METHODS

NAMES = {
    granularity: name for granularity, (name, _) in METHODS.items()
}  # what the paper calls scales of a granularity
GRANULARITIES = {name: granularity for granularity, name in NAMES.items()}
LEARNING_RATES = {"SEAL-H": 1e-2, "SEAL-C": 2e-2, "LoRA": 2e-4, "DoRA": 2e-4}
