/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Moves a running arm64 guest to another host with its contract: minivmm.c's next page. The steps to copy are send_guest()
 * and receive_guest().
 *
 *      cc -o minivmm-move minivmm-move-arm64.c $(pkg-config --cflags --libs libkvmneg-client libkvmneg)
 *      ./minivmm-move UUID --receive 7000 [--send HOST:PORT] [--socket PATH]
 *      ./minivmm-move UUID --request JSON --send HOST:PORT [--socket PATH]
 *
 * The guest starts here, or comes from elsewhere with its contract, which the new host judges by what it accepts from such
 * a guest, and then counts (--receive: on 127.0.0.1, as this page has no encryption). It runs for some steps: in each it
 * reads its ID registers, compares them with what it saw first, looks whether its clock went back, and counts. Then it goes
 * elsewhere (--send), or ends. Where the other host does not take it, it goes on here.
 *
 * Its vGIC is not carried, as it never touched it: a guest that did needs KVM_DEV_ARM_VGIC_GRP_DIST_REGS, REDIST_REGS and
 * CPU_SYSREGS too, after kvmneg_vgic_apply(). Exit status: as minivmm's, and 1 where the guest is refused.
 */

#include "minivmm.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#if !defined(__aarch64__)
#error "this page is about arm64: what moves there are registers, one by one"
#endif

#define CNTP_CTL 0x603000000013df11 /* CNTP_CTL_EL0 */
enum { REGISTERS = 4096, WIDEST = 256 };

/* What goes before the contract's bytes, the memory, and the registers. Both hosts are little-endian: KVM knows no other. */
struct arrival {
        uint64_t contract, memory, registers, count;
        struct kvm_mp_state mp_state;
        struct kvm_vcpu_events events;
};

struct content {
        uint64_t id;
        uint8_t bytes[WIDEST]; /* as wide as KVM says in the id */
};

/* All of `size` bytes to another host, or from it. */
static void put(int fd, const void *data, size_t size) {
        for (ssize_t n; size > 0; data = (const char *) data + n, size -= (size_t) n)
                check("the other host", (int) (n = send(fd, data, size, MSG_NOSIGNAL)));
}

static void take(int fd, void *data, size_t size) {
        for (ssize_t n; size > 0; data = (char *) data + n, size -= (size_t) n)
                if ((n = recv(fd, data, size, 0)) <= 0)
                        die("the other host", n < 0 ? 0 : -ECONNRESET);
}

/* A connection to "HOST:PORT". */
static int call(const char *where) {
        const struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM };
        int fd = check("socket", socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        char host[256], port[8];
        struct addrinfo *found;

        if (sscanf(where, "%255[^:]:%7s", host, port) != 2 || getaddrinfo(host, port, &hints, &found) != 0)
                die(where, -EHOSTUNREACH);
        check("connect", connect(fd, found->ai_addr, found->ai_addrlen));
        freeaddrinfo(found);
        return fd;
}

/* The first connection to a port of this host. */
static int answer(const char *port) {
        const struct sockaddr_in here = { .sin_family = AF_INET,
                                          .sin_port = htons((uint16_t) atoi(port)),
                                          .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        int one = 1, r = -1, listener = check("socket", socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));

        if (setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0 &&
            bind(listener, (const struct sockaddr *) &here, sizeof(here)) == 0 && listen(listener, 1) == 0)
                r = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        r = r < 0 ? -errno : r;
        kvmneg_close(listener);
        return r < 0 ? die("waiting on the port", r) : r;
}

/* As in minivmm.c, but that a failure is returned: the guest is elsewhere, and may go on there. */
static int create(struct guest *guest, struct kvmneg_failure *failure) {
        struct machine *machine = &guest->machine;
        struct kvmneg_contract_info info;
        struct word *word = guest->words;
        int r;

        for (uint32_t at = 0; guest->words_count < GUEST_WORDS && !kvmneg_contract_word(guest->contract, at, &word->bound); at++)
                if (of_guest(word))
                        word = &guest->words[++guest->words_count];
        open_vm(machine);
        kvmneg_contract_describe(guest->contract, &info);
        r = kvmneg_vm_apply(guest->contract, machine->vm, NULL, failure, NULL);
        if (r < 0)
                return r;
        machine->vcpu = check("KVM_CREATE_VCPU", ioctl(machine->vm, KVM_CREATE_VCPU, 0));
        r = kvmneg_vcpu_init(guest->contract, machine->vm, machine->vcpu, failure, NULL);
        if (r < 0)
                return r;
        create_vgic(machine);
        r = kvmneg_vcpu_apply(guest->contract, machine->vcpu, NULL, failure, NULL);
        if (r < 0)
                return r;
        start_vgic(machine, info.vcpu_features);
        map(machine, BASE);
        return kvmneg_vgic_apply(guest->contract, machine->vgic, failure, NULL);
}

/* The guest, which is stopped. Returns what the other host made of it: 0, or a negative errno: then it is still ours. */
static int send_guest(struct guest *guest, int fd) {
        struct arrival arrival = { .memory = MEMORY, .count = guest->count };
        const void *bytes = kvmneg_contract_bytes(guest->contract, &arrival.contract);
        struct kvmneg_registers *list;
        int32_t answer;
        int r = kvmneg_get_registers(guest->machine.vcpu, 0, &list, NULL);

        if (r < 0)
                die("KVM_GET_REG_LIST", r);
        arrival.registers = list->count;
        check("KVM_GET_MP_STATE", ioctl(guest->machine.vcpu, KVM_GET_MP_STATE, &arrival.mp_state));
        check("KVM_GET_VCPU_EVENTS", ioctl(guest->machine.vcpu, KVM_GET_VCPU_EVENTS, &arrival.events));
        put(fd, &arrival, sizeof(arrival));
        put(fd, bytes, arrival.contract);
        put(fd, guest->machine.memory, MEMORY);
        for (uint64_t at = 0; at < list->count; at++) {
                struct content content = { .id = list->ids[at] };
                struct kvm_one_reg one = one_register(content.id, content.bytes);

                check("KVM_GET_ONE_REG", ioctl(guest->machine.vcpu, KVM_GET_ONE_REG, &one));
                put(fd, &content, sizeof(content));
        }
        kvmneg_free(list);
        take(fd, &answer, sizeof(answer));
        return answer;
}

/* The registers that came: set, left out where the contract lets them, or the reason why the guest cannot come. */
static int set_registers(struct guest *guest, struct content *contents, uint64_t count, struct kvmneg_failure *failure) {
        struct kvmneg_registers *list = NULL;
        uint64_t timer = 1, value, left_out = 0;
        int r = kvmneg_get_registers(guest->machine.vcpu, 0, &list, NULL);

        for (uint64_t at = 0; at < count; at++)
                if (contents[at].id == CNTP_CTL)
                        memcpy(&timer, contents[at].bytes, sizeof(timer));
        for (uint64_t at = 0; r >= 0 && at < count; at++) {
                struct kvm_one_reg one = one_register(contents[at].id, contents[at].bytes);
                bool listed = false;

                for (uint64_t i = 0; i < list->count && !listed; i++)
                        listed = list->ids[i] == one.id;
                memcpy(&value, contents[at].bytes, sizeof(value));
                r = kvmneg_judge_register(guest->contract, one.id, value, timer, listed, failure);
                left_out += r == 0;
                if (r <= 0 || one.id == KVM_REG_ARM64_SVE_VLS) /* which kvmneg_vcpu_init() set, and is final */
                        continue;
                r = ioctl(guest->machine.vcpu, KVM_SET_ONE_REG, &one) < 0 ? -errno : 0;
                snprintf(failure->word, sizeof(failure->word), "arm64:0x%" PRIx64, (uint64_t) one.id);
                failure->asked = value, failure->mask = UINT64_MAX;
        }
        printf("%" PRIu64 " registers came, %" PRIu64 " left out\n", count, left_out);
        kvmneg_free(list);
        return r;
}

/*
 * The guest that comes, in a machine of its own, ready to run; or a negative errno, and it says why, or *ret_refusal does.
 * Its contract is the one that it began with, for life: judged here by what this host accepts, and counted for this VM.
 */
static int receive_guest(struct guest *guest, int fd, const char *socket, const char *vm, struct kvmneg_refusal **ret_refusal) {
        static struct content contents[REGISTERS];
        static unsigned char bytes[KVMNEG_CONTRACT_BYTES_MAX], memory[MEMORY];
        struct kvmneg_failure failure = { 0 };
        struct kvmneg_contract *brought;
        struct kvmneg_grant *grant;
        struct arrival arrival;
        int r;

        take(fd, &arrival, sizeof(arrival));
        if (arrival.contract > sizeof(bytes) || arrival.memory != MEMORY || arrival.registers > REGISTERS)
                return -EMSGSIZE;
        take(fd, bytes, arrival.contract);
        take(fd, memory, sizeof(memory));
        take(fd, contents, arrival.registers * sizeof(contents[0]));
        r = kvmneg_contract_open_memory(bytes, arrival.contract, &brought, NULL); /* its digest is checked */
        if (r < 0)
                return r;
        r = kvmneg_receive(socket, brought, vm, NULL, getpid(), TIMEOUT_MS, &guest->contract, &grant, ret_refusal);
        kvmneg_contract_free(brought);
        if (r < 0)
                return r;
        printf("holds %s\n", grant->digest);
        kvmneg_grant_free(grant);
        r = create(guest, &failure);
        if (r >= 0)
                r = set_registers(guest, contents, arrival.registers, &failure);
        if (r >= 0)
                r = kvmneg_vcpu_verify(guest->contract, guest->machine.vcpu, &failure, NULL);
        applied("the guest that comes", r, &failure, true);
        if (r < 0)
                return r;
        memcpy(guest->machine.memory, memory, sizeof(memory));
        guest->count = arrival.count;
        check("KVM_SET_VCPU_EVENTS", ioctl(guest->machine.vcpu, KVM_SET_VCPU_EVENTS, &arrival.events));
        return check("KVM_SET_MP_STATE", ioctl(guest->machine.vcpu, KVM_SET_MP_STATE, &arrival.mp_state));
}

/* The guest that starts here, as in minivmm.c. */
static int start_guest(struct guest *guest, const char *socket, const char *vm, const char *request) {
        struct kvmneg_refusal *refusal = NULL;
        struct kvmneg_failure failure = { 0 };
        struct kvmneg_offer *offer;
        int r = kvmneg_negotiate(socket, request, TIMEOUT_MS, &offer, &refusal);

        refused("negotiate", r, refusal);
        r = kvmneg_begin(socket, offer->digest, vm, getpid(), TIMEOUT_MS, &guest->contract, NULL, &refusal);
        refused("begin", r, refusal);
        printf("holds %s\n", offer->digest);
        kvmneg_offer_free(offer);
        r = create(guest, &failure);
        applied("the guest", r, &failure, true);
        if (r >= 0)
                load(&guest->machine, guest->words, guest->words_count);
        return r;
}

int main(int argc, char **argv) {
        const char *socket = KVMNEG_CLIENT_SOCKET, *receive = NULL, *to = NULL, *request = NULL;
        struct kvmneg_refusal *refusal = NULL;
        struct kvmneg_failure failure = { 0 };
        static struct guest guest;
        int r, fd = -1;

        for (int at = 2; at < argc; at += 2) {
                const char *known[] = { "--request", "--receive", "--send", "--socket" };
                const char **given[] = { &request, &receive, &to, &socket };
                int i = 0;

                while (i < 4 && strcmp(argv[at], known[i]) != 0)
                        i++;
                if (i == 4 || at + 1 == argc)
                        argc = 0;
                else
                        *given[i] = argv[at + 1];
        }
        if (argc < 2 || !request == !receive)
                return fprintf(stderr, "usage: minivmm-move UUID --request JSON|--receive PORT [--send HOST:PORT] "
                                       "[--socket PATH]\n"), 2;
        setlinebuf(stdout);

        /* On either host its own daemon counts the guest, for as long as this process lives: no exit need tell it. */
        if (receive) {
                fd = answer(receive);
                r = receive_guest(&guest, fd, socket, argv[1], &refusal);
        } else {
                r = start_guest(&guest, socket, argv[1], request);
        }
        if (r >= 0)
                r = kvmneg_started(socket, argv[1], TIMEOUT_MS, &refusal);
        if (receive) { /* now it is ours: until here it could have gone on where it came from */
                put(fd, &(int32_t){ r }, sizeof(int32_t));
                kvmneg_close(fd);
        }
        refused(receive ? "the guest that comes" : "the guest", r, refusal);
        run_steps(&guest);
        r = kvmneg_vcpu_verify(guest.contract, guest.machine.vcpu, &failure, NULL);
        if (r >= 0)
                r = kvmneg_vgic_verify(guest.contract, guest.machine.vgic, &failure, NULL);
        applied("after the first run", r, &failure, true);
        if (r >= 0 && to) {
                fd = call(to);
                r = send_guest(&guest, fd);
                printf("%s\n", r < 0 ? "the other host refuses it, and it goes on here" : "it is on the other host");
                kvmneg_close(fd);
                if (r < 0)
                        run_steps(&guest);
        }
        kvmneg_contract_free(guest.contract); /* its machine goes with this process, and so does what its daemon counts */
        return r < 0 || guest.broken > 0;
}
