// A disk that fills up, or a process that is killed, at the n-th change below one directory: preloaded before libc.
//
// Changes are what can lose data: files that are created, written, cut, flushed, renamed or removed, directories alike.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, FULL, KILL };

static char prefix[4096];
static int mode = OFF;
static long changes, at, bytes;
static const char* names[1 << 16];

void disk_arm(const char* directory, int what, long number) {
  snprintf(prefix, sizeof prefix, "%s", directory);
  mode = what;
  at = number;
  changes = bytes = 0;
}

long disk_changes(void) { return changes; }

// That were written.
long disk_bytes(void) { return bytes; }

// Of a change, from 1 on.
const char* disk_name(long number) { return names[number % (1 << 16)]; }

// Whether this change fails; `grows`: it needs room.
static int fails(const char* name, const char* path, int grows) {
  if (mode == OFF || path == NULL || strncmp(path, prefix, strlen(prefix)) != 0) return 0;
  names[++changes % (1 << 16)] = name;
  if (mode == KILL && changes == at) kill(getpid(), SIGKILL);
  if (mode != FULL || changes < at || !grows) return 0;
  errno = ENOSPC;
  return 1;
}

static int fails_fd(const char* name, int fd, int grows) {
  if (mode == OFF) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(name, path, grows);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                         \
  int name(const char* path, int flags, ...) {                             \
    va_list rest;                                                          \
    va_start(rest, flags);                                                 \
    const mode_t bits = va_arg(rest, mode_t);                              \
    va_end(rest);                                                          \
    if ((flags & (O_CREAT | O_TRUNC)) && fails(#name, path, 1)) return -1; \
    return REAL(name)(path, flags, bits);                                  \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                       \
  int name(int where, const char* path, int flags, ...) {                  \
    va_list rest;                                                          \
    va_start(rest, flags);                                                 \
    const mode_t bits = va_arg(rest, mode_t);                              \
    va_end(rest);                                                          \
    if ((flags & (O_CREAT | O_TRUNC)) && fails(#name, path, 1)) return -1; \
    return REAL(name)(where, path, flags, bits);                           \
  }
OPENAT(openat)
OPENAT(openat64)

#define ON_FD(type, name, parameters, arguments) \
  type name parameters {                         \
    const long before = changes;                 \
    if (fails_fd(#name, fd, 1)) return -1;       \
    const type found = REAL(name) arguments;     \
    if (changes > before) bytes += found;        \
    return found;                                \
  }
ssize_t sendfile(int fd, int from, off_t* place, size_t n);
ssize_t sendfile64(int fd, int from, off64_t* place, size_t n);
ON_FD(ssize_t, write, (int fd, const void* data, size_t n), (fd, data, n))
ON_FD(ssize_t, writev, (int fd, const struct iovec* data, int n), (fd, data, n))
ON_FD(ssize_t, pwrite, (int fd, const void* data, size_t n, off_t place), (fd, data, n, place))
ON_FD(ssize_t, pwrite64, (int fd, const void* data, size_t n, off64_t place), (fd, data, n, place))
ON_FD(ssize_t, sendfile, (int fd, int from, off_t* place, size_t n), (fd, from, place, n))
ON_FD(ssize_t, sendfile64, (int fd, int from, off64_t* place, size_t n), (fd, from, place, n))
ON_FD(int, fsync, (int fd), (fd))  // returns 0, so that no bytes are counted
ON_FD(int, fdatasync, (int fd), (fd))
ON_FD(int, ftruncate, (int fd, off_t length), (fd, length))
ON_FD(int, ftruncate64, (int fd, off64_t length), (fd, length))

#define ON_PATH(name, grows, parameters, arguments) \
  int name parameters {                             \
    if (fails(#name, path, grows)) return -1;       \
    return REAL(name) arguments;                    \
  }
ON_PATH(mkdir, 1, (const char* path, mode_t bits), (path, bits))
ON_PATH(rmdir, 0, (const char* path), (path))
ON_PATH(unlink, 0, (const char* path), (path))
ON_PATH(rename, 1, (const char* path, const char* to), (path, to))

int unlinkat(int where, const char* path, int flags) {
  if (fails_fd("unlinkat", where, 0)) return -1;
  return REAL(unlinkat)(where, path, flags);
}

int renameat2(int where, const char* path, int other, const char* to, unsigned flags) {
  if (fails("renameat2", path, 1)) return -1;
  return REAL(renameat2)(where, path, other, to, flags);
}
