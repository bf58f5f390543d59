/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One call, one reply, on a connection of their own, within a deadline. Knows varlink's framing: a NUL ends a message. */

#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

enum { FIRST_BUFFER = 32 * 1024 }; /* a reply to Negotiate fits */

static int64_t now_ms(void) {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* What is left until `deadline`, -1 without one (also negative); 0: it has passed. */
static int left_ms(int64_t deadline) {
        int64_t left;

        if (deadline < 0)
                return -1;
        left = deadline - now_ms();
        return left <= 0 ? 0 : left > INT_MAX ? INT_MAX : (int) left;
}

/* Waits for an event until the deadline. What the event is, the next call on the socket tells. */
static int wait_for(int fd, short events, int64_t deadline) {
        struct pollfd waiting = { .fd = fd, .events = events };

        for (;;) {
                int left = left_ms(deadline), r;

                if (left == 0)
                        return -ETIMEDOUT;
                r = poll(&waiting, 1, left);
                if (r > 0)
                        return 0;
                if (r < 0 && errno != EINTR && errno != EAGAIN)
                        return -errno;
        }
}

/*
 * A connection that waits for room in the listener's backlog. Without blocking, connect(2) on a full backlog of a Unix
 * socket fails at once with EAGAIN, and poll(2) cannot wait for it: so it blocks, for as long as SO_SNDTIMEO says.
 */
static int connect_until(int fd, const struct sockaddr_un *address, int64_t deadline) {
        for (;;) {
                int left = left_ms(deadline);
                struct timeval wait = { .tv_sec = left / 1000, .tv_usec = left % 1000 * 1000 };

                if (left == 0)
                        return -ETIMEDOUT;
                if (left > 0 && setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait)) < 0)
                        return -errno;
                if (connect(fd, (const struct sockaddr *) address, sizeof(*address)) == 0)
                        return 0;
                if (errno == EAGAIN)
                        return -ETIMEDOUT;
                if (errno != EINTR) /* a Unix socket's connection is made whole or not at all: again */
                        return -errno;
        }
}

static int send_all(int fd, const char *data, size_t size, int64_t deadline) {
        while (size > 0) {
                ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
                int r;

                if (sent >= 0) {
                        data += sent;
                        size -= (size_t) sent;
                        continue;
                }
                if (errno == EINTR)
                        continue;
                if (errno != EAGAIN)
                        return -errno;
                r = wait_for(fd, POLLOUT, deadline);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* Room for at least one byte more, up to the limit and the NUL behind it. */
static int grow(struct reply *reply, size_t *capacity) {
        const size_t most = (size_t) KVMNEG_CLIENT_REPLY_MAX + 1;
        size_t wanted = *capacity ? *capacity * 2 : (size_t) FIRST_BUFFER;
        char *text;

        if (reply->size < *capacity)
                return 0;
        if (*capacity >= most)
                return -EFBIG;
        if (wanted > most)
                wanted = most;
        text = realloc(reply->text, wanted);
        if (!text)
                return -ENOMEM;
        reply->text = text;
        *capacity = wanted;
        return 0;
}

/* recv(2) without room for descriptors: those that somebody sends along are closed by the kernel. */
static int receive(int fd, struct reply *reply, int64_t deadline) {
        size_t capacity = 0;

        for (;;) {
                ssize_t received;
                char *end;
                int r = grow(reply, &capacity);

                if (r == 0)
                        r = wait_for(fd, POLLIN, deadline);
                if (r < 0)
                        return r;
                received = recv(fd, reply->text + reply->size, capacity - reply->size, MSG_DONTWAIT);
                if (received < 0 && (errno == EINTR || errno == EAGAIN))
                        continue;
                if (received <= 0)
                        return received < 0 ? -errno : -ECONNRESET;
                end = memchr(reply->text + reply->size, 0, (size_t) received);
                if (end) { /* what comes after it belongs to no call: it goes with the connection */
                        reply->size = (size_t) (end - reply->text);
                        return 0;
                }
                reply->size += (size_t) received;
        }
}

static int exchange(int fd, const struct sockaddr_un *address, const char *call, size_t size, int64_t deadline,
                    struct reply *reply) {
        int r = connect_until(fd, address, deadline);

        if (r < 0)
                return r;
        r = send_all(fd, call, size, deadline);
        /* A daemon that refuses a connection may close it before it read the call; why is there to read. */
        if (r < 0 && r != -EPIPE && r != -ECONNRESET)
                return r;
        return receive(fd, reply, deadline);
}

int kvmneg_client_exchange(const char *socket_path, const char *call, size_t size, int timeout_ms,
                           struct reply *ret_reply) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        struct reply reply = { NULL, 0 };
        size_t length = socket_path ? strlen(socket_path) : 0;
        int fd, r;

        if (length == 0 || length >= sizeof(address.sun_path))
                return -EINVAL;
        memcpy(address.sun_path, socket_path, length);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return -errno;
        r = exchange(fd, &address, call, size + 1, timeout_ms < 0 ? -1 : now_ms() + timeout_ms, &reply);
        close(fd);
        if (r < 0) {
                free(reply.text);
                return r;
        }
        *ret_reply = reply;
        return 0;
}
