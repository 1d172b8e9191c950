"""Calls of the C library that fail on purpose, by a shim that GCC makes and ``LD_PRELOAD`` brings into a process."""

import ctypes
import errno
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
static char names[128]; static long after, times; static int number;
void fail_calls(const char *calls, long pass, long fail, int with) {
  strncpy(names, calls, sizeof names - 1); after = pass; times = fail; number = with;
}
static int bad(const char *name, int fd) {
  struct stat found;
  if (!times || !strstr(names, name)) return 0;
  if (fd >= 0 && (fstat(fd, &found) || !(S_ISREG(found.st_mode) || S_ISDIR(found.st_mode)))) return 0;
  if (after > 0) { after--; return 0; }
  times--; errno = number; return 1;
}
#define CALL(type, name, said, fd, parameters, arguments) \
  type name parameters { \
    static type (*real) parameters; \
    if (!real) real = (type (*) parameters) dlsym(RTLD_NEXT, #name); \
    return bad(said, fd) ? -1 : real arguments; \
  }
CALL(int, fsync, "fsync", fd, (int fd), (fd))
CALL(int, fdatasync, "fdatasync", fd, (int fd), (fd))
CALL(ssize_t, pwrite, "pwrite", fd, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
CALL(ssize_t, pwrite64, "pwrite", fd, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
CALL(int, ftruncate, "ftruncate", fd, (int fd, off_t size), (fd, size))
CALL(int, ftruncate64, "ftruncate", fd, (int fd, off64_t size), (fd, size))
CALL(int, rename, "rename", -1, (const char *from, const char *to), (from, to))
CALL(int, unlink, "unlink", -1, (const char *path), (path))
CALL(int, unlinkat, "unlink", -1, (int folder, const char *path, int flags), (folder, path, flags))
"""

FOR_EVER = 1 << 30


def built(folder: Path) -> Path:
    """The shim; where there is no GCC the test says that it did not run."""
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("there is no gcc to make failing calls with")
    source, made = folder / "failing.c", folder / "failing.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


def fail(calls: str, *, after: int = 0, times: int = 1, error: int = errno.EIO) -> None:
    """In a process with the shim: calls of these names fail from now on, once so many have passed."""
    ctypes.CDLL(None).fail_calls(calls.encode(), ctypes.c_long(after), ctypes.c_long(times), error)
