/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * For LD_PRELOAD: records what a process changes below DISK_ROOT, in order, in the file DISK_LOG; and fails what the
 * file DISK_CONTROL says. Seen are the libc's calls that SQLite and Python make; each goes on to the kernel unchanged.
 * What goes out over a socket, and what the process says by disk_mark(), is recorded in the same order, so that the
 * log tells what was acknowledged before which write.
 *
 * One record: struct record, then `first` bytes (a path), then `length` bytes (data, or a second path).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, LINK, MARK, SENT };

struct record {
    uint32_t kind, first;
    uint64_t file, offset, length; /* file: its inode number; offset: of a write, or the new size */
};

/* Shared with the test: changes seen so far are counted in `seen`; those numbered from `from` (0: none), `count` of
 * them, fail with `error`. `half`: the first of them, if it is a write, is done in part, as on a disk that fills. */
struct control {
    _Atomic uint64_t seen, from, count, error, half;
};

static char root[PATH_MAX];
static int log_fd = -1;
static struct control nothing, *control = &nothing;

__attribute__((constructor)) static void start(void)
{
    const char *below = getenv("DISK_ROOT"), *log = getenv("DISK_LOG"), *shared = getenv("DISK_CONTROL");

    if (below)
        snprintf(root, sizeof(root), "%s", below);
    if (log)
        log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (shared) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, shared, O_RDWR | O_CLOEXEC, 0);
        void *at = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

        if (at == MAP_FAILED)
            abort(); /* a test that fails nothing would pass */
        control = at;
        close(fd);
    }
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int below_root(const char *path)
{
    size_t length = strlen(root);

    return length && strncmp(path, root, length) == 0 && (path[length] == '/' || !path[length]);
}

/* The absolute path of one that a call was given; whether it is ours. */
static int ours(const char *path, char absolute[PATH_MAX])
{
    char folder[PATH_MAX];

    if (!path || !root[0])
        return 0;
    if (path[0] == '/')
        snprintf(absolute, PATH_MAX, "%s", path);
    else if (!getcwd(folder, sizeof(folder)) || strlen(folder) + strlen(path) + 2 > PATH_MAX)
        return 0;
    else
        strcat(strcat(strcpy(absolute, folder), "/"), path);
    return below_root(absolute);
}

static int fd_ours(int fd, char path[PATH_MAX])
{
    char link[64];
    ssize_t length;

    if (!root[0])
        return 0;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return below_root(path);
}

static uint64_t inode(int fd)
{
    struct stat found;

    return fstat(fd, &found) ? 0 : found.st_ino;
}

static void put(enum kind kind, const char *path, uint64_t file, uint64_t offset, const void *data, size_t length)
{
    struct record record = {kind, path ? (uint32_t)strlen(path) : 0, file, offset, length};
    struct iovec parts[] = {{&record, sizeof(record)}, {(void *)path, record.first}, {(void *)data, length}};
    ssize_t size = (ssize_t)(sizeof(record) + record.first + length);
    int before = errno;

    if (log_fd >= 0 && syscall(SYS_writev, log_fd, parts, 3) != size)
        abort(); /* a log with a hole proves nothing */
    errno = before;
}

/* Counts a change; whether it is to fail, with errno set. *half: do it in part. */
static int fails(int *half)
{
    uint64_t number = ++control->seen, from = control->from;

    if (!from || number < from || number - from >= control->count)
        return 0;
    if (half && control->half && number == from) {
        *half = 1;
        return 0;
    }
    errno = (int)control->error;
    return 1;
}

/* -- names */

static int open_it(int folder, const char *path, int flags, mode_t mode)
{
    char absolute[PATH_MAX];
    struct stat found;
    int creates = 0, fd;

    if ((flags & O_ACCMODE) != O_RDONLY && ours(path, absolute)) {
        creates = (flags & O_CREAT) && lstat(absolute, &found);
        if ((creates || (flags & O_TRUNC) || control->error == EROFS) && fails(NULL))
            return -1;
    }
    fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= 0 && (flags & O_ACCMODE) != O_RDONLY && ours(path, absolute)) {
        if (creates)
            put(CREATE, absolute, inode(fd), 0, NULL, 0);
        else if (flags & O_TRUNC)
            put(TRUNCATE, NULL, inode(fd), 0, NULL, 0);
    }
    return fd;
}

#define MODE_OF(flags)                             \
    mode_t mode = 0;                               \
    if ((flags) & (O_CREAT | O_TMPFILE)) {         \
        va_list rest;                              \
        va_start(rest, flags);                     \
        mode = (mode_t)va_arg(rest, unsigned int); \
        va_end(rest);                              \
    }

int open(const char *path, int flags, ...)
{
    MODE_OF(flags)
    return open_it(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE_OF(flags)
    return open_it(AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...)
{
    MODE_OF(flags)
    return open_it(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...)
{
    MODE_OF(flags)
    return open_it(folder, path, flags, mode);
}

int rename(const char *from, const char *to)
{
    char old[PATH_MAX], new[PATH_MAX];
    int mine = ours(from, old) && ours(to, new), done;

    if (mine && fails(NULL))
        return -1;
    done = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (mine && !done)
        put(RENAME, old, 0, 0, new, strlen(new));
    return done;
}

int link(const char *from, const char *to)
{
    char old[PATH_MAX], new[PATH_MAX];
    int mine = ours(from, old) && ours(to, new), done;

    if (mine && fails(NULL))
        return -1;
    done = (int)syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (mine && !done)
        put(LINK, old, 0, 0, new, strlen(new));
    return done;
}

int unlink(const char *path)
{
    char absolute[PATH_MAX];
    struct stat found;
    int mine = ours(path, absolute) && !lstat(absolute, &found), done;

    if (mine && fails(NULL))
        return -1;
    done = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (mine && !done)
        put(UNLINK, absolute, 0, 0, NULL, 0);
    return done;
}

int mkdir(const char *path, mode_t mode)
{
    char absolute[PATH_MAX];
    struct stat found;
    int mine = ours(path, absolute) && lstat(absolute, &found), done; /* one that is there takes no room */

    if (mine && fails(NULL))
        return -1;
    done = (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    if (mine && !done)
        put(MKDIR, absolute, 0, 0, NULL, 0);
    return done;
}

/* -- content */

static ssize_t write_it(int fd, const void *data, size_t length, off64_t offset)
{
    char path[PATH_MAX];
    int mine = fd_ours(fd, path), half = 0;
    ssize_t done;

    if (mine && fails(&half))
        return -1;
    if (half && length > 1)
        length /= 2;
    done = offset < 0 ? syscall(SYS_write, fd, data, length) : syscall(SYS_pwrite64, fd, data, length, offset);
    if (mine && done > 0) {
        if (offset < 0) /* where it ended, which is right for O_APPEND too */
            offset = (off64_t)syscall(SYS_lseek, fd, 0, SEEK_CUR) - done;
        put(WRITE, NULL, inode(fd), (uint64_t)offset, data, (size_t)done);
    }
    return done;
}

ssize_t write(int fd, const void *data, size_t length) { return write_it(fd, data, length, -1); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) { return write_it(fd, data, length, at); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at) { return write_it(fd, data, length, at); }

static int truncate_it(int fd, off64_t size)
{
    char path[PATH_MAX];
    int mine = fd_ours(fd, path), done;

    if (mine && fails(NULL))
        return -1;
    done = (int)syscall(SYS_ftruncate, fd, size);
    if (mine && !done)
        put(TRUNCATE, NULL, inode(fd), (uint64_t)size, NULL, 0);
    return done;
}

int ftruncate(int fd, off_t size) { return truncate_it(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_it(fd, size); }

static int sync_it(int fd, long call)
{
    char path[PATH_MAX];
    int mine = fd_ours(fd, path), done;

    if (mine && fails(NULL))
        return -1;
    done = (int)syscall(call, fd);
    if (mine && !done)
        put(SYNC, path, inode(fd), 0, NULL, 0);
    return done;
}

int fsync(int fd) { return sync_it(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_it(fd, SYS_fdatasync); }

/* What changes files behind these calls would be missed: better to find out. */
#define NOT_RECORDED(name)                                               \
    do {                                                                 \
        char path[PATH_MAX];                                             \
        if (fd_ours(fd, path)) {                                         \
            dprintf(2, "recorder.c knows no %s (%s)\n", #name, path);    \
            abort();                                                     \
        }                                                                \
    } while (0)

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    REAL(writev);
    NOT_RECORDED(writev);
    return real(fd, parts, count);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    REAL(pwritev);
    NOT_RECORDED(pwritev);
    return real(fd, parts, count, at);
}

int fallocate64(int fd, int mode, off64_t at, off64_t length)
{
    REAL(fallocate64);
    NOT_RECORDED(fallocate64);
    return real(fd, mode, at, length);
}

int posix_fallocate64(int fd, off64_t at, off64_t length)
{
    REAL(posix_fallocate64);
    NOT_RECORDED(posix_fallocate64);
    return real(fd, at, length);
}

/* -- what the process says */

void disk_mark(const char *words)
{
    put(MARK, NULL, 0, 0, words, strlen(words));
}

ssize_t send(int fd, const void *data, size_t length, int flags)
{
    REAL(send);
    ssize_t done = real(fd, data, length, flags);

    if (done > 0)
        put(SENT, NULL, 0, 0, data, (size_t)done);
    return done;
}
