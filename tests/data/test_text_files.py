"""Text files are read by what is in them; what is no text is refused by what it is."""

import bz2
import gzip
import io
import lzma
import zipfile

import pyarrow as pa
import pytest

from rekindle.data.errors import InputError
from rekindle.data.text_files import compression_of, open_text

TEXT = b'{"text": "\xc3\xa9"}\n' * 300


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


def zipped(content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", content)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.txt.zst"])
@pytest.mark.parametrize(
    ("pack", "packed"),
    [(bytes, None), (gzip.compress, "gzip"), (zstd, "zstd"), (bz2.compress, "bz2")],
)
def test_what_is_in_a_file_decides_and_not_its_name(tmp_path, caplog, name, pack, packed):
    path = tmp_path / name
    path.write_bytes(pack(TEXT))
    caplog.set_level("INFO", "rekindle")
    assert compression_of(str(path)) == packed
    with open_text(str(path)) as stream:
        assert stream.read() == TEXT
    own = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2"}.get(packed, "")
    assert (f"is packed with {packed}" in caplog.text) == (
        packed is not None and path.suffix != own
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lzma.compress(TEXT), r"packed with xz.*xz -d"),
        (zipped(TEXT), "zip archive"),
        (b"PAR1" + TEXT, r"parquet file; name it \.parquet"),
        (b"ARROW1\0\0" + TEXT, r"Arrow file; name it \.arrow"),
        (TEXT.decode().encode("utf-16"), r"UTF-16; convert.*iconv"),
        (TEXT.decode().encode("utf-16-le"), "NUL byte at byte 2: it is not UTF-8 text"),
        (gzip.compress(gzip.compress(TEXT)), "packed twice"),
        (gzip.compress(zipped(TEXT)), "zip archive"),
        (bytes(10), "NUL byte at byte 1"),
    ],
)
def test_what_is_no_text_is_told_by_what_it_is(tmp_path, content, told):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"d\.jsonl .*{told}"):
        open_text(str(path))


def test_an_empty_file_and_one_that_only_looks_packed(tmp_path):
    for content in (b"", b"BZh is no archive", b"PK"):
        (tmp_path / "d.txt").write_bytes(content)
        with open_text(str(tmp_path / "d.txt")) as stream:
            assert stream.read() == content
