"""What the tests share: inputs, the accuracy rule, and Python processes of their own."""

import ctypes
import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import reference

ROOT = Path(__file__).resolve().parents[2]
ALPHAS = (1.05, 1.1, 1.25, 1.5, 1.75, 2.0)
HALF = (torch.bfloat16, torch.float16)
MANY = 1 << 29  # more keys than there are

# Of `make_inputs`, for the tests that compare every kind of shape.
SHAPES = {
    "one of everything": dict(batch=1, heads=1, m=1, n=1, size=1),
    "one key": dict(heads=3, m=5, n=1, size=8),
    "one query": dict(m=1, n=77, size=32),
    "one query, many keys": dict(batch=1, m=1, n=1000, size=64),
    "nothing round": dict(heads=3, m=67, n=131, size=33),
    "more queries than keys": dict(batch=1, m=131, n=67, size=40, value_size=24),
    "more keys than queries": dict(m=33, n=129, size=16),
    "many blocks": dict(batch=1, heads=3, m=330, n=420, size=16),
    "grouped queries": dict(heads=6, kv_heads=2, m=65, n=65, size=17),
    "one head of keys": dict(heads=4, kv_heads=1, m=64, n=64, size=64),
    "size 1, value size 7": dict(m=20, n=90, size=1, value_size=7),
    "size 5, value size 1": dict(m=20, n=90, size=5, value_size=1),
    "value wider than key": dict(m=70, n=70, size=24, value_size=200),
    "size 255": dict(batch=1, m=30, n=100, size=255, value_size=3),
    "widest": dict(batch=1, m=70, n=130, size=256),
}

# Error allowed beside that of the dense composition, as a share of the largest exact number. Where that is less than
# LEAST of the numbers that it is made of, it is what their rounding leaves: a row with one key in its support has no
# gradient, exactly.
LEAST = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 2e-4}

CUDA_KERNELS = False  # whether they run the tests, on a GPU or emulated: the `backend` fixture says so


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor

    def detached(self) -> "Inputs":
        return Inputs(*(x.detach().clone().requires_grad_(x.requires_grad) for x in self))


def make_inputs(
    batch: int = 2,
    heads: int = 2,
    m: int = 37,
    n: int = 53,
    size: int = 16,
    kv_heads: int | None = None,
    value_size: int | None = None,
    *,
    sigma: float = 1.5,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> Inputs:
    """Query and key from N(0, sigma²), value from N(mean, 1); the same numbers on every backend."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    value_size = size if value_size is None else value_size

    def draw(shape, sigma, mean=0.0):
        x = torch.randn(*shape, generator=generator) * sigma + mean
        return x.to(device, dtype).requires_grad_(requires_grad)

    return Inputs(
        draw((batch, heads, m, size), sigma),
        draw((batch, kv_heads, n, size), sigma),
        draw((batch, kv_heads, n, value_size), 1.0, mean),
    )


def normal_like(x: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device, x.dtype)


def scored_inputs(scores: Tensor, value: Tensor, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs whose scores at scale 1 are exactly the rows (M, N) given, M <= 256; value (N, D_v)."""
    m = scores.shape[0]
    return Inputs(*(x[None, None].to(device, dtype) for x in (torch.eye(m), scores.T, value)))


def assert_accurate(
    what: str, actual: Tensor, exact: Tensor, composed: Tensor, size: float = 1.0, times: float = 2
) -> None:
    """At most `times` the error of the dense composition in the same type, or the type's floor. `size`: of the numbers
    that make the result."""
    assert actual.shape == exact.shape, what
    assert actual.dtype == composed.dtype, what
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), what
    error = (actual.double() - exact).abs().max().item()
    composition = (composed.double() - exact).abs().max().item()
    least = max(LEAST[actual.dtype], 0.1 if CUDA_KERNELS else 0.0)  # these recompute dP where they subtract delta
    floor = FLOOR[actual.dtype] * max(exact.abs().max().item(), least * size)
    assert error <= max(times * composition, floor), (
        f"{what}: error {error:.2e}, that of the dense composition {composition:.2e}, floor {floor:.2e}"
    )


def check_forward(op, inputs: Inputs, *options, **keywords) -> Tensor:
    """The op against the reference; returns what it gave."""
    with torch.no_grad():
        out = op(*inputs, *options, **keywords)
        exact = reference.attention(*inputs, *options, **keywords).out
        composed = reference.attention(*inputs, *options, **keywords, dtype=inputs.query.dtype).out
    assert out.is_contiguous() and out.device == inputs.query.device
    assert_accurate("out", out, exact, composed)
    return out


def assert_same_bits(one, other) -> None:
    """Two tensors, or two sequences of tensors."""
    if isinstance(one, Tensor):
        one, other = (one,), (other,)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Values copied through a product with 1: to the bit, but for fp32 as six bf16 products, whose sums round."""
    rtol = 2.0**-21 if actual.dtype == torch.float32 and actual.is_cuda else 0.0
    torch.testing.assert_close(actual, expected, atol=0, rtol=rtol)


@functools.cache
def library() -> ctypes.CDLL:
    """The library beneath the package, for what it exports for tests."""
    from adasplash._load import library_path

    return ctypes.CDLL(library_path())


_gathers_from = MANY


def gather(length: int, below: int = 101) -> None:
    """From how many queries and keys on, and below what per cent of weighing ones, they are gathered on the GPU."""
    global _gathers_from
    _gathers_from = length
    library().adasplash_gather(ctypes.c_int32(length), ctypes.c_int32(below))


def gathers() -> bool:
    """Whether `gather` has made all sequences gather."""
    return _gathers_from == 1


def cuda_implementations() -> list[str]:
    """The implementations of attention on the GPU that are built, in order of preference. The last serves all calls."""
    names = library().adasplash_cuda_implementations
    names.restype = ctypes.c_char_p
    return names().decode().split(",")


def force_cuda_implementation(name: str | None) -> None:
    """Has this one compute all calls from now on, which fail where it does not serve them; None: as users have it."""
    unknown = library().adasplash_force_cuda_implementation(name.encode() if name else None)
    assert not unknown, name


def gradients(inputs: Inputs, grad: Tensor, function, *options, **keywords) -> tuple[Tensor, ...]:
    """out, dq, dk, dv, and dalpha where alpha is given by name as a tensor, for the gradient `grad` of the result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if isinstance(keywords.get("alpha"), Tensor):
        leaves.append(keywords["alpha"].detach().requires_grad_())
        keywords["alpha"] = leaves[-1]
    out = function(*leaves[:3], *options, **keywords)
    out.backward(grad.to(out.dtype))
    return out.detach(), *(x.grad for x in leaves)


def check_gradients(op, inputs: Inputs, *options, times: float = 2, room: float = 1, **keywords) -> tuple[Tensor, ...]:
    """Forward and backward of the op against the reference; returns what `gradients` does. `room`: floors of dq and dk
    so many times higher."""
    grad = normal_like(inputs.query.new_empty(*inputs.query.shape[:-1], inputs.value.shape[-1]))

    def dense(*arguments, **keywords):
        if inputs.query.dim() == 3:
            return reference.attention_varlen(*arguments, **keywords)
        return reference.attention(*arguments, **keywords).out

    actual = gradients(inputs, grad, op, *options, **keywords)
    composed = gradients(inputs, grad, dense, *options, **keywords, dtype=inputs.query.dtype)
    alpha = keywords.get("alpha")
    if isinstance(alpha, Tensor):
        keywords["alpha"] = per_row(alpha.double(), inputs.query)
    doubles = Inputs(*(x.double() for x in inputs))
    exact = gradients(doubles, grad, dense, *options, **keywords, dtype=torch.float64)
    made_of = {"out": None, "dq": inputs.key, "dk": inputs.query, "dv": None}
    for (what, terms), *three in zip(made_of.items(), actual[:4], exact[:4], composed[:4], strict=True):
        size = 1.0 if terms is None or terms.numel() == 0 else max(1.0, terms.abs().max().item())
        assert_accurate(what, *three, size=size * (room if terms is not None else 1), times=times)
    if isinstance(alpha, Tensor):
        assert_accurate_dalpha(actual[4], exact[4], composed[4], 2 * FLOOR[inputs.query.dtype])
    return actual


def per_row(alpha: Tensor, query: Tensor) -> Tensor:
    """Alpha per head, or one for all, as one for each row of the reference: (B, H, M, 1), packed (1, H, T_q, 1)."""
    shape = (1, query.shape[1], query.shape[0], 1) if query.dim() == 3 else (*query.shape[:3], 1)
    return alpha.reshape(-1, 1, 1).expand(shape).contiguous()


def assert_accurate_dalpha(actual: Tensor, rows: Tensor, composed: Tensor, floor: float) -> None:
    """A sum over rows (`rows`: every one's share), which may cancel: its floor goes with the sum of their sizes. CUDA
    kernels keep of z - tau what fp32 does, which near alpha = 1 is little of how nearly equal weights differ."""
    floor *= 10 if CUDA_KERNELS else 1
    assert actual.shape == composed.shape and actual.dtype == composed.dtype and actual.isfinite().all()
    heads = (0, 1, 2, 3) if actual.dim() == 0 else (0, 2, 3)
    exact, size = rows.sum(heads), rows.abs().sum(heads)
    error, composition = ((x.double() - exact).abs() for x in (actual, composed))
    # Where every row has one key and no gradient, roundings of nothing are left.
    allowed = torch.maximum(2 * composition, floor * size + torch.finfo(actual.dtype).eps * exact.abs() + 1e-20)
    assert (error <= allowed).all(), f"dalpha: error {error}, composition {composition}, size {size}"


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """Runs a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_python(code: str, *arguments: object, fails: bool = False, **options) -> str:
    """Runs code in a process of its own; returns its output, or with `fails` the last line of its error output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1] if fails else done.stdout


def build_once(tmp_path_factory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that `build` has filled; the workers of pytest-xdist share what one of them has built."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, outcome = base / name, base / f"{name}.outcome"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            folder.mkdir()
            try:
                build(folder)
                outcome.touch()
            except BaseException as error:
                outcome.write_text(f"{name} could not be built: {error}")
                raise
    assert not outcome.read_text(), outcome.read_text()
    return folder
