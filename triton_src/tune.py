"""Finds tile shapes, warps and stages on the GPU of this machine: python -m triton_src.tune

Compiles every candidate of every kernel exactly as it would be shipped, runs it on sparse and dense inputs, compares
what it writes with what the present shape's kernel writes, and prints the times. With --write the fastest of each goes
into tiles.json.
"""

import argparse
import ctypes
import itertools
import json
import statistics
import struct
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path

import torch

from bench.lib.case import Case
from bench.lib.inputs import make_grad, make_inputs

from . import variants
from .compile import compile_variant
from .launchers import packing
from .lib.dropout import Dropout
from .lib.entmax import ALPHA_NUMBER
from .lib.marks import GATHER_ROOM
from .lib.tile_lists import count_tile_rows, count_tile_words
from .lib.visibility import LENGTHS_NONE, TILE, UNLIMITED
from .spec import APPENDED, MATRIX
from .variants import Shape

INPUTS = ("structured:0.5", "structured:0.85", "gaussian:1.5")
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# Not tuned here: the kernels for few queries have problems of their own, and shapes that were chosen by hand; those
# over a paged cache have the shapes of the kernels that they are made of.
TUNED = [name for name, spec in variants.ATTENTION.items() if "few" not in spec.arguments and not spec.suffix]
COMPARED = {  # of what each kernel writes; a kernel that is missing here is an error
    "attend": ("out", "row_state", "tiles"),
    "mark": ("key_marks", "row_marks"),
    "grad_query": ("grad_query", "row_terms"),
    "grad_key_value": ("grad_key", "grad_value"),
    "count_support": ("support_size", "largest_weight"),
}


class Kernel:
    """A compiled variant, loaded into torch's context."""

    cuda = None

    def __init__(self, variant, cubin):
        if Kernel.cuda is None:
            torch.cuda.init()
            torch.empty(1, device="cuda")
            Kernel.cuda = ctypes.CDLL("libcuda.so.1")
        self.variant = variant
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.cuda.cuModuleLoadData(ctypes.byref(module), cubin))
        self._check(
            self.cuda.cuModuleGetFunction(ctypes.byref(self._function), module, f"adasplash_{variant.name}".encode())
        )

    def prepare(self, shared):
        self._shared = shared
        self._check(self.cuda.cuFuncSetAttribute(self._function, MAX_SHARED, shared))
        return self

    def _check(self, result):
        if result:
            raise RuntimeError(f"{self.variant}: CUDA error {result}")

    def launch(self, programs, values):
        arguments = [*self.variant.arguments(), *APPENDED]
        if missing := [name for name, _ in arguments if name not in values]:
            raise ValueError(f"{self.variant.kernel}: Problem does not know the arguments {', '.join(missing)}")
        data = struct.pack(packing(arguments), *(values[name] for name, _ in arguments))
        size = ctypes.c_size_t(len(data))
        buffer = ctypes.create_string_buffer(data, len(data))
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE and CU_LAUNCH_PARAM_END
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = self.variant.shape.warps * 32
        self._check(
            self.cuda.cuLaunchKernel(self._function, programs, 1, 1, block, 1, 1, self._shared, stream, None, extra)
        )


class Problem:
    """Tensors of one case, and what the kernels are given."""

    def __init__(self, case):
        self.case = case
        query, key, value = make_inputs(case)
        batch, heads, length, head_dim = query.shape
        tiles, tile_rows = -(-length // TILE.value), count_tile_rows(length)
        like = dict(device=case.device)
        self.tensors = {
            "query": query, "key": key, "value": value, "grad_out": make_grad(case), "out": torch.empty_like(query),
            "grad_query": torch.empty_like(query), "grad_key": torch.empty_like(key),
            "grad_value": torch.empty_like(value),
            "row_state": torch.empty(batch, heads, length, 2, **like),
            "row_terms": torch.empty(batch, heads, length, 4, **like),
            "tile_margins": torch.empty(batch, heads, 4 * tile_rows, tiles, dtype=torch.int16, **like),
            "tile_lists": torch.empty(batch, heads, tile_rows, tiles, dtype=torch.int32, **like),
            "key_marks": torch.zeros(batch, heads, tile_rows, tiles, 2, dtype=torch.int32, **like),
            "row_marks": torch.zeros(batch, heads, tile_rows, tiles, 4, dtype=torch.int16, **like),
            "probe_counts": torch.tensor([0, 1], dtype=torch.int32, **like).repeat(batch * heads),  # none of one probed
            "gathered": torch.empty(batch, heads, tile_rows, GATHER_ROOM.value, dtype=torch.int32, **like),
            "support_size": torch.empty(batch, heads, length, dtype=torch.int32, **like),
            "largest_weight": torch.empty(batch, heads, length, **like),
            "tile_counts": torch.zeros(batch, heads, 2, dtype=torch.int64, **like),
            "tiles": torch.zeros(batch, heads, tile_rows, count_tile_words(length), dtype=torch.int32, **like),
            "support": torch.empty(batch, heads, length, 0, dtype=torch.int32, **like),  # no marks are kept
            "remaining": torch.zeros(batch, heads, tile_rows, 2, dtype=torch.int32, **like),
        }  # fmt: skip
        # What is not asked for: lengths, places, alphas and slopes in memory, dropout, the gradient of alpha, a probe.
        absent = (
            "call.queries.lengths", "call.keys.lengths", "call.alpha.per_head", "call.scores.slopes",
            "call.scores.slopes_batch_stride", "call.scores.has_slopes", "call.scores.q_positions",
            "call.scores.has_positions", "alpha_terms", "probe_from", "row_seeds",
             *(f"call.dropout.{part}" for part in Dropout._fields),
        )  # fmt: skip
        self.values = dict.fromkeys((*absent, *(name for name, _ in APPENDED)), 0)
        for name, x in self.tensors.items():
            if any(spec.arguments.get(name) is MATRIX for spec in variants.ATTENTION.values()):
                places = (x.data_ptr(), *x.stride()[:3])
                self.values |= {f"{name}.{part}": v for part, v in zip(MATRIX._fields, places, strict=True)}
            else:
                self.values[name] = x.data_ptr()
        for side in ("call.queries", "call.keys"):
            self.values |= {
                f"{side}.lengths_kind": LENGTHS_NONE.value, f"{side}.rows": length, f"{side}.max_seqlen": length,
                f"{side}.tile_rows": tile_rows,
            }  # fmt: skip
        self.values |= {
            "call.alpha.source": ALPHA_NUMBER.value, "call.alpha.number": case.alpha,
            "call.scores.scale": head_dim**-0.5, "call.scores.window_left": UNLIMITED.value,
            "call.scores.window_right": 0 if case.causal else UNLIMITED.value,
            "marks": self.values["row_marks"], "support_capacity": 0,
            "gather_from": UNLIMITED.value, "gather_below": 0,
            "counts_batch_stride": 2 * heads, "call.state_batch_stride": heads * length, "call.heads": heads,
            "call.group": 1, "call.few_queries": -1,
            "call.tile_words": self.tensors["tiles"].shape[3], "call.head_dim": head_dim, "call.value_dim": head_dim,
        }  # fmt: skip

    def run(self, kernel):
        v = kernel.variant
        side = v.shape.block_n if v.kernel == "grad_key_value" else v.shape.block_m
        values = self.values | {"gather_below": 1 if v.kernel == "mark" or v.gather else 0}
        kernel.launch(-(-self.case.length // side) * self.case.batch * self.case.heads, values)


def milliseconds(problem, kernel, times=7):
    """Median of some launches."""
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        problem.run(kernel)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def difference(problem, kernel, exact):
    """The largest difference between what the kernel writes and what the table's kernel wrote, relative; of tile bits
    the share of words, as a weight next to nothing may be none with other sums."""
    for name in exact:
        problem.tensors[name].fill_(0)
    problem.run(kernel)
    worst = 0.0
    for name, x in exact.items():
        if x.is_floating_point():
            y, x = problem.tensors[name].double().nan_to_num(1e30), x.double()
            worst = max(worst, ((y - x).abs().max() / x.abs().max().clamp(min=1e-30)).item())
        else:
            worst = max(worst, (problem.tensors[name] != x).double().mean().item())
    return worst


def candidates(kernel, block_d, gather):
    """The shapes to try."""
    sides = [(64, 64), (32, 64) if kernel == "grad_key_value" else (64, 32)]
    ways = (False,) if gather else (False, True)
    scanned = [(n, ahead) for n in (64, 128, 256) for ahead in ways] if kernel == "attend" else [(None, False)]
    for (m, n), warps, stages, registers, (scan_n, ahead) in itertools.product(
        sides, (4, 8), (1, 2, 3), (None, 128, 168), scanned
    ):
        if warps == 4 or registers is None:  # which eight warps have enough of
            yield Shape(m, n, warps, stages, registers, block_d, scan_n, ahead)


def write(arch, variant):
    """Puts a variant's shape into tiles.json, for all that share its table."""
    data = json.loads(variants.TILES.read_text())
    variants.put_shape(data, arch, variant)
    variants.TILES.write_text(variants.format_shapes(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], choices=(64, 128, 256))
    parser.add_argument("--kernels", nargs="+", default=TUNED, choices=TUNED)
    parser.add_argument("--inputs", nargs="+", default=INPUTS, help="as bench.lib.inputs names them")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--gather", action="store_true", help="of the backward, the code that gathers")
    parser.add_argument("--show", type=int, default=6, help="candidates to print for each kernel")
    parser.add_argument("--write", action="store_true", help="put the fastest into tiles.json")
    args = parser.parse_args()
    if missing := set(TUNED) - COMPARED.keys():
        sys.exit(f"COMPARED does not say what to compare of {', '.join(sorted(missing))}")
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    alpha = {1.5: "1_5", 2.0: "2"}.get(args.alpha, "any")
    base = {
        (v.kernel, v.block_d): replace(v, hot=False)  # so that it equals the candidate of its shape
        for v in variants.variants(arch)
        if v.kernel in TUNED and v.dtype == "bf16" and v.alpha in ("any", alpha)  # its own come last
        if v.gather == (args.gather and v.spec.gathers)
    }
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor() as pool:
        tried = {
            place: list(dict.fromkeys([v, *(
                replace(v, shape=shape)
                for shape in (candidates(*place, args.gather) if place[0] in args.kernels else ())
            )]))
            for place, v in base.items()
            if place[1] in args.head_dims
        }  # fmt: skip
        flat = [v for group in tried.values() for v in group]
        futures = [pool.submit(compile_variant, v, arch, cache) for v in flat]
        compiled = {}
        for variant, future in zip(flat, futures, strict=True):
            try:
                about, _ = future.result()
            except Exception as error:  # a shape that Triton refuses
                print(f"{variant.name} {astuple(variant.shape)}: {str(error).splitlines()[0][:100]}")
                continue
            if about["shared"] <= variants.SHARED_KIB[arch] * 1024:
                cubin = Path(about["stored"]).with_suffix(".cubin").read_bytes()
                compiled[variant] = (Kernel(variant, cubin).prepare(about["shared"]), about)
        for head_dim in args.head_dims:
            tune_head_dim(args, arch, head_dim, tried, compiled)


def tune_head_dim(args, arch, head_dim, tried, compiled):
    results = {}
    for name in args.inputs:
        case = Case(
            device="cuda",
            input=name,
            heads=args.heads,
            length=args.length,
            head_dim=head_dim,
            dtype="bf16",
            alpha=args.alpha,
        )
        problem = Problem(case)
        for kernel in TUNED:
            group = tried[kernel, head_dim]
            problem.run(compiled[group[0]][0])
            exact = {name: problem.tensors[name].clone() for name in COMPARED[kernel]}
            for variant in group:
                if variant in compiled:
                    this = compiled[variant][0]
                    error = difference(problem, this, exact)
                    results.setdefault((kernel, variant), {})[name] = (
                        milliseconds(problem, this) if error < 2e-2 else float("inf")
                    )
                    if error >= 2e-2:
                        print(f"{variant.name} {astuple(variant.shape)} {name}: off by {error:.1e}")
            problem.run(compiled[group[0]][0])  # for the kernels after it
    for kernel in args.kernels:
        mine = {v: times for (k, v), times in results.items() if k == kernel}
        ranked = sorted(mine, key=lambda v: sum(mine[v].values()))
        print(f"\n{kernel}, head size {head_dim}, milliseconds: {', '.join(args.inputs)}")
        shown = ranked[: args.show]
        for variant in [*shown, *(v for v in tried[kernel, head_dim][:1] if v not in shown)]:
            about = compiled[variant][1]
            times = "  ".join(f"{mine[variant][name]:7.3f}" for name in args.inputs)
            mark = " (present)" if variant is tried[kernel, head_dim][0] else ""
            used = f"{about['registers']} registers, {about['spilled']} spilled"
            print(f"  {astuple(variant.shape)!s:36} {times}   {used}{mark}")
        if args.write:
            write(arch, ranked[0])


if __name__ == "__main__":
    main()
