"""Options of the pytest-benchmark entry: `pytest benchmarks --suite headline --fa3 FOLDER
--benchmark-json=out.json`."""

from seal_ops.bench.shapes import SUITES


def pytest_addoption(parser):
    parser.addoption(
        "--suite", choices=sorted(SUITES), help="registered shapes; default: headline on a GPU, smoke without one"
    )
    parser.addoption("--fa3", metavar="FOLDER", help="folder with FlashAttention-3's library")
