"""examples/long_context: sequences that are sharded over processes give the losses of one process."""

import json
import os
import sys

import pytest

from common import ROOT, run

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytestmark = pytest.mark.backends("cpu")
TRAIN = ROOT / "examples/long_context/train.py"


def losses(folder, processes, *options):
    text, written = folder / "text.txt", folder / f"{processes}.json"
    text.write_text("".join(f"line {number} of {number % 7}\n" for number in range(2000)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    shape = ["--quick", "--context", 64, "--steps", 4, "--data", text, "--losses", written]
    done = run(*torchrun, TRAIN, *shape, *options, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "64 tokens a window, loss" in done.stdout and f"{processes} processes" in done.stderr
    return json.loads(written.read_text())


@pytest.mark.slow
@pytest.mark.builds
def test_losses_are_those_of_one_process(tmp_path):
    one, two = (losses(tmp_path, processes, "--dropout", 0.2) for processes in (1, 2))
    assert len(one) == 4 and one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-5)


def test_it_says_how_to_start_it():
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    with pytest.raises(AssertionError, match="error: start it by torchrun"):
        run(sys.executable, TRAIN, "--quick", env=environment)
