"""Tells racecheck's known false positives from real hazards. usage: known_races.py LOG; exit code 1 where a hazard is left.

Known, one by one:
* `bulk_load` (1-D cp.async.bulk into shared memory): racecheck does not connect the copy's completion on its mbarrier with the
  ld.shared that follow the wait on it, and reports each as a race; the tensor form (cp.async.bulk.tensor) it follows. The order
  is that of every other stage: the reader waits for the phase that the copy's bytes complete.
"""
import re
import sys

KNOWN = {"bulk_load": "1-D bulk copies published by an mbarrier"}


def hazards(text: str) -> list[str]:
    """One entry a report: its first line and the accesses it is said to race with."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    found: list[str] = []
    for line in lines:
        if "Race reported between" in line:
            found.append(line)
        elif found and line.startswith("and "):
            found[-1] += " " + line
    return found


def main(path: str) -> int:
    with open(path, errors="replace") as file:
        found = hazards(file.read())
    left = [h for h in found if not any(name in h for name in KNOWN)]
    for hazard in left:
        print("not known:", re.sub(r"\\s+", " ", hazard)[:400])
    print(f"known_races: {len(found)} reports, {len(found) - len(left)} of them known ({'; '.join(KNOWN.values())}), {len(left)} left")
    return 1 if left or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
