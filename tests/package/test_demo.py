"""The programs of examples/gpt, and the whole demo at a tiny size, ended early by a real Ctrl-C."""

import argparse
import itertools
import re
import signal
import subprocess
import sys

import pytest

import demo
import train
from common import ROOT
from data import load_corpus

pytestmark = pytest.mark.backends("cpu")

GPT_FOLDER = ROOT / "examples/gpt"
SMALL_OPTIONS = ("--layers", "1", "--heads", "2", "--width", "16", "--context", "32", "--batch", "2")


def start(program, *arguments, **options):
    command = [sys.executable, "-u", str(GPT_FOLDER / program), *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, **pipes, **options)


@pytest.mark.parametrize("program", ("demo.py", "train.py", "export.py", "pictures.py"))
def test_help(program):
    process = start(program, "--help")
    output, _ = process.communicate()
    assert process.returncode == 0 and b"usage: " + program.encode() in output and b"default: " in output


def test_unusable_options(tmp_path, text):
    for options, message in (
        (("--text", tmp_path / "missing"), "error: no such file or folder"),
        (("--text", text, "--context", "100000"), "error: too little text"),
        (("--text", text, "--heads", "3"), "error: width must be a multiple"),
        (("--steps", "0"), "argument --steps: must be above zero, got 0"),
        (("--device", "nowhere"), "argument --device: no such device"),
    ):
        process = start("train.py", *options, cwd=tmp_path)
        output, _ = process.communicate()
        assert process.returncode != 0 and message in output.decode() and b"Traceback" not in output


def test_a_passage_is_held_out_text(text):
    corpus = load_corpus(text, context=64)
    for length in (2, 56, 2000):
        passage = demo.passage(corpus, length)
        assert len(passage) == length and passage in text.read_bytes()[18_000:]
    assert demo.passage(corpus, 56).startswith(b"line ")


def interrupt(process, after):
    """Presses Ctrl-C once the program has written `after`, and returns all that it writes until it ends."""
    output = b""
    while after not in output:
        written = process.stdout.read1()
        assert written, f"ended early: {output.decode()}"
        output += written
    process.send_signal(signal.SIGINT)
    return (output + process.communicate()[0]).decode()


@pytest.mark.slow
@pytest.mark.builds
def test_demo_with_ctrl_c(text, tmp_path):
    """Ctrl-C ends only the training: what was trained by then is exported, served from C++ and drawn."""
    out = tmp_path / "out"
    process = start(
        "demo.py", *SMALL_OPTIONS, "--text", text, "--minutes", "60", "--bytes", "40", "--out", out, cwd=tmp_path
    )
    output = interrupt(process, after=b"Ctrl-C ends training early.")
    assert process.returncode == 0, output
    assert re.search(r"Stopped by Ctrl-C after \d+ steps", output)
    assert "nats a byte" in output and "layer 1 " in output and " ms" in output
    assert "Gradients agree with finite differences." in output
    assert output.count("These 40 bytes equal those of Python running the same file") == 2
    exported = [f"{kind}.{form}" for kind in ("gpt", "gpt.indexed") for form in ("torchscript.pt", "aoti.pt2")]
    for name in ("gpt.pt", *exported, "loss.png", "support.png", "attention.png"):
        assert (out / name).stat().st_size > 0
        assert name in output or name == "gpt.pt"

    # The C++ programs by themselves: no Python, and errors in one sentence.
    for program, model in (("serve_torchscript", "gpt.torchscript.pt"), ("serve_aoti", "gpt.aoti.pt2")):
        binary = out / "libtorch" / program
        assert b"libpython" not in subprocess.run(["ldd", binary], capture_output=True, check=True).stdout
        done = subprocess.run([binary, out / model, "9"], input=b"\0\xff", capture_output=True, check=True)
        assert len(done.stdout) == 9 and re.fullmatch(rb"9 tokens in .* s: .* tokens a second\n", done.stderr)
        lines, with_index = (
            subprocess.run([binary, out / each, "9", "--lines"], input=b"ab\nc" * 9, capture_output=True, check=True)
            for each in (model, model.replace("gpt", "gpt.indexed"))
        )
        assert with_index.stdout == lines.stdout
        events = [tuple(map(int, line.split())) for line in lines.stdout.splitlines()]
        assert sorted(number for number, _ in events) == sorted(9 * list(range(10)))
        assert all(0 <= byte < 256 for _, byte in events)
        for arguments, prompt, message in (
            ((out / model, "9"), b"", b"error: a request needs a prompt and a count above zero\n"),
            ((out / model, "many"), b"xx", b"error: COUNT must be a whole number above zero, got many\n"),
        ):
            done = subprocess.run([binary, *arguments], input=prompt, capture_output=True)
            assert done.returncode == 1 and done.stderr == message and not done.stdout
        assert subprocess.run([binary, "--help"], capture_output=True).returncode == 0


def test_train_with_ctrl_c_after_the_first_line_of_progress(text, tmp_path):
    process = start("train.py", *SMALL_OPTIONS, "--text", text, "--minutes", "60", cwd=tmp_path)
    output = interrupt(process, after=b"%|")
    assert process.returncode == 0, output
    assert re.search(r"Stopped by Ctrl-C after \d+ steps", output)
    assert "nats a byte" in output and "Saved both models: gpt.pt" in output
    assert (tmp_path / "gpt.pt").stat().st_size > 0


# After which call of which function Ctrl-C is pressed, and how many steps of three are taken then.
MOMENTS = {
    "once it is offered": (train, "print", 1, 1),
    "while models are made": (train.Trainer, "__init__", 1, 1),
    "while measuring before the first step": (train, "mean_support", 1, 1),
    "in the first step": (train.Trainer, "step", 1, 1),
    "in the second step": (train.Trainer, "step", 3, 2),
    "while measuring after the last step": (train, "mean_support", 2, 3),
    "before the report is shown": (train, "report", 1, 3),
}


def press_ctrl_c(monkeypatch, moment, times):
    owner, name, call, _ = MOMENTS[moment]
    function, calls = getattr(owner, name, print), itertools.count(1)

    def pressing(*arguments, **options):
        result = function(*arguments, **options)
        if next(calls) == call:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, pressing, raising=False)


def train_three_steps(text):
    parser = argparse.ArgumentParser()
    train.add_options(parser, minutes=60)
    options = parser.parse_args([*SMALL_OPTIONS, "--text", str(text), "--steps", "3"])
    return train.train_from_options(options)[0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_ends_training_and_goes_on(monkeypatch, capsys, text, moment):
    before = signal.getsignal(signal.SIGINT)
    press_ctrl_c(monkeypatch, moment, times=1)
    steps = MOMENTS[moment][-1]
    assert train_three_steps(text).history.steps == steps
    output = capsys.readouterr().out
    assert f"After {steps} steps:" in output and "nats a byte" in output
    assert (f"Stopped by Ctrl-C after {steps} steps" in output) == ("report" not in moment)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_second_ctrl_c_interrupts_at_any_moment(monkeypatch, text, moment):
    before = signal.getsignal(signal.SIGINT)
    press_ctrl_c(monkeypatch, moment, times=2)
    with pytest.raises(KeyboardInterrupt):
        train_three_steps(text)
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_interrupts_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
