"""Tells racecheck's known false positives from real hazards. usage: known_races.py LOG [CSRC]; exit code 1 where a hazard is left.

Known, one by one:
* `bulk_load` (1-D cp.async.bulk into shared memory): racecheck does not connect the copy's completion on its mbarrier with the
  ld.shared that follow the wait on it, and reports each as a race; the tensor form (cp.async.bulk.tensor) it follows. The order
  is that of every other stage: the reader waits for the phase that the copy's bytes complete.
* `shared.p` of attention_backward_wide: one warpgroup hands P to the other through two mbarriers, p_full and p_empty. Each warp
  ends its accesses with __syncwarp and one lane arrives for all 32; racecheck credits the order to that lane alone.
  Known only where both accesses stand on lines with exactly that expression.
"""
import pathlib
import re
import sys

BULK = "bulk_load"
HANDED_OVER = "shared.p[step & 1][i][thread]"


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


def source_lines(hazard: str, csrc: pathlib.Path) -> list[str]:
    """The source line of every access of a report."""
    lines = []
    for name, number in re.findall(r" in (\S+\.cuh?):(\d+)", hazard):
        files = list(csrc.rglob(pathlib.Path(name).name))
        text = files[0].read_text().splitlines() if files else []
        lines.append(text[int(number) - 1] if int(number) <= len(text) else "")
    return lines


def known(hazard: str, csrc: pathlib.Path) -> bool:
    if BULK in hazard:
        return True
    lines = source_lines(hazard, csrc)
    return "attention_backward_wide" in hazard and len(lines) >= 2 and all(HANDED_OVER in line for line in lines)


def main(path: str, csrc: str = "csrc") -> int:
    with open(path, errors="replace") as file:
        found = hazards(file.read())
    left = [h for h in found if not known(h, pathlib.Path(csrc))]
    for hazard in left:
        print("not known:", re.sub(r"\s+", " ", hazard)[:600])
    print(f"known_races: {len(found)} reports, {len(found) - len(left)} of them known false positives, {len(left)} left")
    return 1 if left or not found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
