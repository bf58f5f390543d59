/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A whole VMM in one page: asks kvmnegd for a contract, makes a VM that keeps it, runs a guest that looks at its CPU, and
 * compares. The steps to copy are in main(); what is around them is any VMM's.
 *
 *      cc -o minivmm minivmm.c $(pkg-config --cflags --libs libkvmneg-client libkvmneg)
 *      ./minivmm "$(uuidgen)" '{"request": {"level": "x86-64-v2"}}' [--socket PATH] [--anyway]
 *
 * With --anyway it goes on where KVM does not keep to the contract, and shows what the guest sees then. Exit status: 0
 * the guest sees what was promised, 1 it does not, or there is no contract, 2 it was called in a wrong way.
 */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <kvmneg-client.h>
#include <kvmneg.h>

enum { MEMORY = 64 * 1024, CODE = 0x1000, TABLE = 0x4000, WORDS = 1024, TIMEOUT_MS = 30000 };

/* A word of the contract, where the guest reads it, and what it saw. */
struct word {
        struct kvmneg_bound_word bound;
        uint32_t leaf, subleaf; /* x86 */
        unsigned place;         /* x86: of the register, eax is 0 */
        uint64_t id;            /* arm64 */
        uint64_t seen;
};

/* The parts of a VM. */
struct machine {
        int kvm, vm, vcpu, device;
        unsigned char *memory;
        struct kvm_run *run;
        size_t run_size;
};

static int die(const char *what, int r) {
        fprintf(stderr, "minivmm: %s: %s\n", what, strerror(r < 0 ? -r : errno));
        exit(1); /* kvmneg_end() is not needed: a grant that nobody started expires */
}

static int check(const char *what, int r) {
        return r < 0 ? die(what, 0) : r;
}

/* Runs the guest until it gives the next value. */
static uint64_t next(struct machine *machine) {
        struct kvm_run *run = machine->run;
        uint64_t value = 0;

        while (ioctl(machine->vcpu, KVM_RUN, 0) < 0)
                if (errno != EINTR)
                        die("KVM_RUN", 0);
        if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT)
                memcpy(&value, (unsigned char *) run + run->io.data_offset, run->io.size);
        else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write)
                memcpy(&value, run->mmio.data, sizeof(value));
        else {
                fprintf(stderr, "minivmm: the guest stopped: exit %u\n", run->exit_reason);
                exit(1);
        }
        return value;
}

#if defined(__x86_64__)
enum { BASE = 0 };

/* In real mode: for each pair in the table CPUID, and its four registers to port 0x10; until nobody asks for more. */
static const unsigned char guest[] = {
        0xbe, TABLE & 0xff, TABLE >> 8, /*       mov si, TABLE */
        0x66, 0x8b, 0x04,               /* next: mov eax, [si] */
        0x66, 0x8b, 0x4c, 0x04,         /*       mov ecx, [si + 4] */
        0x0f, 0xa2,                     /*       cpuid */
        0x66, 0xe7, 0x10,               /*       out 0x10, eax */
        0x66, 0x89, 0xd8,               /*       mov eax, ebx */
        0x66, 0xe7, 0x10,               /*       out 0x10, eax */
        0x66, 0x89, 0xc8,               /*       mov eax, ecx */
        0x66, 0xe7, 0x10,               /*       out 0x10, eax */
        0x66, 0x89, 0xd0,               /*       mov eax, edx */
        0x66, 0xe7, 0x10,               /*       out 0x10, eax */
        0x83, 0xc6, 0x08,               /*       add si, 8 */
        0xeb, 0xdd,                     /*       jmp next */
};

/* "cpuid:0x7.0.ebx" */
static bool of_guest(struct word *word) {
        char name;

        if (sscanf(word->bound.word, "cpuid:0x%" SCNx32 ".%" SCNu32 ".e%cx", &word->leaf, &word->subleaf, &name) != 3)
                return false;
        word->place = (unsigned) name - 'a';
        return word->place < 4;
}

static void prepare(struct machine *machine) {
        struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
        struct kvm_sregs sregs;

        check("KVM_SET_TSS_ADDR", ioctl(machine->vm, KVM_SET_TSS_ADDR, 0xfffbd000UL)); /* old Intel's real mode */
        check("KVM_GET_SREGS", ioctl(machine->vcpu, KVM_GET_SREGS, &sregs));
        sregs.cs.base = sregs.cs.selector = 0;
        check("KVM_SET_SREGS", ioctl(machine->vcpu, KVM_SET_SREGS, &sregs));
        check("KVM_SET_REGS", ioctl(machine->vcpu, KVM_SET_REGS, &regs));
}

static void load(struct machine *machine, const struct word *words, uint32_t count) {
        uint32_t *table = (uint32_t *) (machine->memory + TABLE);

        memcpy(machine->memory + CODE, guest, sizeof(guest));
        for (uint32_t at = 0; at < count; at++) {
                table[2 * at] = words[at].leaf;
                table[2 * at + 1] = words[at].subleaf;
        }
}

/* The guest gives four registers for each word, which is one of them. */
static void look(struct machine *machine, struct word *word) {
        for (unsigned at = 0; at < 4; at++) {
                uint64_t value = next(machine);

                if (at == word->place)
                        word->seen = value;
        }
}

#elif defined(__aarch64__)
enum { BASE = 0x40000000, RESULTS = 0x09000000 };

/* "arm64:0x603000000013c020", an ID register (Arm ARM D23): op0 3, op1 0, CRn 0, CRm 1 to 7. */
static bool of_guest(struct word *word) {
        if (sscanf(word->bound.word, "arm64:0x%" SCNx64, &word->id) != 1)
                return false;
        return word->id >> 16 == 0x603000000013 && (word->id >> 7 & 0x1ff) == 0x180 && (word->id >> 3 & 0xf) - 1 < 7;
}

/* ID registers show a vGIC where there is one, and the contract counts on it. */
static void prepare(struct machine *machine) {
        struct kvm_create_device vgic = { .type = KVM_DEV_TYPE_ARM_VGIC_V3 };
        uint64_t start = BASE + CODE;
        struct kvm_one_reg pc = { .id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.pc),
                                  .addr = (uint64_t) &start };

        check("KVM_CREATE_DEVICE", ioctl(machine->vm, KVM_CREATE_DEVICE, &vgic));
        machine->device = (int) vgic.fd;
        check("KVM_SET_ONE_REG", ioctl(machine->vcpu, KVM_SET_ONE_REG, &pc));
}

/* With the MMU off: each register is read and stored where no memory is, which is an exit to us. */
static void load(struct machine *machine, const struct word *words, uint32_t count) {
        uint32_t *code = (uint32_t *) (machine->memory + CODE);

        *code++ = 0xd2a00014 | RESULTS >> 16 << 5; /* movz x20, #RESULTS */
        for (uint32_t at = 0; at < count; at++) {
                *code++ = 0xd5380000 | (words[at].id & 0x3fff) << 5; /* mrs x0, the register */
                *code++ = 0xf9000280;                                /* str x0, [x20] */
        }
        *code = 0x14000000; /* b . */
        __builtin___clear_cache((char *) machine->memory, (char *) machine->memory + MEMORY);
}

static void look(struct machine *machine, struct word *word) {
        word->seen = next(machine);
}
#endif

/* Says what failed, and whether to go on. */
static void applied(const char *what, int r, const struct kvmneg_failure *failure, bool anyway) {
        if (r >= 0)
                return;
        fprintf(stderr, "minivmm: %s: %s: asked 0x%" PRIx64 " of 0x%" PRIx64 ", got 0x%" PRIx64 ": %s\n", what, failure->word,
                failure->asked, failure->mask, failure->got, strerror(-r));
        if (!anyway)
                exit(1);
}

static void refused(const char *what, int r, struct kvmneg_refusal *refusal) {
        if (r >= 0)
                return;
        if (r != -EREMOTEIO)
                die(what, r);
        fprintf(stderr, "minivmm: %s: %s\n%s%s\n", refusal->name, refusal->message, refusal->blockers, refusal->hint);
        kvmneg_refusal_free(refusal);
        exit(1);
}

static struct machine create(const struct kvmneg_contract *contract, bool anyway) {
        struct kvm_userspace_memory_region region = { .guest_phys_addr = BASE, .memory_size = MEMORY };
        struct machine machine = { .device = -1 };
        struct kvmneg_failure failure = { 0 };
        int r = kvmneg_open("/dev/kvm", &machine.kvm, NULL);

        if (r < 0)
                die("/dev/kvm", r);
        r = kvmneg_create_vm(machine.kvm, &machine.vm, NULL);
        if (r < 0)
                die("KVM_CREATE_VM", r);
        /* 3. The contract, before the first vCPU, and on each vCPU; the same calls for one that is plugged in later. */
        applied("the VM", kvmneg_vm_apply(contract, machine.vm, NULL, &failure, NULL), &failure, anyway);
        machine.vcpu = check("KVM_CREATE_VCPU", ioctl(machine.vm, KVM_CREATE_VCPU, 0));
        applied("the vCPU", kvmneg_vcpu_init(contract, machine.vm, machine.vcpu, &failure, NULL), &failure, false);
        prepare(&machine);
        applied("the vCPU", kvmneg_vcpu_apply(contract, machine.vcpu, NULL, &failure, NULL), &failure, anyway);

        machine.memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        machine.run_size = (size_t) check("KVM_GET_VCPU_MMAP_SIZE", ioctl(machine.kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
        machine.run = mmap(NULL, machine.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine.vcpu, 0);
        if (machine.memory == MAP_FAILED || machine.run == MAP_FAILED)
                die("mmap", 0);
        region.userspace_addr = (uint64_t) machine.memory;
        check("KVM_SET_USER_MEMORY_REGION", ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, &region));
        return machine;
}

static void destroy(struct machine *machine) {
        munmap(machine->run, machine->run_size);
        munmap(machine->memory, MEMORY);
        kvmneg_close(machine->device);
        kvmneg_close(machine->vcpu);
        kvmneg_close(machine->vm);
        kvmneg_close(machine->kvm);
}

/* Runs the guest over each word that it can read; how many it sees otherwise than promised. */
static unsigned run(struct machine *machine, const struct kvmneg_contract *contract) {
        static struct word words[WORDS];
        unsigned broken = 0;
        uint32_t count = 0;

        for (uint32_t at = 0; count < WORDS && kvmneg_contract_word(contract, at, &words[count].bound) == 0; at++)
                count += of_guest(&words[count]);
        load(machine, words, count);
        for (uint32_t at = 0; at < count; at++) {
                const struct kvmneg_bound_word *bound = &words[at].bound;

                look(machine, &words[at]);
                if ((words[at].seen ^ bound->value) & bound->mask) {
                        broken++;
                        printf("%s: promised 0x%" PRIx64 " of 0x%" PRIx64 ", the guest sees 0x%" PRIx64 "\n", bound->word,
                               bound->value, bound->mask, words[at].seen);
                }
        }
        printf("%" PRIu32 " words looked at by the guest, %u not as promised\n", count, broken);
        return broken;
}

int main(int argc, char **argv) {
        const char *socket = KVMNEG_CLIENT_SOCKET;
        struct kvmneg_refusal *refusal = NULL;
        struct kvmneg_contract *contract;
        struct kvmneg_offer *offer;
        struct machine machine;
        bool anyway = false;
        unsigned broken;
        int r;

        for (int at = 3; at < argc; at++)
                if (strcmp(argv[at], "--anyway") == 0)
                        anyway = true;
                else if (strcmp(argv[at], "--socket") == 0 && at + 1 < argc)
                        socket = argv[++at];
                else
                        argc = 0;
        if (argc < 3) {
                fprintf(stderr, "usage: minivmm UUID REQUEST [--socket PATH] [--anyway]\n");
                return 2;
        }

        /* 1. What may this guest see? An offer binds nobody. */
        r = kvmneg_negotiate(socket, argv[2], TIMEOUT_MS, &offer, &refusal);
        refused("negotiate", r, refusal);
        printf("offered %s, generation %" PRIu64 "\n%s", offer->digest, offer->generation, offer->not_granted);

        /* 2. Take it for this VM; from now on it counts. */
        r = kvmneg_begin(socket, offer->digest, argv[1], TIMEOUT_MS, &contract, NULL, &refusal);
        kvmneg_offer_free(offer);
        refused("begin", r, refusal);

        machine = create(contract, anyway); /* 3. Apply it. */
        r = kvmneg_started(socket, argv[1], TIMEOUT_MS, &refusal); /* 4. It runs. */
        refused("started", r, refusal);
        broken = run(&machine, contract);
        destroy(&machine);
        kvmneg_contract_free(contract);
        r = kvmneg_end(socket, argv[1], TIMEOUT_MS, &refusal); /* 5. It is gone. */
        refused("end", r, refusal);
        return broken > 0;
}
