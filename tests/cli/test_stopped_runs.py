"""Commands that are stopped by a signal, a full disc, another writer or a folder that cannot be written."""

import json
import os
import signal

import pytest
from command_line import TINY, folder, seal  # noqa: F401
from full_disc import resource, room_for
from retrieval_fixtures import one_thread  # noqa: F401

from seal_ops.cli.main import COMMANDS
from seal_ops.evaluation import runner
from seal_ops.training import loop, run_folder
from seal_ops.training.memory_plan.planned_model import PlannedModel
from seal_ops.utils.locks import only_writer
from seal_ops.utils.runs import Growing

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.fixture
def train(folder, tmp_path):  # noqa: F811
    """The arguments of a training in four steps with a checkpoint after each."""
    return [
        "train", "--model", folder, "--granularity", "channel", "--task", "lines", "--length", 190, "--samples", 4,
        *TINY, "--output",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts what it runs in the background with Ctrl-C ignored, and Python leaves that so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Whatever is kept now and then is kept every time."""
    monkeypatch.setattr(runner, "SAVE_EVERY", 0.0)
    monkeypatch.setitem(loop.train.__kwdefaults__, "checkpoint_every", 1)


def stopping(monkeypatch, owner, name, number, how):
    """Lets ``how()`` happen once, after the ``number``-th call of a function."""
    function, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        found = function(*arguments, **options)
        calls.append(name)
        if len(calls) == number:
            how()
        return found

    monkeypatch.setattr(owner, name, counted)


def content(folder):
    """Every file, without times and sizes of the machine's."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                data = file.read()
            if name.endswith(".json"):
                data = json.loads(data)
                for key in ("seconds", "peak_memory", "plan", "provenance", "training"):
                    data.pop(key, None)
            elif not name.endswith(".safetensors") or name == "checkpoint.safetensors":  # with times in it
                data = None
            found[os.path.relpath(os.path.join(parent, name), folder)] = data
    return found


@pytest.mark.parametrize("number, code, word", SIGNALS)
def test_a_stopped_training_says_how_to_go_on_and_goes_on(capsys, train, tmp_path, monkeypatch, number, code, word):
    assert seal(capsys, *train, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stopping(patch, run_folder, "save_checkpoint", 2, lambda: os.kill(os.getpid(), number))
        found, _, err = seal(capsys, *train, tmp_path / "cut")
    assert found == code and err.splitlines()[-1] == (
        f"seal train: {word}; step 2 was kept; what is finished lies in {tmp_path / 'cut'}; "
        f"the same command goes on from there"
    )
    assert "Traceback" not in err and os.listdir(tmp_path / "cut") == ["checkpoint.safetensors"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert seal(capsys, *train, tmp_path / "cut")[0] == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_training_stopped_before_a_checkpoint_says_so(capsys, train, tmp_path, monkeypatch):
    stopping(monkeypatch, PlannedModel, "follow", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = seal(capsys, *train, tmp_path / "a")
    assert code == 143 and err.endswith(
        f"terminated; no checkpoint was written to {tmp_path / 'a'} yet; the same command begins anew\n"
    )


def test_a_stopped_evaluation_goes_on(capsys, folder, tmp_path, monkeypatch):  # noqa: F811
    arguments = ["eval", "--model", folder, "--lengths", 190, "--cases", 2, "--batch-size", 1, *TINY]
    assert seal(capsys, *arguments, "--output", tmp_path / "whole" / "a.json")[0] == 0
    for output in ([], ["--output", tmp_path / "cut" / "a.json"]):
        with monkeypatch.context() as patch:
            stopping(patch, Growing, "add", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            code, _, err = seal(capsys, *arguments, *output)
        kept = f"what is finished lies in {tmp_path / 'cut' / 'a.json'}; the same command goes on from there"
        told = kept if output else "no case was kept; with --output FILE the same command goes on from what is finished"
        assert code == 143 and err.splitlines()[-1] == f"seal eval: terminated; {told}"
    assert len(json.loads((tmp_path / "cut" / "a.json").read_text())["records"]) == 1
    assert os.listdir(tmp_path / "cut") == ["a.json"]
    assert seal(capsys, *arguments, *output)[0] == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_stopped_demo_says_how_to_go_on(capsys, folder, tmp_path, monkeypatch):  # noqa: F811
    stopping(monkeypatch, Growing, "add", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    arguments = ["demo", "--model", folder, "--lengths", 190, "--cases", 2, "--samples", 2, *TINY, "--output", tmp_path]
    code, _, err = seal(capsys, *arguments)
    told = f"seal demo: interrupted; what is finished lies in {tmp_path}; the same command goes on from there"
    assert code == 130 and err.splitlines()[-1] == told
    assert sorted(os.listdir(tmp_path)) == ["base.json", "settings.json"]


@pytest.mark.parametrize("name", ["heads", "compare", "transfer", "study", "demo"])
def test_what_continues_says_so_when_it_is_stopped(name):
    class Arguments:
        output, restart = "there", False

    assert COMMANDS[name].kept(Arguments) == "what is finished lies in there; the same command goes on from there"
    Arguments.restart = True
    assert COMMANDS[name].kept(Arguments).endswith("the same command without --restart goes on from there")


@pytest.mark.skipif(resource is None, reason="this system has no limit on the size of files")
def test_a_full_disc_stops_a_training_which_goes_on_from_the_checkpoint_before(capsys, train, tmp_path, monkeypatch):
    assert seal(capsys, *train, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        limits = []
        stopping(
            patch, run_folder, "save_checkpoint", 2, lambda: limits.append(room_for(2000)) or limits[0].__enter__()
        )
        code, _, err = seal(capsys, *train, tmp_path / "cut")
        limits[0].__exit__(None, None, None)
    checkpoint = str(tmp_path / "cut" / "checkpoint.safetensors")
    assert code == 1 and err.splitlines()[-1] == (
        f"seal train: could not write {checkpoint!r} (File too large); what was there before is unchanged"
    )
    assert os.listdir(tmp_path / "cut") == ["checkpoint.safetensors"]
    assert seal(capsys, *train, tmp_path / "cut")[0] == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.skipif(resource is None, reason="this system has no limit on the size of files")
def test_a_full_disc_leaves_no_merged_checkpoint_and_the_scales_as_they_were(capsys, folder, train, tmp_path):  # noqa: F811
    assert seal(capsys, *train, tmp_path / "scales")[0] == 0
    merge = ["merge", "--model", folder, "--scales", tmp_path / "scales", "--output", tmp_path / "merged"]
    for more in ([], ["--dtype", "float32"]):  # file by file, and in memory
        with room_for(9000):
            code, _, err = seal(capsys, *merge, *more)
        assert code == 1 and err == (
            f"seal merge: could not write {str(tmp_path / 'merged')!r} (File too large); what was there before is "
            f"unchanged\n"
        )
        assert sorted(os.listdir(tmp_path)) == ["scales"]


def test_two_writers_of_one_output(capsys, folder, train, tmp_path):  # noqa: F811
    (tmp_path / "out").mkdir()
    small = ["--model", folder, *TINY, "--output", tmp_path / "out"]
    commands = {
        "seal_ops.train": [*train, tmp_path / "out"],
        "seal demo": ["demo", "--lengths", 190, "--cases", 1, "--samples", 1, *small],
        "seal_ops.compare": ["compare", "--lengths", 190, "--cases", 1, *small],
        "seal_ops.transfer": ["transfer", "--train-tasks", "lines", "--length", 190, "--cases", 1, *small],
        "seal study": ["study", "--lengths", 190, *small],
    }
    with only_writer(tmp_path / "out", "x"), only_writer(tmp_path / "a.json", "x"):
        before = os.listdir(tmp_path / "out")
        for call, arguments in commands.items():
            code, _, err = seal(capsys, *arguments)
            assert code == 1 and f"{call}: output {tmp_path / 'out'} must have one writer at a time, got" in (
                f"seal {arguments[0]}: {err}"
            )
            assert len(err.splitlines()) == 1 and os.listdir(tmp_path / "out") == before
        code, _, err = seal(capsys, "demo", "--restart", *small)
        assert code == 1 and "must have one writer at a time" in err
        code, _, err = seal(capsys, "eval", "--lengths", 190, "--cases", 1, *small[:-1], tmp_path / "a.json")
        assert code == 1 and "must have one writer at a time" in err and not (tmp_path / "a.json").exists()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def test_folders_that_cannot_be_written_are_told_before_the_work(capsys, folder, train, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loop, "OptimizerStep", None)  # what works is not reached
    (tmp_path / "file").write_text("")
    place, model = tmp_path / "file" / "out", ["--model", folder, *TINY]
    for command, *more in (
        ["compare", "--lengths", 190],
        ["transfer", "--train-tasks", "lines", "--length", 190],
        ["heads", "--lengths", 190],
        ["study", "--lengths", 190],
        ["demo", "--lengths", 190],
        ["eval", "--lengths", 190],
    ):
        code, out, err = seal(capsys, command, *model, *more, "--output", place)
        assert code == 1 and len(err.splitlines()) == 1 and "(Not a directory)" in err and str(place) in err
        assert "1." not in out
