"""The library cross-built for AArch64, and C++ programs over it run there, by an emulator of user programs.

torch for AArch64 is fetched once, half a gigabyte, and kept in build/aarch64; of a CUDA build the GPU's half is left
away, which nothing here calls.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

import adasplash
from common import FLOOR, ROOT, SHAPES, build_once, check_gradients, make_inputs, run

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.backends("cpu"),
    pytest.mark.builds,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no cross compiler, {COMPILER}"),
    pytest.mark.skipif(EMULATOR is None, reason="no emulator of user programs, qemu-aarch64"),
]
PROGRAMS = Path(__file__).parent / "libtorch"
KEPT = ROOT / "build/aarch64"
TARGET = (
    "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
)  # fmt: skip
GPU_HALF = re.compile(r"torch/lib/lib(torch_cuda|torch_python|torch_nvshmem|c10_cuda|caffe2_nvrtc)")
# What torch and its libraries ask the system about its processors.
CPUINFO = "".join(
    f"processor\t: {index}\nFeatures\t: fp asimd crc32 atomics fphp asimdhp cpuid asimdrdm asimddp\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
    for index in range(os.cpu_count())
)
MIDR = "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"


def fetch(package: str, folder: Path, *wanted: str) -> None:
    """Unpacks libraries, and what begins with `wanted`, of the package that pip finds for AArch64."""
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 25, 17)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
        done = subprocess.run(
            [*command, "--platform=manylinux2014_aarch64", "--dest", wheels, package],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"{package} for AArch64 could not be fetched: {done.stderr.strip().splitlines()[-1]}")
        [wheel] = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".so" in name or name.startswith(wanted)]
            archive.extractall(folder, [name for name in names if not GPU_HALF.match(name)])


@pytest.fixture(scope="session")
def torch_aarch64(tmp_path_factory):
    """This release of torch, and what its CPU half loads."""
    release = torch.__version__.split("+")[0]
    kept = KEPT / f"torch-{release}"

    def build(_):
        if kept.exists():
            return
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as partial:
            folder = Path(partial) / "site"
            folder.mkdir()
            fetch(f"torch=={release}", folder, "torch/include/", "torch/share/")
            libraries = folder / "torch/lib"
            needed = run("readelf", "-d", libraries / "libtorch.so", libraries / "libtorch_cpu.so").stdout
            for library, package in (("libcudart", "nvidia-cuda-runtime"), ("libcupti", "nvidia-cuda-cupti")):
                if version := re.search(rf"{library}\.so\.(\d+)", needed):
                    fetch(f"{package}=={version[1]}.*", folder)
            if "libtorch_cuda.so" in needed:
                run(COMPILER, "-shared", "-x", "c++", "/dev/null", "-o", libraries / "libtorch_cuda.so")
            folder.rename(kept)

    build_once(tmp_path_factory, "torch_aarch64", build)
    return kept / "torch"


@pytest.fixture(scope="session")
def programs(torch_aarch64, tmp_path_factory):
    """Those of libtorch/, through find_package. Objects of the library are kept."""

    def build(folder):
        library, prefix = KEPT / "library", folder / "prefix"
        run(
            "cmake", "-G", "Ninja", "-S", ROOT, "-B", library, *TARGET, f"-DCMAKE_PREFIX_PATH={torch_aarch64}",
            "-DCMAKE_CXX_FLAGS=-Werror", "-DADASPLASH_ARCHS=none", "-DCMAKE_INSTALL_LIBDIR=lib",
        )  # fmt: skip
        run("cmake", "--build", library, "-j", "2")
        run("cmake", "--install", library, "--prefix", prefix)
        prefixes = f"-DCMAKE_PREFIX_PATH={prefix};{torch_aarch64}"
        run("cmake", "-G", "Ninja", "-S", PROGRAMS, "-B", folder, *TARGET, prefixes, "-DCMAKE_BUILD_TYPE=Release")
        run("cmake", "--build", folder, "-j", "2")

    return build_once(tmp_path_factory, "programs_aarch64", build)


@pytest.fixture(scope="session")
def emulate(programs, tmp_path_factory):
    """Runs one of them. An older emulator shows a program the processors of this machine, and torch's libraries crash
    over those: files of the root that it is given come first."""
    root = tmp_path_factory.mktemp("root")
    sysroot = Path(run(COMPILER, "-print-file-name=libc.so.6").stdout.strip()).resolve().parent
    (root / "lib").symlink_to(sysroot)
    for name, content in (("proc/cpuinfo", CPUINFO), (MIDR, "0x00000000413fd0c1\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)

    def program(name, *arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        return run(EMULATOR, "-L", root, programs / name, *arguments, env=environment).stdout

    return program


class WithGradients(torch.nn.Module):
    """Attention, its gradients for that of its result, and all of them in one tensor."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor):
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_()]
        out = torch.ops.adasplash.entmax_attn(leaves[0], leaves[1], leaves[2], self.alpha, True)
        grads: list[torch.Tensor | None] = [grad]
        results = [out.detach().flatten()]
        for gradient in torch.autograd.grad([out], leaves, grads):
            assert gradient is not None
            results.append(gradient.flatten())
        return torch.cat(results)


@pytest.fixture
def entmax_attn(emulate, tmp_path):
    """The op as it is computed there, with a gradient."""

    def compute(inputs, grad, alpha):
        torch.jit.script(WithGradients(alpha)).save(tmp_path / "model.pt")
        torch.save((*inputs, grad), tmp_path / "inputs.pt")
        emulate("run_model", "torchscript", "grad", *(tmp_path / f"{name}.pt" for name in ("model", "inputs", "out")))
        [found] = torch.load(tmp_path / "out.pt")
        shapes = grad.shape, *(x.shape for x in inputs)
        parts = found.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    class Emulated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, alpha):
            ctx.inputs, ctx.alpha = (query.detach(), key.detach(), value.detach()), alpha
            return compute(ctx.inputs, query.new_zeros(*query.shape[:-1], value.shape[-1]), alpha)[0]

        @staticmethod
        def backward(ctx, grad):
            return *compute(ctx.inputs, grad, ctx.alpha)[1:], None

    def op(query, key, value, alpha, is_causal):
        assert is_causal
        return Emulated.apply(query, key, value, alpha)

    return op


@pytest.mark.parametrize("dtype", list(FLOOR), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_attention_and_its_gradients(entmax_attn, alpha, dtype):
    """Against the reference, here: lists of keys, dense rows, and a length that fills no vector."""
    inputs = make_inputs(1, 4, 150, 700, 33, kv_heads=2, dtype=dtype)
    inputs.query[:, :, ::3] *= 0.01
    check_gradients(entmax_attn, inputs, alpha, True)


@pytest.mark.parametrize("shape", ("one query, many keys", "widest", "size 5, value size 1"))
def test_shapes(entmax_attn, shape):
    check_gradients(entmax_attn, make_inputs(**SHAPES[shape]), 1.5, True)


def test_every_option(emulate, tmp_path):
    """The program that calls the C++ functions gives what these give here, but for how sums round."""
    inputs = make_inputs(2, 4, 40, 70, kv_heads=2, value_size=9)
    torch.save(tuple(inputs), tmp_path / "inputs.pt")
    printed = emulate("call_op", 1.25, tmp_path / "inputs.pt", tmp_path / "out.pt")
    assert printed.split() == [adasplash.__version__, "default"]
    out, dq, dk, dv, packed, dropped, support_size = torch.load(tmp_path / "out.pt")
    leaves = [x.requires_grad_() for x in inputs]
    expected = adasplash.entmax_attn(*leaves, 1.25, True, 0.3)
    gradients = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close((out, dq, dk, dv), (expected.detach(), *gradients), atol=1e-5, rtol=1e-5)
    assert torch.equal(packed, out.transpose(1, 2).flatten(0, 1))
    counts = {"q_seqlens": 30, "kv_seqlens": 35, "kv_starts": 3}
    rows = {name: torch.full((2,), count) for name, count in counts.items()}
    told, summary = adasplash.entmax_attn_summary(
        *inputs.detached(), 1.25, True, 0.3, window=(20, -1), alibi_slopes=torch.full((4,), 0.1), **rows,
        dropout_p=0.25, dropout_seed=torch.tensor(7),
    )  # fmt: skip
    torch.testing.assert_close(dropped, told.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(support_size.long(), summary.support_size.long())


def test_the_activation(emulate, tmp_path):
    x, alpha = torch.randn(3, 20, 4), torch.full((3, 1, 4), 1.3)
    torch.save((x, alpha), tmp_path / "inputs.pt")
    emulate("activate", tmp_path / "inputs.pt", tmp_path / "out.pt")
    leaves = x.clone().requires_grad_(), alpha.requires_grad_()
    learned = adasplash.entmax(*leaves, 1)
    expected = adasplash.entmax(x, 1.25, 1), learned.detach(), *torch.autograd.grad(learned, leaves, x)
    torch.testing.assert_close(tuple(torch.load(tmp_path / "out.pt")), expected, atol=1e-5, rtol=1e-5)
