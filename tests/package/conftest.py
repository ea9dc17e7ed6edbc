import shutil

import pytest

from common import ROOT, run


@pytest.fixture
def text(tmp_path):
    """A file of 20,000 bytes that are not UTF-8."""
    file = tmp_path / "text"
    file.write_bytes(b"".join(b"line %d \xff\xe9\x80 of text\n" % i for i in range(2000))[:20_000])
    return file


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """What a build needs, as git has it: a copy for each of the processes that tests run in, as builds write there."""
    folder = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines():
        if name.partition("/")[0] not in ("docs", "examples", "tests", "bench") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder
