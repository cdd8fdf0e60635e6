"""Which tiles the CUDA kernels visit and what they mask there (csrc/cuda/mask.h), on the CPU against the definition."""

import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def built(source: pathlib.Path, include: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    program = folder / "mask"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{include}", "-o", program, source], check=True
    )
    return program


def test_tiles_and_element_masks_are_those_of_the_definition(tmp_path):
    program = built(HERE / "host/mask.cpp", CSRC, tmp_path)
    done = subprocess.run([program, "2000", "0"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "2000 cases right\n"


# One fault in each part of the header: the program must see all of them.
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("position + mask_.upper + 1}", "position + mask_.upper}"),  # the last key of a row
        ("head >= mask.shifted_from", "head > mask.shifted_from"),  # a head that is shifted
        (") ^ sign;", ");"),  # chunks of negative positions
        ("int64_t{chunk} + mask_.chunk_upper + 1)", "int64_t{chunk} + mask_.chunk_upper)"),  # the last chunk
        ("? position + 1 : mask_.sinks", "? mask_.sinks : mask_.sinks"),  # a sink that comes later than the query
        ("begin -= sinks;", "begin -= 1;"),  # sinks beyond the first tile
        ("sinks >= begin", "sinks > begin + 1"),  # a tile in both runs, numbered twice
        ("number >= band_begin ? number", "true ? number"),  # sinks that lie apart
        (
            "(not_negative(of_last.begin) + kKeys - 1) / kKeys",
            "not_negative(of_last.begin) / kKeys",
        ),  # a tile taken for whole
        ("sinks_of_first >= of_last.begin", "true"),  # a tile between sinks and band taken for whole
        ("part.keys_end < sinks", "false"),  # the half of a tile that is not computed
        ("if (!some.any() || first < some.begin)", "if (false)"),  # queries before the band of a sink
        ("some.end = length_k;", ";"),  # later queries of a sink
        ("all.end < last ||", ""),  # a query tile taken for whole
        (
            "int64_t{chunk} - mask_.chunk_lower + 1)",
            "int64_t{chunk} - mask_.chunk_lower)",
        ),  # queries of the next chunks
    ],
)
def test_the_program_sees_faults(tmp_path, right, wrong):
    header = (CSRC / "cuda/mask.h").read_text()
    assert header.count(right) >= 1, f"mask.h no longer has {right}"
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/mask.h").write_text(header.replace(right, wrong, 1))
    program = built(HERE / "host/mask.cpp", tmp_path, tmp_path)
    done = subprocess.run([program, "2000", "0"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout.startswith("case"), done.stdout
