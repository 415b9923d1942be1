"""File systems that remember, fail, and lose power."""

import errno
import os
from pathlib import Path

import attrs
from loopkit.checkpoint.disk import Disk

WRITES = ("make_folder", "create", "write", "sync", "close", "rename", "sync_folder")
REMOVES = ("remove_file", "remove_folder")


class Recorder(Disk):
    """A disk that writes down what is done to it; paths as text, bytes with each write."""

    def __init__(self):
        self.operations = []
        self.files = {}

    def note(self, *operation):
        self.operations.append(operation)

    def make_folder(self, path):
        super().make_folder(path)
        self.note("make_folder", path)

    def create(self, path):
        file = super().create(path)
        self.files[file] = path
        self.note("create", path)
        return file

    def write(self, file, data):
        taken = super().write(file, data)
        self.note("write", self.files[file], bytes(data[:taken]))
        return taken

    def sync(self, file):
        super().sync(file)
        self.note("sync", self.files[file])

    def rename(self, source, target):
        super().rename(source, target)
        self.note("rename", source, target)

    def sync_folder(self, path):
        super().sync_folder(path)
        self.note("sync_folder", path)

    def remove_file(self, path):
        super().remove_file(path)
        self.note("remove_file", path)

    def remove_folder(self, path):
        super().remove_folder(path)
        self.note("remove_folder", path)


@attrs.define(eq=False)
class File:
    """A file: its bytes, and those of them that are on the platter."""

    data: bytes = b""
    durable: bytes = b""


@attrs.define(eq=False)
class Folder:
    """A folder: its entries, and those of them that are on the platter."""

    entries: dict = attrs.field(factory=dict)
    durable: dict = attrs.field(factory=dict)


class Machine:
    """A file system as POSIX promises it: what is not synced may be gone after a power cut.

    Args:
        root: The folder that is there, with its name, from the start.
    """

    def __init__(self, root):
        self.root, self.top = Path(root), Folder()

    def at(self, path):
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def do(self, operation, *arguments):
        getattr(self, operation)(*arguments)

    def make_folder(self, path):
        self.at(path.parent).entries[path.name] = Folder()

    def create(self, path):
        self.at(path.parent).entries[path.name] = File()

    def write(self, path, data):
        self.at(path).data += data

    def sync(self, path):
        self.at(path).durable = self.at(path).data

    def rename(self, source, target):
        self.at(target.parent).entries[target.name] = self.at(source.parent).entries.pop(
            source.name
        )

    def sync_folder(self, path):
        self.at(path).durable = dict(self.at(path).entries)

    def remove_file(self, path):
        del self.at(path.parent).entries[path.name]

    remove_folder = remove_file

    def write_out(self, target, *, names, data):
        """Make the folder that is found after a stop.

        Args:
            target: Where.
            names: Whether names that were not synced are there.
            data: Whether bytes that were not synced are there.
        """
        _write_out(self.top, Path(target), names, data)


def _write_out(folder, target, names, data):
    target.mkdir()
    for name, node in (folder.entries if names else folder.durable).items():
        if isinstance(node, Folder):
            _write_out(node, target / name, names, data)
        else:
            (target / name).write_bytes(node.data if data else node.durable)


# What a stop leaves: a killed process all that it did; a power cut what the model says.
STOPS = {
    "kill": {"names": True, "data": True},
    "unsynced bytes gone": {"names": True, "data": False},
    "unsynced names gone": {"names": False, "data": True},
    "strict": {"names": False, "data": False},
}


class Faulty(Disk):
    """A disk that fails at the n-th operation.

    Args:
        at: The operation that fails, counted from 0.
        error: Its errno.
        sticky: Whether all later ones fail as well, but for those that free space.
        short: Instead, write only half of what is given from then on.
    """

    def __init__(self, at, error=errno.EIO, *, sticky=False, short=False):
        self.at, self.error, self.sticky, self.short = at, error, sticky, short
        self.count, self.failed = -1, 0

    def check(self, operation):
        self.count += 1
        due = self.count == self.at or (self.sticky and self.count > self.at)
        if due and not self.short and not (self.sticky and operation in {*REMOVES, "close"}):
            self.failed += 1
            raise OSError(self.error, os.strerror(self.error))

    def write(self, file, data):
        self.check("write")
        half = self.short and self.count >= self.at and len(data) > 1
        return super().write(file, data[: len(data) // 2] if half else data)


def _checked(operation):
    def call(self, *arguments):
        if operation == "close":  # the descriptor is gone also where close fails
            Disk.close(self, *arguments)
            self.check(operation)
            return None
        self.check(operation)
        return getattr(Disk, operation)(self, *arguments)

    return call


for _operation in {*WRITES, *REMOVES} - {"write"}:
    setattr(Faulty, _operation, _checked(_operation))
