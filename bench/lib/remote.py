"""A runner whose peer lives in a process of its own (`bench.lib.worker`)."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.lib.case import Case
from bench.lib.runner import Seconds
from bench.peers import Peer

# Freed memory goes back at once, so that a peak is what was in use and not what was kept.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class RemoteRunner:
    """Raises RuntimeError with the worker's own words if it fails."""

    def __init__(self, peer: Peer, case: Case) -> None:
        self.peer = peer
        self._device = case.device
        command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        command += [peer.package_path] if peer.package_path else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
        )
        try:
            self._ask("prepare", peer=peer.name, case=case.to_dict())
        except BaseException:
            self.close()
            raise

    def _ask(self, what: str, /, **arguments):
        self._process.stdin.write(json.dumps({"do": what, "with": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.peer.name}: its process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.peer.name}: {answer['error']}")
        return answer["ok"]

    def results(self, grad: Tensor) -> tuple[Tensor, ...]:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(grad.cpu(), f"{folder}/grad.pt")
            self._ask("results", grad=f"{folder}/grad.pt", out=f"{folder}/out.pt")
            return tuple(torch.load(f"{folder}/out.pt", map_location=self._device, weights_only=True))

    def sample(self, calls: int) -> Seconds:
        return Seconds(*self._ask("sample", calls=calls))

    def memory(self, what: str) -> float:
        return self._ask("memory", what=what)

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
