"""The notebook of examples/notebooks: that it was run as it is, and runs again in small."""

import importlib.util
import json
import os
import re

import pytest

from common import ROOT, run_python

pytest.importorskip("matplotlib")

pytestmark = pytest.mark.backends("cpu")

FOLDER = ROOT / "examples/notebooks"


def load_execute():
    spec = importlib.util.spec_from_file_location("notebooks.execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = load_execute()
CELLS = execute.cells_of(execute.SOURCE.read_text())


def test_the_notebook_is_that_of_its_source():
    saved = json.loads(execute.NOTEBOOK.read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in saved] == CELLS, "execute.py was not run"


def test_its_outputs_are_saved():
    assert execute.NOTEBOOK.stat().st_size < 400_000
    code = [cell for cell in json.loads(execute.NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source, outputs = "".join(cell["source"]), cell["outputs"]
        kinds = [output["output_type"] for output in outputs]
        assert "error" not in kinds and all(output.get("name") != "stderr" for output in outputs), outputs
        assert kinds.count("display_data") == source.count("plt.show()")
        assert ("stream" in kinds) == ("print(" in source)


@pytest.mark.builds
def test_it_runs():
    """All of its code, in order, with few steps on little text."""
    code = "\n\n".join(text for kind, text in CELLS if kind == "code")
    for long, short in (("STEPS = 1000", "STEPS = 41"), ("max_bytes=8 << 20", "max_bytes=200_000")):
        assert code.count(long) == 1
        code = code.replace(long, short)
    said = run_python(code, cwd=FOLDER, env={**os.environ, "MPLBACKEND": "Agg"})
    assert "α = 2    0.7500  0.2500  0       0       0" in said
    assert said.count("nats a byte") == 2
    weights, visible = re.search(r"([\d,]+) of ([\d,]+) weights are not zero", said).groups()
    assert 4 * 64 < int(weights.replace(",", "")) < int(visible.replace(",", "")) == 4 * 64 * 65 // 2
