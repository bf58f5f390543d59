/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Load generator: N connections to a Unix socket, each with one outstanding call, the bytes of which come from a
 * file. A reply ends with a NUL. The first tenth of the time (or of the calls) warms up and is not counted.
 *
 * usage: load -s SOCKET -f CALL-FILE [-c CLIENTS] [-d SECONDS | -n CALLS]
 * prints {"clients": 32, "calls": 812345, "seconds": 4.5, "p50_us": 80.1, "p99_us": 120.4, "reply_bytes": 8704}
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CLIENTS = 1024, CALL_MAX = 64 * 1024, CHUNK = 256 * 1024, SAMPLES = 8 << 20 };

struct options {
        const char *socket, *file;
        unsigned clients;
        double seconds;
        uint64_t calls;
};

struct load {
        char call[CALL_MAX];
        size_t call_size;
        uint64_t started[MAX_CLIENTS];  /* when each client sent its call, ns */
        size_t received[MAX_CLIENTS];   /* bytes of the reply so far */
        int fd[MAX_CLIENTS];
        uint32_t *sample;               /* ns per call */
        uint64_t calls;
        size_t reply_size;
};

static uint64_t now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
}

static void die(const char *what) {
        fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
        exit(1);
}

static int by_value(const void *a, const void *b) {
        uint32_t x = *(const uint32_t *) a, y = *(const uint32_t *) b;
        return (x > y) - (x < y);
}

static int dial(const char *path) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        if (strlen(path) >= sizeof(address.sun_path)) {
                errno = ENAMETOOLONG;
                die(path);
        }
        memcpy(address.sun_path, path, strlen(path) + 1);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *) &address, sizeof(address)) < 0)
                die(path);
        return fd;
}

static void ask(struct load *load, unsigned i) {
        load->received[i] = 0;
        load->started[i] = now();
        if (send(load->fd[i], load->call, load->call_size, MSG_NOSIGNAL) != (ssize_t) load->call_size)
                die("send");
}

/* Takes what there is of a reply; true when it is complete. */
static int take(struct load *load, unsigned i) {
        static char chunk[CHUNK];
        ssize_t got = recv(load->fd[i], chunk, sizeof(chunk), 0);
        if (got <= 0) {
                errno = got ? errno : ECONNRESET;
                die("recv");
        }
        load->received[i] += (size_t) got;
        if (chunk[got - 1] != 0)
                return 0;
        load->reply_size = load->received[i];
        return 1;
}

static void prepare(struct load *load, const struct options *options) {
        FILE *file = fopen(options->file, "rbe");
        if (!file)
                die(options->file);
        load->call_size = fread(load->call, 1, sizeof(load->call) - 1, file);
        fclose(file);
        if (load->call_size == 0 || load->call[load->call_size - 1] != 0)
                load->call[load->call_size++] = 0;
        load->sample = malloc(sizeof(uint32_t) * SAMPLES);
        if (!load->sample)
                die("malloc");
}

/* Runs until `until` (ns) or `calls` more calls; with `count`, keeps the latencies. */
static void run(struct load *load, int queue, uint64_t until, uint64_t calls, int count) {
        for (uint64_t done = 0; done < calls && now() < until;) {
                struct epoll_event events[64];
                int n = epoll_wait(queue, events, 64, 1000);
                for (int k = 0; k < n; k++) {
                        unsigned i = events[k].data.u32;
                        if (!take(load, i))
                                continue;
                        if (count) {
                                load->sample[load->calls % SAMPLES] = (uint32_t) (now() - load->started[i]);
                                load->calls++;
                        }
                        done++;
                        ask(load, i);
                }
        }
}

static struct options parse(int argc, char **argv) {
        struct options options = {.clients = 1, .seconds = 2};
        for (int c; (c = getopt(argc, argv, "s:f:c:d:n:")) != -1;)
                switch (c) {
                case 's': options.socket = optarg; break;
                case 'f': options.file = optarg; break;
                case 'c': options.clients = (unsigned) atoi(optarg); break;
                case 'd': options.seconds = atof(optarg); break;
                case 'n': options.calls = strtoull(optarg, NULL, 10); break;
                default: exit(2);
                }
        if (!options.socket || !options.file || options.clients < 1 || options.clients > MAX_CLIENTS) {
                fprintf(stderr, "usage: %s -s SOCKET -f CALL-FILE [-c CLIENTS] [-d SECONDS | -n CALLS]\n", argv[0]);
                exit(2);
        }
        return options;
}

int main(int argc, char **argv) {
        static struct load load;
        struct options options = parse(argc, argv);
        prepare(&load, &options);
        int queue = epoll_create1(EPOLL_CLOEXEC);
        for (unsigned i = 0; i < options.clients; i++) {
                load.fd[i] = dial(options.socket);
                struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};
                if (epoll_ctl(queue, EPOLL_CTL_ADD, load.fd[i], &event) < 0)
                        die("epoll_ctl");
                ask(&load, i);
        }
        uint64_t calls = options.calls ? options.calls : UINT64_MAX;
        double limit = options.calls ? 3600 : options.seconds;
        run(&load, queue, now() + (uint64_t) (limit * 1e8), options.calls ? calls / 10 : calls, 0);
        uint64_t begin = now();
        run(&load, queue, begin + (uint64_t) (limit * 0.9e9), calls, 1);
        double seconds = (double) (now() - begin) / 1e9;
        if (load.calls == 0) {
                fprintf(stderr, "load: no call was answered\n");
                return 1;
        }
        size_t kept = load.calls < SAMPLES ? load.calls : SAMPLES;
        qsort(load.sample, kept, sizeof(uint32_t), by_value);
        printf("{\"clients\": %u, \"calls\": %llu, \"seconds\": %.4f, \"p50_us\": %.2f, \"p99_us\": %.2f, "
               "\"reply_bytes\": %zu}\n",
               options.clients, (unsigned long long) load.calls, seconds, load.sample[kept / 2] / 1e3,
               load.sample[kept - 1 - kept / 100] / 1e3, load.reply_size);
        return 0;
}
