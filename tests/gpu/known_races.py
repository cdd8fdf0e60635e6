"""Tells racecheck's known false positives from real hazards. usage: known_races.py LOG [CSRC]; exit code 1 where a
hazard is left.

Known, one by one:
* `bulk_load` (1-D cp.async.bulk into shared memory) of the rows' lse2 and delta: racecheck does not connect the copy's
  completion on its mbarrier with the ld.shared that follow the wait on it, and reports each as a race; the tensor form
  (cp.async.bulk.tensor) it follows. The order is that of every other stage: the reader waits for the phase that the
  copy's bytes complete, and a stage is copied into again only after each warp has joined (__syncwarp, or a warp-wide
  stmatrix of values computed from what it read) and one lane arrived at the stage's "empty" mbarrier.
  Known only where every other access stands on a line that reads lse2 or delta, or in read_columns, which reads nothing
  else.
* `shared_.p` of attention_backward_wide: one warpgroup hands P to the other through two mbarriers, p_full and p_empty.
  Each warp ends its accesses with __syncwarp and one lane arrives for all 32; racecheck credits the order to that lane
  alone.
  Known only where both accesses stand on lines with exactly that expression.
* The tile (and its scale row) of the forward, the task of the backward's main kernel: the warp that picks them hands
  them to all others through two mbarriers, full and empty; again each warp ends its accesses with __syncwarp and one
  lane arrives.
  Known only where every write is by that warp's own functions, and every other access reads.
* The warps' sums of sum_columns (backward_keys.cuh) in the backward's main kernel: written by each warp, read by others
  behind a named barrier of all consuming threads, and behind a second one written again. The barrier stands between the
  two accesses in the SASS as well, unconditional. Named barrier 1 has no other user than meet(), which all consuming
  threads call as often as each other; the barriers of a step have the ids 4 to 7 (a warpgroup and a parity), in a
  register. racecheck reports these accesses only since those ids are in a register (backward v7). Why is not known.
  Known only where every access is in sum_columns of eight warps, all writes stand on the line that writes the sums and
  all reads on the line that adds them. tests/package/test_known_races.py holds the source to both barriers.
"""

import pathlib
import re
import sys

BULK = "bulk_load"
COPIED = re.compile(r"\b(lse2|delta)(_row)?\b")
READER = "read_columns<"
HANDED_OVER = "shared_.p[step_ & 1][i][thread_]"
SUMS = re.compile(r"^(?:\w+ )*seal::sm90::sum_columns<\w+, \(int\)\d+, \(int\)128, \(int\)8>\(")
SUM_WRITTEN, SUM_READ = "*reinterpret_cast<float2*>(scratch + ", "sum += scratch[w * kD + c];"
PICKERS = re.compile(r"^(?:\w+ )*seal::sm90::(?:produce_tiles<|produce_tasks<|BackwardTask<.*>::find)")


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


def accesses(hazard: str, csrc: pathlib.Path) -> list[tuple[str, str]]:
    """Of every access of a report: what it says, and the source line it names ("" where there is none)."""
    found = []
    for said in hazard.split(" access at ")[1:]:
        name, number = (re.findall(r" in (\S+\.cuh?):(\d+)", said) or [("", "0")])[0]
        files = list(csrc.rglob(pathlib.Path(name).name)) if name else []
        text = files[0].read_text().splitlines() if files else []
        found.append((said, text[int(number) - 1] if 0 < int(number) <= len(text) else ""))
    return found


def is_write(hazard: str, said: str) -> bool:
    return hazard.split(said)[0].endswith("Write access at ")


def known(hazard: str, csrc: pathlib.Path) -> bool:
    found = accesses(hazard, csrc)
    others = [line for said, line in found if BULK not in said]
    if len(others) < len(found):
        return len(others) > 0 and all(
            COPIED.search(line) or READER in said for said, line in found if BULK not in said
        )
    writes = [said for said, _ in found if is_write(hazard, said)]
    if writes and len(writes) < len(found) and all(PICKERS.match(said) for said in writes):
        return not any(PICKERS.match(said) for said, _ in found if said not in writes)
    if found and all(SUMS.match(said) for said, _ in found):
        return 0 < len(writes) < len(found) and all(
            (SUM_WRITTEN if is_write(hazard, said) else SUM_READ) in line for said, line in found
        )
    wide = "attention_backward_wide" in hazard or "::WideConsumer<" in hazard
    return wide and len(others) >= 2 and all(HANDED_OVER in line for line in others)


def main(path: str, csrc: str = "csrc") -> int:
    with open(path, errors="replace") as file:
        found = hazards(file.read())
    left = [h for h in found if not known(h, pathlib.Path(csrc))]
    for hazard in left:
        print("not known:", re.sub(r"\s+", " ", hazard)[:600])
    print(
        f"known_races: {len(found)} reports, {len(found) - len(left)} of them known false positives, {len(left)} left"
    )
    return 1 if left or not found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
