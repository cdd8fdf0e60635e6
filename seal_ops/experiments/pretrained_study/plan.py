"""The plan of the study, and its jobs in the order in which they matter."""

import os
from dataclasses import dataclass, field, replace

from ..study_jobs.drawn_samples import named
from ..study_jobs.queue import Job
from .sections import adapters, beyond, curve, elsewhere, heads, length, main, plain_format, quantised, transfer

# As a plan names them; `_rank` says in which order their jobs run.
SECTIONS = {
    "main": main,
    "beyond": beyond,
    "adapters": adapters,
    "heads": heads,
    "curve": curve,
    "length": length,
    "transfer": transfer,
    "elsewhere": elsewhere,
    "quantised": quantised,
    "format": plain_format,
}


@dataclass(frozen=True)
class Plan:
    """What the study does; the defaults are for SmolLM2-135M on four GPUs of the H100's kind.

    Attributes:
        tasks, lengths, seeds, cases: cases at each length for each seed; a seed draws training samples and cases.
        samples: training samples, all of the longest of ``lengths``.
        rates: learning rates to choose from by the loss on validation samples.
        adapter_tasks: tasks on which LoRA and DoRA are searched and run for every seed; on the others they run once.
        curve_task: the task of the sections that need one.
        text: a file of English text for the perplexity.
    """

    tasks: tuple[str, ...] = ("multikey", "passkey", "lines", "variables", "multivalue", "needle", "magic")
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8000)
    seeds: tuple[int, ...] = (0, 1, 2)
    cases: int = 70
    samples: int = 50
    rates: dict = field(
        default_factory=lambda: {
            "SEAL-H": (1e-2, 3e-2, 1e-1),
            "SEAL-C": (5e-3, 2e-2),
            "LoRA": (1e-3, 3e-3),
            "DoRA": (1e-3, 3e-3),
        }
    )
    adapter_tasks: tuple[str, ...] = ("multikey", "passkey", "lines")
    curve_task: str = "multikey"
    curve_samples: tuple[int, ...] = (5, 10, 25, 100)
    curve_rates: dict = field(
        default_factory=lambda: {"SEAL-H": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "SEAL-C": (1e-3, 5e-3, 2e-2, 5e-2, 1e-1)}
    )
    curve_cases: int = 100
    train_lengths: tuple[int, ...] = (1024, 2048, 4096)
    beyond: tuple = (("ntk", 2, 16_000), ("yarn", 2, 16_000), ("ntk", 4, 32_000), ("yarn", 4, 32_000))
    beyond_cases: int = 60
    heads_lengths: tuple[int, ...] = (1024, 4096)
    heads_cases: int = 10
    transfer_lengths: tuple[int, ...] = (512, 4096)
    transfer_cases: int = 60
    format_tasks: tuple[str, ...] = ("multikey", "passkey", "magic")
    format_lengths: tuple[int, ...] = (512, 2048, 8000)
    format_cases: int = 40
    text: str | None = None
    sections: tuple[str, ...] = tuple(SECTIONS)

    @property
    def longest(self) -> int:
        return max(self.lengths)


def jobs(plan: Plan) -> list[Job]:
    """All jobs, the most important first: what every claim needs, then the other seeds and the costlier variants."""
    made = [job for name in plan.sections for job in SECTIONS[name].jobs(plan)]
    made.sort(key=lambda job: _rank(plan, job.name))
    default = Plan()  # the jobs' times are those of its sizes
    size = 0.5 * plan.cases / default.cases + 0.5 * plan.samples / default.samples
    return [replace(job, seconds=job.seconds * max(size, 0.1)) for job in made]


def _rank(plan, name):
    section, _, rest = name.partition("-")
    if name == "elsewhere-rates":  # behind the trainings that it reads
        section = "curve"
    if section in ("main", "adapters"):
        task, _, seed = rest.rpartition("-")
        first, core = int(seed) == plan.seeds[0], task in plan.adapter_tasks
        return {"main": 0 if first else 4 if core else 11, "adapters": (2 if core else 10) if first else 13}[section]
    if section == "beyond":
        return 1 if rest.endswith("-x2") else 12
    return {"heads": 3, "elsewhere": 5, "curve": 6, "transfer": 7, "length": 8, "quantised": 9, "format": 9}[section]


def check(plan: Plan) -> None:
    """Raises ``ValueError`` for a section, a task or a length that cannot be meant."""
    for section in plan.sections:
        if section not in SECTIONS:
            raise ValueError(f"seal study: sections must be among {', '.join(SECTIONS)}, got {section!r}")
    for task in plan.tasks:
        named(task)
    if plan.text is not None and not os.path.isfile(plan.text):
        raise FileNotFoundError(f"seal study: text must be a file, got {plan.text}")
