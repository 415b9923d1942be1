"""Places that are no paths of the file system: object stores, through fsspec."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from loopkit.checkpoint.disk import check_size, is_folder, names, read_bytes
from loopkit.checkpoint.manifest import File
from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.checkpoint.tensors import CHUNK
from loopkit.errors import CheckpointError, DamageError, StorageError, UsageError
from loopkit.extras import extra

UNFINISHED = ".unfinished"  # in a folder that is being written, or removed
AT_ONCE = 8  # ranges that are read side by side
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
BROKEN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one as a Path
LOCAL = re.compile(r"(file|local)://")


@attrs.frozen(repr=False)
class Remote:
    """A place in an object store, or another file system that fsspec knows; as a Path it is used.

    Credentials and endpoints are fsspec's: those of the environment, its configuration files,
    or `fsspec.config.conf["s3"] = {"endpoint_url": ...}`; none is kept or shown here. Tested
    with S3 (`pip install torch-loopkit[remote]` brings s3fs), with `gs://` (its package is
    gcsfs) and `memory://`.

    Attributes:
        url: Its address, without credentials.
        path: What fsspec calls it.
        fs: What fsspec reaches it by.
    """

    url: str
    path: str = attrs.field(eq=False)
    fs: Any = attrs.field(eq=False)

    @classmethod
    def of(cls, address: str) -> "Remote":
        """The place at an address.

        Raises:
            MissingExtraError: Without fsspec, or its package for this kind of store.
        """
        wrote = f"{address.partition('://')[0]}://..."
        fsspec = extra("fsspec", package="torch-loopkit[remote]", wrote=wrote)
        try:
            # Listings that are kept would hide what another process has written
            fs, path = fsspec.url_to_fs(address.rstrip("/"), use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(
                wrote,
                f"that fsspec cannot open it: {error}",
                "s3://bucket/run, gs://..., or memory://..., with fsspec's package for it",
            ) from error
        return cls(fs.unstrip_protocol(path), path, fs)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}", f"{self.path}/{name}", self.fs)

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Remote":
        """What it is in."""
        return Remote(self.url.rsplit("/", 1)[0], self.path.rsplit("/", 1)[0], self.fs)

    def resolve(self) -> "Remote":
        """Itself: there are no links."""
        return self

    def write(self, chunks: Iterable[memoryview], *, sha256: bool = False) -> File:
        """Write an object; when this returns the store has all of it.

        Raises:
            OSError: If it could not be written; then, as far as the store allows, it is not there.
        """
        with answered(self, "writing"), self._created() as file:
            return File.of(_written(file, chunks), sha256=sha256)

    @contextlib.contextmanager
    def _created(self) -> Iterator[Any]:
        try:
            file = self.fs.open(self.path, "wb")
        except FileNotFoundError:  # a file system with real folders
            self.fs.makedirs(self.parent.path, exist_ok=True)
            file = self.fs.open(self.path, "wb")
        try:
            yield file
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()
            with contextlib.suppress(Exception):
                file.closed = True  # to close it, as its destructor does, would finish the object
            raise
        file.close()

    def remove(self) -> None:
        """Remove an object; it need not be there.

        Raises:
            OSError: If the store does not.
        """
        with answered(self, "removing"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def remove_folder(self) -> None:
        """Remove an empty folder, where the store has such a thing."""
        with contextlib.suppress(Exception):
            self.fs.rmdir(self.path)


Place = Path | Remote


def place_of(place: str | Place) -> Place:
    """What a user wrote, as a path or as a place elsewhere.

    Raises:
        UsageError: For an address that was made a Path, which has lost a slash of it.

    Example:
        >>> place_of("runs/digits").name, place_of("file:///tmp/run").name
        ('digits', 'run')
    """
    if isinstance(place, Remote):
        return place
    if isinstance(place, Path) and BROKEN.match(str(place)):
        raise UsageError(f"Path({str(place)!r})", "an address as a Path", "the address as text")
    text = str(place)
    if ADDRESS.match(text) and not LOCAL.match(text):
        return Remote.of(text)
    return Path(LOCAL.sub("", text))


def _written(file: Any, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """The chunks, each once it is written."""
    for chunk in chunks:
        file.write(chunk)
        yield chunk


@contextlib.contextmanager
def answered(place: Remote, doing: str) -> Iterator[None]:
    """Turn what a store's library raises into one kind of error.

    Raises:
        FileNotFoundError: If there is nothing at the place.
        StorageError: For anything else.
    """
    try:
        yield
    except (FileNotFoundError, CheckpointError):
        raise
    except Exception as error:
        raise StorageError(
            f"{doing} {place}",
            f"{type(error).__name__}: {error}"[:300],
            "credentials, address and network that work; what was saved before is untouched",
        ) from error


@names.register
def _(folder: Remote) -> list[str]:
    with answered(folder, "listing"), contextlib.suppress(FileNotFoundError):
        found = [info["name"].rstrip("/") for info in folder.fs.ls(folder.path, detail=True)]
        return [name.rsplit("/", 1)[-1] for name in found if name != folder.path.rstrip("/")]
    return []


@is_folder.register
def _(path: Remote) -> bool:
    with answered(path, "looking at"):
        return bool(path.fs.isdir(path.path))


@read_bytes.register
def _(path: Remote, *, size: int | None = None, limit: int | None = None) -> bytearray:
    try:
        with answered(path, "reading"):
            info = path.fs.info(path.path)
            if info["type"] != "file":
                raise FileNotFoundError
            check_size(path.name, info["size"], size, limit)
            data, read = bytearray(info["size"]), 0
            for chunk in _chunks(path, len(data)):
                data[read : read + len(chunk)] = chunk
                read += len(chunk)
    except FileNotFoundError as error:
        raise DamageError(RESTORE, f"{path.name} damaged (missing)", ANOTHER_COPY) from error
    if read != len(data) or len(data) != info["size"]:
        raise DamageError(RESTORE, f"{path.name} damaged (it ends early)", ANOTHER_COPY)
    return data


def _chunks(path: Remote, size: int) -> Iterator[bytes]:
    for begin in range(0, size, AT_ONCE * CHUNK):
        starts = [*range(begin, min(size, begin + AT_ONCE * CHUNK), CHUNK)]
        ends = [min(size, start + CHUNK) for start in starts]
        yield from path.fs.cat_ranges([path.path] * len(starts), starts, ends, on_error="raise")
