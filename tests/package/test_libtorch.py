"""libtorch C++ without Python: models that use the op, and the op itself, through the installed CMake package."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import adasplash
from adasplash.info import collect
from common import MANY, ROOT, assert_same_bits, build_once, gather, gradients, make_inputs, run

pytestmark = [pytest.mark.backends("cpu", "cuda"), pytest.mark.slow]

TORCH = Path(torch.__file__).parent
PROGRAMS = Path(__file__).parent / "libtorch"
NO_TOOLKIT = "no CUDA toolkit on this machine"


class Attend(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.adasplash.entmax_attn(query, key, value, 1.25, True, scale=0.3) * 2


def link_torch(folder):
    """This torch with CMake files of its own."""
    for part in ("lib", "include", "bin"):
        (folder / part).symlink_to(TORCH / part)
    shutil.copytree(TORCH / "share", folder / "share")


@pytest.fixture(scope="session")
def torch_with_cuda(tmp_path_factory):
    """This torch with CUDA switched on in its CMake files, as that of CUDA builds is, seen on a machine without the
    toolkit."""

    def build(folder):
        link_torch(folder)
        caffe2 = folder / "share/cmake/Caffe2"
        config = caffe2 / "Caffe2Config.cmake"
        text = config.read_text().replace("if(0)", "if(1)")
        assert "if(1)" in text
        config.write_text(text)
        (caffe2 / "public/cuda.cmake").write_text(f'message(FATAL_ERROR "{NO_TOOLKIT}")\n')

    return build_once(tmp_path_factory, "torch_with_cuda", build)


def configure(source, build, prefixes, *options):
    prefix_path = ";".join(map(str, prefixes))
    return run(
        "cmake", "-G", "Ninja", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_PREFIX_PATH={prefix_path}", *options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def cmake_installation(tmp_path_factory, torch_with_cuda):
    """The library built by a CMake project that has it inside, against that torch, with no toolkit looked for; then
    installed, and the prefix moved."""

    def build(folder):
        configure(
            PROGRAMS / "inside",
            folder / "a build",
            [torch_with_cuda],
            f"-DADASPLASH_SOURCE={ROOT}",
            f"-DCMAKE_INSTALL_PREFIX={folder}/made",
            "-DADASPLASH_ARCHS=none",
        )
        run("cmake", "--build", folder / "a build", "-j", "2")
        run("cmake", "--install", folder / "a build")
        (folder / "made").rename(folder / "a moved prefix")

    return build_once(tmp_path_factory, "cmake_installation", build) / "a moved prefix"


@pytest.fixture(scope="session", params=(pytest.param("cmake", marks=pytest.mark.builds), "python"))
def programs(request, tmp_path_factory):
    """The programs of libtorch/, built through one installation or the other."""
    if request.param == "cmake":
        prefixes = [request.getfixturevalue(name) for name in ("cmake_installation", "torch_with_cuda")]
    else:
        prefixes = [adasplash.cmake_prefix_path, TORCH]

    def build(folder):
        # as some distributions link: without care, nothing that only registers ops survives this
        configure(PROGRAMS, folder, prefixes, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
        run("cmake", "--build", folder, "-j", "2")

    return build_once(tmp_path_factory, f"programs_{request.param}", build)


@pytest.fixture(scope="session")
def models(tmp_path_factory, backend):
    """One model in both formats."""

    def build(folder):
        torch.jit.script(Attend()).save(folder / "model.pt")
        length = torch.export.Dim("length", max=4096)
        program = torch.export.export(
            Attend(),
            tuple(make_inputs(2, 4, 33, 33, kv_heads=2, device=backend.device)),
            dynamic_shapes=({2: length},) * 3,
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))

    folder = build_once(tmp_path_factory, "models", build)
    return {"torchscript": folder / "model.pt", "aoti": folder / "model.pt2"}


def saved(folder, tensors):
    torch.save(tuple(tensors), folder / "inputs.pt")
    return folder / "inputs.pt", folder / "outputs.pt"


@pytest.mark.parametrize("mode", ("grad", "inference"))
@pytest.mark.parametrize("kind", ("torchscript", "aoti"))
def test_a_program_that_only_loads_a_model(backend, programs, models, tmp_path, kind, mode):
    for length in (33, 80):
        inputs = make_inputs(2, 4, length, length, kv_heads=2, device=backend.device)
        files = saved(tmp_path, inputs)
        done = run(programs / "run_model", kind, mode, models[kind], *files)
        assert done.stdout.strip() == "no python" and not done.stderr
        assert torch.equal(torch.load(files[1])[0], Attend()(*inputs))


@pytest.mark.builds
@pytest.mark.backends("cpu")
def test_a_project_with_the_sources_inside(cmake_installation, models, tmp_path):
    """By add_subdirectory: a program that only loads a model, and one that calls the op."""
    programs = cmake_installation.parent / "a build"
    inputs = make_inputs(2, 4, 40, 40, kv_heads=2)  # call_op says of 35 keys that they are there
    files = saved(tmp_path, inputs)
    run(programs / "run_model", "torchscript", "inference", models["torchscript"], *files)
    assert torch.equal(torch.load(files[1])[0], Attend()(*inputs))
    assert run(programs / "call_op", 1.25, *files).stdout.split()[0] == adasplash.__version__


@pytest.mark.builds
@pytest.mark.backends("cpu")
def test_an_encoder_of_transformers(programs, tmp_path):
    """A padded batch, of another size than the one that was exported."""
    pytest.importorskip("transformers")
    import adasplash.integrations.transformers  # noqa: F401
    from dense_models import build, draw_ids, masks

    model = build("bert", dtype=torch.float32)
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=5, max=64)
    shapes = {name: {0: rows, 1: length} for name in ("input_ids", "attention_mask")}
    example = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "encoder.pt2"))
    for padded in ("right", "left"):
        ids, mask = draw_ids(), masks()[padded]
        files = saved(tmp_path, (ids, mask))
        assert run(programs / "run_model", "aoti", "inference", package, *files).stdout.strip() == "no python"
        seen = mask.bool()
        out, expected = torch.load(files[1])[0], model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(out[seen], expected[seen], atol=1e-4, rtol=1e-4)


def test_the_linker_keeps_the_library(programs):
    """run_model refers to no symbol of ours; without care the linker drops what nobody refers to."""
    assert "libadasplash" in run("readelf", "-d", programs / "run_model").stdout
    assert "adasplash" not in run("nm", "-uC", programs / "run_model").stdout


@pytest.fixture
def gathering(request):
    """What is compared with another process goes as it goes there."""
    if request.config.getoption("--backend") != "cpu":
        gather(MANY)


def test_the_op_and_its_gradients(backend, programs, tmp_path):
    inputs = make_inputs(2, 4, 40, 70, kv_heads=2, value_size=9, device=backend.device)
    files = saved(tmp_path, inputs)
    done = run(programs / "call_op", 1.25, *files)
    assert done.stdout.split() == [adasplash.__version__, collect()["cpu kernels in use"]]
    expected = gradients(inputs, torch.ones(2, 4, 40, 9, device=backend.device), adasplash.entmax_attn, 1.25, True, 0.3)
    *results, packed, dropped, support_size = torch.load(files[1])
    assert_same_bits(results, expected)
    assert torch.equal(packed, expected[0].transpose(1, 2).flatten(0, 1))
    rows = {
        name: torch.full((2,), number, device=backend.device)
        for name, number in (("q_seqlens", 30), ("kv_seqlens", 35), ("kv_starts", 3))
    }
    slopes = torch.full((inputs.query.shape[1],), 0.1, device=backend.device)
    told = adasplash.entmax_attn_summary(
        *inputs, 1.25, True, 0.3, window=(20, -1), alibi_slopes=slopes, **rows, dropout_p=0.25,
        dropout_seed=torch.tensor(7, device=backend.device),
    )  # fmt: skip
    assert_same_bits((dropped, support_size.long()), (told[0], told[1].support_size))


def test_the_activation(backend, programs, tmp_path):
    x, alpha = torch.randn(3, 20, 4, device=backend.device), torch.full((3, 1, 4), 1.3, device=backend.device)
    torch.save((x, alpha), tmp_path / "in.pt")
    run(programs / "activate", tmp_path / "in.pt", tmp_path / "out.pt")
    leaves = x.clone().requires_grad_(), alpha.requires_grad_()
    learned = adasplash.entmax(*leaves, 1)
    learned.backward(x)
    expected = adasplash.entmax(x, 1.25, 1), learned.detach(), *(leaf.grad for leaf in leaves)
    assert_same_bits(torch.load(tmp_path / "out.pt"), expected)


def test_errors_are_exceptions_that_name_the_argument(programs, tmp_path):
    files = saved(tmp_path, make_inputs())
    done = subprocess.run([programs / "call_op", "0.5", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "entmax_attn: alpha must be 1 or from 1.01 to 2, got 0.5" in done.stderr


@pytest.mark.backends("cpu")
def test_torch_itself_would_have_wanted_the_toolkit(torch_with_cuda, tmp_path):
    """The control: what a find_package(Torch) anywhere on the way would have run into."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(control LANGUAGES CXX)\nfind_package(Torch REQUIRED)\n"
    )
    command = ["cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build"]
    done = subprocess.run(
        [*command, f"-DCMAKE_PREFIX_PATH={torch_with_cuda}"], capture_output=True, text=True, check=False
    )
    assert done.returncode and NO_TOOLKIT in done.stderr


@pytest.mark.builds
def test_another_torch_is_refused_while_configuring(cmake_installation, tmp_path):
    link_torch(tmp_path)
    version = tmp_path / "share/cmake/Torch/TorchConfigVersion.cmake"
    version.write_text(version.read_text().replace(torch.__version__.split("+")[0], "2.1.0"))
    command = ["cmake", "-G", "Ninja", "-S", PROGRAMS, "-B", tmp_path / "build"]
    prefixes = f"-DCMAKE_PREFIX_PATH={cmake_installation};{tmp_path}"
    done = subprocess.run([*command, prefixes], capture_output=True, text=True, check=False)
    message = " ".join(done.stderr.split())
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"AdaSplash was built against torch {minor}, found 2.1.0" in message


@pytest.mark.builds
def test_the_library_has_no_python_and_no_cuda_in_it(cmake_installation):
    library = next(cmake_installation.rglob("libadasplash.so"))
    needed = [line for line in run("readelf", "-d", library).stdout.splitlines() if "(NEEDED)" in line]
    assert any("torch_cpu" in line for line in needed)
    assert not [line for line in needed if "python" in line or "cuda" in line]
