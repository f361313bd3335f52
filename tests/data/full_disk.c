/* Preloaded: from a chosen call on, whatever needs space below a folder fails as on a full disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long allowed, calls;

/* Fail after `limit` calls below `path`; an empty path allows all. */
void fill(const char *path, long limit) {
  strcpy(folder, path);
  allowed = limit;
  calls = 0;
}

long counted(void) { return calls; }

static int full(const char *path) {
  if (!folder[0] || strncmp(path, folder, strlen(folder)) || ++calls <= allowed) return 0;
  errno = ENOSPC;
  return 1;
}

static int full_fd(int fd) {
  char link[64], path[PATH_MAX];
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (size < 0) return 0;
  path[size] = 0;
  return full(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
  return full_fd(fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  ssize_t (*real)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
  return full_fd(out) ? -1 : real(out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t size) {
  return sendfile(out, in, offset, size);
}
int fsync(int fd) { return full_fd(fd) ? -1 : REAL(fsync)(fd); }
int mkdir(const char *path, mode_t mode) {
  return full(path) ? -1 : REAL(mkdir)(path, mode);
}
int symlink(const char *target, const char *path) {
  return full(path) ? -1 : REAL(symlink)(target, path);
}
/* Not rename: within a folder it needs no space. */

#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    va_list more;                                                              \
    va_start(more, flags);                                                     \
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                  \
    va_end(more);                                                              \
    if ((flags & O_CREAT) && full(path)) return -1;                            \
    return REAL(name)(path, flags, mode);                                      \
  }
OPEN(open)
OPEN(open64)
