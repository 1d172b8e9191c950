"""A file system that hangs or fails on request: ``hangfs.py BACKING MOUNT HANG``, with Debian's python3-fusepy.

What lies in BACKING is seen at MOUNT. While there is a file HANG, the operations that it names wait, as of a server
that does not answer: open, getattr, read, write, fsync, unlink, create, readdir, rename, statfs, all. With ``!`` behind
its name, an operation fails (EIO).
"""

import errno
import os
import sys
import time

from fusepy import FUSE, FuseOSError, Operations

BACKING, MOUNT, HANG = sys.argv[1:4]


def wait(operation):
    """Until the file does not name this operation any more; or fail."""
    while True:
        try:
            with open(HANG) as said:
                words = said.read().split()
        except OSError:
            return
        if f"{operation}!" in words:
            raise OSError(errno.EIO, operation)
        if "all" not in words and operation not in words:
            return
        time.sleep(0.02)


class Hanging(Operations):
    """Passes everything on to the folder below."""

    use_ns = False

    def __call__(self, operation, *arguments):
        try:
            return super().__call__(operation, *arguments)
        except FuseOSError:
            raise
        except OSError as error:
            raise FuseOSError(error.errno) from error

    def getattr(self, path, handle=None):
        wait("getattr")
        status = os.fstat(handle) if handle is not None else os.lstat(BACKING + path)
        names = ("atime", "ctime", "mtime", "mode", "nlink", "size", "uid", "gid", "blocks", "ino")
        return {f"st_{name}": getattr(status, f"st_{name}") for name in names}

    def readdir(self, path, handle):
        wait("readdir")
        return [".", "..", *os.listdir(BACKING + path)]

    def open(self, path, flags):
        wait("open")
        return os.open(BACKING + path, flags & ~os.O_APPEND & ~os.O_DIRECT)

    def create(self, path, mode, info=None):
        wait("create")
        return os.open(BACKING + path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path, size, offset, handle):
        wait("read")
        return os.pread(handle, size, offset)

    def write(self, path, data, offset, handle):
        wait("write")
        return os.pwrite(handle, data, offset)

    def truncate(self, path, length, handle=None):
        wait("write")
        os.truncate(BACKING + path, length)

    def flush(self, path, handle):
        return 0

    def fsync(self, path, data_only, handle):
        wait("fsync")
        os.fsync(handle)

    def fsyncdir(self, path, data_only, handle):
        wait("fsync")

    def release(self, path, handle):
        os.close(handle)

    def unlink(self, path):
        wait("unlink")
        os.unlink(BACKING + path)

    def rename(self, old, new):
        wait("rename")
        os.rename(BACKING + old, BACKING + new)

    def link(self, new, old):
        wait("rename")
        os.link(BACKING + old, BACKING + new)

    def mkdir(self, path, mode):
        os.mkdir(BACKING + path, mode)

    def rmdir(self, path):
        os.rmdir(BACKING + path)

    def chmod(self, path, mode):
        os.chmod(BACKING + path, mode)

    def chown(self, path, user, group):
        os.chown(BACKING + path, user, group)

    def utimens(self, path, times=None):
        os.utime(BACKING + path, times)

    def readlink(self, path):
        return os.readlink(BACKING + path)

    def symlink(self, new, target):
        os.symlink(target, BACKING + new)

    def statfs(self, path):
        wait("statfs")
        found = os.statvfs(BACKING)
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_") and name != "f_fsid"}


if __name__ == "__main__":
    # Else what is removed while somebody has it open stays under another name.
    FUSE(Hanging(), MOUNT, foreground=True, use_ino=True, hard_remove=True)
