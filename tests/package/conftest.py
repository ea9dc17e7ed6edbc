import pytest


@pytest.fixture
def text(tmp_path):
    """A file of 20,000 bytes that are not UTF-8."""
    file = tmp_path / "text"
    file.write_bytes(b"".join(b"line %d \xff\xe9\x80 of text\n" % i for i in range(2000))[:20_000])
    return file
