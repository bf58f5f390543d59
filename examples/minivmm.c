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

#include "minivmm.h"

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

static void finish(struct machine *machine, const struct kvmneg_contract *contract, bool anyway) {
        (void) machine, (void) contract, (void) anyway;
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
/* What comes between the vCPU and its registers: the vGIC, which changes some. */
static void prepare(struct machine *machine) {
        create_vgic(machine);
}

/* What comes after them: the vGIC's start, its revision, which the contract has too. */
static void finish(struct machine *machine, const struct kvmneg_contract *contract, bool anyway) {
        struct kvmneg_failure failure = { 0 };
        struct kvmneg_contract_info info;

        kvmneg_contract_describe(contract, &info);
        start_vgic(machine, info.vcpu_features);
        applied("the vGIC", kvmneg_vgic_apply(contract, machine->vgic, &failure, NULL), &failure, anyway);
}

static void look(struct machine *machine, struct word *word) {
        word->seen = next(machine);
}
#endif

static struct machine create(const struct kvmneg_contract *contract, bool anyway) {
        struct machine machine = { .vgic = -1 };
        struct kvmneg_failure failure = { 0 };

        open_vm(&machine);
        /* 3. The contract, before the first vCPU, and on each vCPU; the same calls for one that is plugged in later. */
        applied("the VM", kvmneg_vm_apply(contract, machine.vm, NULL, &failure, NULL), &failure, anyway);
        machine.vcpu = check("KVM_CREATE_VCPU", ioctl(machine.vm, KVM_CREATE_VCPU, 0));
        applied("the vCPU", kvmneg_vcpu_init(contract, machine.vm, machine.vcpu, &failure, NULL), &failure, false);
        prepare(&machine);
        applied("the vCPU", kvmneg_vcpu_apply(contract, machine.vcpu, NULL, &failure, NULL), &failure, anyway);
        finish(&machine, contract, anyway);
        map(&machine, BASE);
        return machine;
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
                look(machine, &words[at]);
                broken += !is_kept(&words[at]);
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

        /* 2. Take it for this VM; from now on it counts, for as long as this process lives. */
        r = kvmneg_begin(socket, offer->digest, argv[1], getpid(), TIMEOUT_MS, &contract, NULL, &refusal);
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
