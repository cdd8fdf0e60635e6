"""What all runs over many steps share: a folder that belongs to one run, and its files."""
import json
import os

from ..utils.files import atomic_write

# ---------------------------------------------------------------------------------------------------------- shared


def reserve(output, settings: dict, call: str) -> None:
    """Makes the folder ``output`` the one of these settings; ``ValueError`` where it holds a run with others."""
    path, wanted = os.path.join(output, "settings.json"), json.loads(json.dumps(settings))
    if not os.path.exists(path):
        atomic_write(path, json.dumps(wanted, indent=1) + "\n")
        return
    earlier = read_json_file(path)
    differing = [key for key in wanted if earlier.get(key) != wanted[key]]
    if differing:
        raise ValueError(
            f"{call}: output {os.fspath(output)} must be new or hold this run, got one with another {', '.join(differing)}"
        )


def read_json_file(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)
