"""`--backend` chooses who runs the op tests: the CPU kernels, the CUDA path emulated on the CPU, or a real GPU."""

import functools
import importlib
import os
import shutil
import sys
import tempfile
import zlib
from dataclasses import dataclass, replace

import pytest
import torch

import common

os.environ.setdefault("ADASPLASH_KEY_INDEX", "read")  # a GPU would not read one of as few keys
sys.path.append(str(common.ROOT))  # bench and triton_src; last, as the installed adasplash is the one under test

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, common.HALF


@dataclass(frozen=True)
class Backend:
    name: str
    device: str  # where the tensors of a test live
    max_length: int  # the longest sequence it gets through in reasonable time
    dtypes: tuple[torch.dtype, ...]
    support_capacity: int  # places a row for keys that its autograd kernel asks for, where none are gathered
    examples: int  # combinations that the property test tries

    def needs(self, *, length: int = 0, dtype: torch.dtype = SINGLE) -> None:
        """Skips the test where the backend can't do what it is about."""
        if length > self.max_length:
            pytest.skip(f"{length} keys are too many for the {self.name} backend")
        if dtype not in self.dtypes:
            pytest.skip(f"the {self.name} backend has no {dtype}")


COMPILED = pytest.StashKey[str]()
BACKENDS = {
    "cpu": Backend("cpu", "cpu", 1 << 20, (DOUBLE, SINGLE, *HALF), support_capacity=128, examples=300),
    "emulated": Backend("emulated", "cpu", 140, (SINGLE, *HALF), support_capacity=0, examples=20),
    "cuda": Backend("cuda", "cuda", 1 << 20, (SINGLE, *HALF), support_capacity=0, examples=300),
}


def pytest_addoption(parser):
    parser.addoption("--backend", choices=BACKENDS, default="cpu", help="who runs the op tests")
    parser.addoption("--cases", type=int, metavar="K", help="at most K cases of each test, spread over them")
    parser.addoption(
        "--one-of",
        type=int,
        default=1,
        metavar="K",
        help="with --cases, one of K tests not about launches",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "backends(*names): the test is about these backends only")
    config.addinivalue_line("markers", "builds: builds the library anew, or takes as long: not in `make test`")
    config.addinivalue_line("markers", "slow: takes more than a few seconds, emulated only in `make test-all`")
    if config.getoption("--backend") != "cuda":
        # Triton decides when it is first imported whether it interprets, and torch's compiler imports it too.
        os.environ["TRITON_INTERPRET"] = "1"
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, torch.get_num_threads() // workers)  # threads that fight for cores spin
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start
    if "PYTEST_XDIST_WORKER" not in os.environ:
        # Compiled code of an earlier build of the library must not be found again; workers share the new folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.stash[COMPILED] = tempfile.mkdtemp(prefix="compiled-")
    config.option.log_level = config.option.log_level or "WARNING"  # the compiler logs thousands of lines


def pytest_unconfigure(config):
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)


def pytest_ignore_collect(collection_path, config):
    """Beside a GPU nothing is interpreted: Triton decides at its import, and then torch.compile could not compile."""
    interpreted = collection_path.parent.name == "tests" and collection_path.name in ("emulated", "kernels")
    return True if interpreted and config.getoption("--backend") == "cuda" else None


def pytest_generate_tests(metafunc):
    """Where the library has several implementations for the GPU, tests of what they compute run once for each."""
    names = metafunc.fixturenames
    if metafunc.config.getoption("--backend") != "cpu" and "backend" in names and "implementations" not in names:
        built = common.cuda_implementations()
        if len(built) > 1:
            metafunc.parametrize("cuda_implementation", built, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except RuntimeError as error:
        if "does not serve this call" in str(error):  # a forced implementation, of one that another one computes
            pytest.skip(str(error))
        raise


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--backend")
    kept = []
    for item in items:
        marker = item.get_closest_marker("backends")
        # What does not ask for a backend says nothing about another one than the usual.
        if chosen in marker.args if marker else chosen == "cpu" or "backend" in item.fixturenames:
            kept.append(item)
    if config.getoption("--cases"):
        kept = spread(kept, config.getoption("--cases"), config.getoption("--one-of"), chosen)
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def is_about_launches(item) -> bool:
    marker = item.get_closest_marker("backends")
    return marker is not None and "cpu" not in marker.args


def spread(items, most: int, one_of: int, chosen: str) -> list:
    """At most so many cases of each test function, and four times as many of those about launches, which a CPU has none
    of; of the others one function of `one_of`, always the same, and emulated no slow ones. Where they lie among its
    cases is another place for each function, so that together they meet all values of what many functions share."""
    kept, functions = [], {}
    for item in items:
        if chosen == "emulated" and item.get_closest_marker("slow") and not is_about_launches(item):
            continue  # mostly torch's compiler around the op, which the CPU's tests have
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if is_about_launches(item) or params.get("dtype", SINGLE) in BACKENDS[chosen].dtypes:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, cases in functions.items():
        number, about_launches = zlib.crc32(name.encode()), is_about_launches(cases[0])
        if (number >> 27) % one_of and not about_launches:  # not the bit by which `gathering` decides
            continue
        first, count = number % len(cases), min(4 * most if about_launches else most, len(cases))
        kept += [cases[(first + index * len(cases) // count) % len(cases)] for index in range(count)]
    return kept


def pytest_report_header(config):
    return f"backend: {config.getoption('--backend')}"


@pytest.fixture(scope="session")
def backend(request) -> Backend:
    """The backend under test. Emulation is switched on for the session by `emulated.install()` (tests/emulated/)."""
    name = request.config.getoption("--backend")
    if name == "emulated":
        importlib.import_module("emulated").install()
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--backend cuda: torch sees no GPU here", returncode=4)
    common.CUDA_KERNELS = name != "cpu"
    found = BACKENDS[name]
    # Where few cases of each test are wanted, so are fewer of those that a test draws.
    return replace(found, examples=found.examples * 2 // 5) if request.config.getoption("--cases") else found


@pytest.fixture(autouse=True)
def cuda_implementation(request):
    """The one under test: the preferred one with the others behind it, as users have it, or another one alone."""
    name = getattr(request, "param", None)
    if name is None or name == common.cuda_implementations()[0]:
        yield
        return
    common.force_cuda_implementation(name)
    yield
    common.force_cuda_implementation(None)


@pytest.fixture
def implementations(backend):
    """Their names, for a test that forces them itself."""
    yield common.cuda_implementations()
    common.force_cuda_implementation(None)


@pytest.fixture(autouse=True)
def gathering(request):
    """On the GPU one half of the tests goes over tiles as short sequences do, the other over marked keys."""
    if request.config.getoption("--backend") != "cpu":
        common.gather(1 if zlib.crc32(request.node.nodeid.encode()) % 2 else common.MANY)


@pytest.fixture(scope="session")
def make_inputs(backend):
    """`common.make_inputs` on the backend's device; skips what the backend can't do."""

    @functools.wraps(common.make_inputs)
    def make(*shape, **options):
        inputs = common.make_inputs(*shape, **options)
        backend.needs(length=inputs.key.shape[2], dtype=inputs.query.dtype)
        return common.Inputs(*(x.detach().to(backend.device).requires_grad_(x.requires_grad) for x in inputs))

    return make


@pytest.fixture(params=[DOUBLE, SINGLE, *HALF], ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request, backend) -> torch.dtype:
    backend.needs(dtype=request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
