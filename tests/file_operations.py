"""Every operation by which this process changes files, numbered: to kill it there, or to work out what a power cut leaves."""

import base64
import builtins
import io
import json
import os
import signal


class Operations:
    """Calls `before(number, operation)` ahead of each; an operation is (what, path, argument)."""

    def __init__(self, before):
        self._before, self.count = before, 0
        self._real = {name: getattr(os, name) for name in ("mkdir", "rename", "unlink", "rmdir", "fsync")}
        self._open = io.open

    def __enter__(self):
        os.mkdir = lambda path, *a, **k: self._made("mkdir", path, "", *a, **k)
        os.rename = lambda path, to, **k: self._made("rename", path, os.fspath(to), to, **k)
        os.unlink = lambda path, **k: self._made("unlink", path, "", **k)
        os.rmdir = lambda path, **k: self._made("rmdir", path, "", **k)
        os.fsync = lambda descriptor: self._made("fsync", descriptor, "")
        io.open = builtins.open = self._opened
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)
        io.open = builtins.open = self._open

    def happens(self, what, path, argument):
        self._before(self.count, (what, path, argument))
        self.count += 1

    def _made(self, what, path, argument, *args, **keywords):
        named = f"/proc/self/fd/{path}" if isinstance(path, int) else os.fspath(path)
        if keywords.get("dir_fd") is not None:
            named = os.path.join(f"/proc/self/fd/{keywords['dir_fd']}", named)
        where = os.path.realpath(named) if named.startswith("/proc/") else named
        self.happens(what, where, argument)
        return self._real[what](path, *args, **keywords)

    def _opened(self, path, mode="r", *args, **keywords):
        if not set(mode) & set("wxa") or isinstance(path, int):
            return self._open(path, mode, *args, **keywords)
        self.happens("create", os.fspath(path), "")
        return _Written(self, os.fspath(path), self._open(path, mode, *args, **keywords))


class _Written:
    def __init__(self, operations, path, file):
        self._operations, self._path, self._file = operations, path, file

    def write(self, data):
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._operations.happens("write", self._path, base64.b64encode(bytes(part)).decode())
            self._file.write(part)
            self._file.flush()
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def killed_at(number):
    def before(count, _):
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return Operations(before)


def logged_to(path):
    """Appends each operation to a file that all ranks share, before it happens: what depends on it comes after it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return Operations(lambda _, operation: os.write(descriptor, json.dumps(operation).encode() + b"\n"))


class PowerCut:
    """A folder as a disk without power keeps it: what was synced, and of the rest what luck has it."""

    def __init__(self, folder):
        self._root = str(folder)
        self._tree = _read(folder)

    def apply(self, operation):
        what, path, argument = operation
        if what == "fsync":
            self._find(path).sync()
            return
        if path == self._root:  # made again, which changes nothing
            return
        parent, name = os.path.split(path)
        entries = self._find(parent).entries
        if what == "mkdir":
            entries.setdefault(name, _Folder())
        elif what == "create":
            entries[name] = _File()
        elif what == "write":
            entries[name].data += base64.b64decode(argument)
        elif what == "rename":
            target, new = os.path.split(argument)
            self._find(target).entries[new] = entries.pop(name)
        else:
            entries.pop(name, None)

    def write(self, folder, survive_from):
        """Data are what they were synced with; names too, but from this depth of folders on they are the last ones."""
        _write(self._tree, folder, survive_from)

    def _find(self, path):
        node = self._tree
        for part in os.path.relpath(path, self._root).split(os.sep):
            node = node if part == "." else node.entries[part]
        return node


class _File:
    def __init__(self, data=b""):
        self.data = self.synced = data

    def sync(self):
        self.synced = self.data


class _Folder:
    def __init__(self, entries=()):
        self.entries = dict(entries)
        self.synced = dict(entries)

    def sync(self):
        self.synced = dict(self.entries)


def _read(path):
    if path.is_file():
        return _File(path.read_bytes())
    return _Folder({child.name: _read(child) for child in path.iterdir()})


def _write(node, path, survive_from):
    if isinstance(node, _File):
        path.write_bytes(node.synced)
        return
    path.mkdir()
    for name, child in (node.entries if survive_from <= 0 else node.synced).items():
        _write(child, path / name, survive_from - 1)
