"""Calls of the C library that fail on purpose, by a shim that GCC makes and ``LD_PRELOAD`` brings into a process.

Which calls fail is one process's own affair, or, after :func:`share`, that of it, its forks and whatever they start:
then the calls of all of them are counted as one row.
"""

import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
struct plan { char names[160], below[1024], log[1024]; long after, times; int number; };
static struct plan own, *plan = &own;
void share_calls(const char *path) {
  int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || syscall(SYS_ftruncate, fd, sizeof own)) return;
  void *mapped = mmap(0, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped != MAP_FAILED) plan = mapped;
  syscall(SYS_close, fd);
}
__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("FAILING_CALLS");
  if (path) share_calls(path);
}
void fail_calls(const char *names, const char *below, long after, long times, int number) {
  plan->times = 0;
  snprintf(plan->names, sizeof plan->names, " %s ", names);
  snprintf(plan->below, sizeof plan->below, "%s", below);
  plan->after = after; plan->number = number; plan->times = times;
}
void log_calls(const char *path, const char *below) {
  snprintf(plan->below, sizeof plan->below, "%s", below);
  snprintf(plan->log, sizeof plan->log, "%s", path);
}
long calls_left(void) { return plan->times; }
static void of_descriptor(int fd, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t found = readlink(link, path, size - 1);
  path[found > 0 ? found : 0] = 0;
}
static void at_folder(int folder, const char *name, char *path, size_t size) {
  if (name[0] == '/') { snprintf(path, size, "%s", name); return; }
  if (folder == AT_FDCWD) { if (!getcwd(path, size)) path[0] = 0; } else of_descriptor(folder, path, size);
  size_t used = strlen(path);
  snprintf(path + used, size - used, "/%s", name);
}
static void note(const char *name, const char *path, size_t bytes) {
  char line[2400];
  int fd = syscall(SYS_openat, AT_FDCWD, plan->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%zu\n", name, path, program_invocation_short_name, bytes);
  if (fd >= 0) { syscall(SYS_write, fd, line, size); syscall(SYS_close, fd); }
}
static int bad(const char *name, int fd, const char *at, size_t bytes) {
  char path[2048], word[32];
  struct stat found;
  if (!plan->times && !plan->log[0]) return 0;
  snprintf(word, sizeof word, " %s ", name);
  if (!plan->log[0] && !strstr(plan->names, word)) return 0;
  int kept = errno;
  if (at) at_folder(fd, at, path, sizeof path);
  else {
    if (fstat(fd, &found) || !(S_ISREG(found.st_mode) || S_ISDIR(found.st_mode))) { errno = kept; return 0; }
    if (plan->below[0] || plan->log[0]) of_descriptor(fd, path, sizeof path);
  }
  if (plan->below[0] && strncmp(path, plan->below, strlen(plan->below))) { errno = kept; return 0; }
  if (plan->log[0]) note(name, path, bytes);
  errno = kept;
  if (!plan->times || !strstr(plan->names, word)) return 0;
  if (__sync_sub_and_fetch(&plan->after, 1) >= 0) return 0;
  if (__sync_sub_and_fetch(&plan->times, 1) < 0) { plan->times = 0; return 0; }
  errno = plan->number; return 1;
}
static size_t sum(const struct iovec *data, int count) {
  size_t bytes = 0;
  while (count-- > 0) bytes += data[count].iov_len;
  return bytes;
}
#define CALL(type, name, said, fd, path, parameters, arguments) \
  WRITE(type, name, said, fd, path, 0, parameters, arguments)
#define WRITE(type, name, said, fd, path, bytes, parameters, arguments) \
  type name parameters { \
    static type (*real) parameters; \
    if (!real) real = (type (*) parameters) dlsym(RTLD_NEXT, #name); \
    return bad(said, fd, path, bytes) ? -1 : real arguments; \
  }
#define OPEN(name, folder, parameters, ...) \
  int name parameters { \
    static int (*real) parameters; \
    if (!real) real = (int (*) parameters) dlsym(RTLD_NEXT, #name); \
    mode_t mode = 0; \
    int makes = flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE; \
    if (makes) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    return bad(makes ? "create" : "open", folder, path, 0) ? -1 : real(__VA_ARGS__, mode); \
  }
#define IN AT_FDCWD
CALL(int, fsync, "fsync", fd, 0, (int fd), (fd))
CALL(int, fdatasync, "fdatasync", fd, 0, (int fd), (fd))
WRITE(ssize_t, write, "write", fd, 0, size, (int fd, const void *data, size_t size), (fd, data, size))
WRITE(ssize_t, pwrite, "pwrite", fd, 0, size, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITE(ssize_t, pwrite64, "pwrite", fd, 0, size, (int fd, const void *data, size_t size, off64_t at),
      (fd, data, size, at))
WRITE(ssize_t, pwritev, "pwrite", fd, 0, sum(data, size), (int fd, const struct iovec *data, int size, off_t at),
      (fd, data, size, at))
WRITE(ssize_t, pwritev64, "pwrite", fd, 0, sum(data, size), (int fd, const struct iovec *data, int size, off64_t at),
      (fd, data, size, at))
CALL(int, ftruncate, "ftruncate", fd, 0, (int fd, off_t size), (fd, size))
CALL(int, ftruncate64, "ftruncate", fd, 0, (int fd, off64_t size), (fd, size))
CALL(int, fallocate, "fallocate", fd, 0, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
CALL(int, fallocate64, "fallocate", fd, 0, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
CALL(int, rename, "rename", IN, to, (const char *from, const char *to), (from, to))
CALL(int, renameat, "rename", t, to, (int f, const char *from, int t, const char *to), (f, from, t, to))
CALL(int, renameat2, "rename", t, to, (int f, const char *from, int t, const char *to, unsigned flags),
     (f, from, t, to, flags))
CALL(int, link, "link", IN, to, (const char *from, const char *to), (from, to))
CALL(int, linkat, "link", t, to, (int f, const char *from, int t, const char *to, int flags), (f, from, t, to, flags))
CALL(int, unlink, "unlink", IN, path, (const char *path), (path))
CALL(int, unlinkat, "unlink", folder, path, (int folder, const char *path, int flags), (folder, path, flags))
OPEN(open, IN, (const char *path, int flags, ...), path, flags)
OPEN(open64, IN, (const char *path, int flags, ...), path, flags)
OPEN(openat, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
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


def fail(calls: str, *, after: int = 0, times: int = 1, error: int = errno.EIO, below: str = "") -> None:
    """In a process with the shim: calls of these names fail from now on, once so many have passed.

    Opening a file is ``open``, or ``create`` where that may make it. ``below``: only at files whose path begins so.
    """
    ctypes.CDLL(None).fail_calls(calls.encode(), below.encode(), ctypes.c_long(after), ctypes.c_long(times), error)


def left() -> int:
    """How many calls are still to fail."""
    count = ctypes.CDLL(None).calls_left
    count.restype = ctypes.c_long
    return int(count())


def log(path: Path | None, *, below: str = "") -> None:
    """Have every call written to a file, ``name<tab>path<tab>program<tab>bytes``, or no longer."""
    ctypes.CDLL(None).log_calls(str(path or "").encode(), below.encode())


def share(path: Path) -> None:
    """Count the calls of this process, its forks and what they start together, in that file."""
    os.environ["FAILING_CALLS"] = str(path)
    ctypes.CDLL(None).share_calls(str(path).encode())
