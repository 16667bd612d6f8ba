"""Files of a tar archive that is read as a stream, with bounded memory whatever the archive contains.

Python's tarfile reads the archive. The limits apply to the sizes that a header claims, before the data are
read: names and pax headers, each member, and all members of a sample together.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any, Protocol

# webdataset ignores members with such names.
_META = re.compile(r"__[^/]*__($|/)")
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# For one member. A pattern that tarfile searches for in a pax header takes quadratic time before 3.11.10, and
# headers in a row are recursive calls. PATH_MAX is 4096.
_LONGEST_HEADERS, _MOST_HEADERS = 1 << 15, 16
_LONGEST_NAME = 4096


class LimitError(tarfile.ReadError):
    """A header claims more than the limits allow, or a form that stored images never need."""


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class _Member(tarfile.TarInfo):
    """A header; tarfile documents `_proc_member` as the method to override."""

    def _proc_member(self, archive: _Archive) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        if self.type in _EXTENDED:
            archive.headers += 1
            archive.headers_bytes += self.size
            if self.size < 0 or archive.headers_bytes > _LONGEST_HEADERS or archive.headers > _MOST_HEADERS:
                raise LimitError(
                    f"expected at most {_MOST_HEADERS} names and pax headers of {_LONGEST_HEADERS} bytes "
                    f"for a member, found {archive.headers} of {archive.headers_bytes} bytes"
                )
        return super()._proc_member(archive)  # type: ignore[misc]

    def _refuse_sparse(self, *_: object) -> None:
        raise LimitError("expected members stored as they are, found a sparse one")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Archive(tarfile.TarFile):
    tarinfo = _Member
    headers = headers_bytes = 0


def files_in(stream: _Readable, most_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the name (`fname`) and the content (`data`) of every regular file, as webdataset does.

    `most_bytes` is the limit for a member, and for consecutive members with the same key together, each with
    its header. Raises LimitError beyond it, and tarfile.TarError for a damaged archive.
    """
    key, sample_bytes = None, 0
    # Not "r|*": a compressed archive could decompress without end.
    with _Archive.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members.clear()
            # tarfile keeps global pax headers for all members that follow, so they count for each of them.
            archive.headers = 0
            archive.headers_bytes = sum(len(key) + len(value) for key, value in archive.pax_headers.items())
            if not 0 <= member.size <= most_bytes:
                raise LimitError(
                    f"expected members of at most {most_bytes} bytes (data.max_sample_mb), found one of "
                    f"{member.size}: {member.name[:80]!r}"
                )
            if len(member.name) > _LONGEST_NAME:
                raise LimitError(
                    f"expected names of at most {_LONGEST_NAME} characters, found one of {len(member.name)}"
                )
            if not member.isreg() or _META.match(member.name):
                continue
            before, key = key, key_and_suffix(member.name)[0]
            sample_bytes = tarfile.BLOCKSIZE + member.size + (sample_bytes if key == before else 0)
            if sample_bytes > most_bytes:
                raise LimitError(
                    f"expected samples of at most {most_bytes} bytes (data.max_sample_mb), found more with "
                    f"the key {str(key)[:80]!r}"
                )
            file = archive.extractfile(member)
            assert file is not None
            yield {"fname": member.name, "data": file.read()}


def key_and_suffix(name: str) -> tuple[str | None, str | None]:
    """Split a name at the first dot of its base name, as webdataset does, in linear time."""
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0 or name[dot - 1] == "/":
        return None, None
    return name[:dot], name[dot + 1 :]
