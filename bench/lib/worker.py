"""One peer in a process of its own: for peak memory on the CPU, and for packages that need another import path.

`bench.lib.remote` runs it as a script. It reads one JSON request a line from standard input and answers each with one
JSON line: {"ok": …} or {"error": text}.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
WARM_UP_LENGTH = 256


def _set_path(package_path: str | None) -> None:
    """This project's folder comes last: the installed adasplash, or the one of package_path, is the one to import."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [p for p in sys.path if p not in (here, ROOT, "")]
    sys.path[:] = [*([package_path] if package_path else []), *sys.path, ROOT]


class Worker:
    def prepare(self, peer: str, case: dict[str, Any]) -> None:
        import torch

        from bench.lib.case import Case
        from bench.lib.inputs import make_grad, make_inputs
        from bench.lib.runner import LocalRunner
        from bench.peers import PEERS

        self._case = Case(**case)
        if self._case.threads:
            torch.set_num_threads(self._case.threads)

        def runner(case: Case) -> LocalRunner:
            return LocalRunner(PEERS[peer], case, make_inputs(case), make_grad(case))

        self._runner = runner(self._case)
        # For `memory`: what stays for good (threads' stacks, workspaces, compiled code) is not the case's. On the CPU
        # the run is a small one, so that no freed memory lies ready; on a GPU, whose meter sees through that, it is the
        # case's own, so that no tuning falls into the step that is measured.
        longest = self._case.length if self._case.device == "cuda" else WARM_UP_LENGTH
        small = replace(self._case, length=min(longest, self._case.length))
        self._warm_up = lambda: runner(small).results(make_grad(small))

    def results(self, grad: str, out: str) -> None:
        """grad and out are files of tensors."""
        import torch

        results = self._runner.results(torch.load(grad, map_location=self._case.device, weights_only=True))
        torch.save([x.cpu() for x in results], out)

    def sample(self, calls: int) -> tuple[float, ...]:
        return tuple(self._runner.sample(calls))

    def memory(self, what: str) -> float:
        self._warm_up()
        return self._runner.memory(what)


def main() -> None:
    _set_path(os.environ.get(sys.argv[1]) if len(sys.argv) > 1 else None)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not get between the answers
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request["do"])(**request["with"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
