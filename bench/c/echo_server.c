/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The yardstick for kvmnegd's transport: an epoll server on a Unix socket that answers every NUL-terminated
 * call with the same bytes, read from a file. It does what any varlink server must do for a call whose reply
 * it has ready (wait, receive, find the NUL, send) and nothing else.
 *
 * usage: echo_server SOCKET REPLY-FILE      (REPLY-FILE holds the reply with its NUL; prints READY; ends on SIGTERM)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { CHUNK = 64 * 1024, EVENTS = 64 };

static char *read_file(const char *path, size_t *ret_size) {
        FILE *file = fopen(path, "rbe");
        if (!file)
                return NULL;
        char *data = malloc(8u << 20);
        size_t size = data ? fread(data, 1, 8u << 20, file) : 0;
        fclose(file);
        if (size == 0) {
                free(data);
                return NULL;
        }
        *ret_size = size;
        return data;
}

static int listen_on(const char *path) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        if (strlen(path) >= sizeof(address.sun_path))
                return -ENAMETOOLONG;
        memcpy(address.sun_path, path, strlen(path) + 1);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0)
                return -errno;
        if (bind(fd, (struct sockaddr *) &address, sizeof(address)) < 0 || listen(fd, 1024) < 0) {
                int error = errno;
                close(fd);
                return -error;
        }
        return fd;
}

/* Blocks where the peer does not read: the load generator always does. */
static int send_all(int fd, const char *data, size_t size) {
        while (size > 0) {
                ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
                if (sent < 0)
                        return -errno;
                data += sent;
                size -= (size_t) sent;
        }
        return 0;
}

static void serve(int fd, const char *reply, size_t size) {
        char chunk[CHUNK];
        ssize_t got = recv(fd, chunk, sizeof(chunk), 0);
        if (got <= 0) {
                close(fd);
                return;
        }
        const char *at = chunk, *end = chunk + got;
        while ((at = memchr(at, 0, (size_t) (end - at)))) {
                at++;
                if (send_all(fd, reply, size) < 0) {
                        close(fd);
                        return;
                }
        }
}

int main(int argc, char **argv) {
        if (argc != 3) {
                fprintf(stderr, "usage: %s SOCKET REPLY-FILE\n", argv[0]);
                return 2;
        }
        size_t size = 0;
        char *reply = read_file(argv[2], &size);
        int listener = listen_on(argv[1]), queue = epoll_create1(EPOLL_CLOEXEC);
        if (!reply || listener < 0 || queue < 0) {
                fprintf(stderr, "echo_server: %s: cannot read the reply or listen\n", argv[1]);
                return 1;
        }
        struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
        epoll_ctl(queue, EPOLL_CTL_ADD, listener, &event);
        puts("READY");
        fflush(stdout);
        for (;;) {
                struct epoll_event events[EVENTS];
                int n = epoll_wait(queue, events, EVENTS, -1);
                for (int i = 0; i < n; i++) {
                        if (events[i].data.fd != listener) {
                                serve(events[i].data.fd, reply, size);
                                continue;
                        }
                        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                        if (fd < 0)
                                continue;
                        event = (struct epoll_event) {.events = EPOLLIN, .data.fd = fd};
                        epoll_ctl(queue, EPOLL_CTL_ADD, fd, &event);
                }
        }
}
