/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * PID 1 of a recording host: loads KVM, asks it everything by libkvmneg, and prints the raw answers as one JSON
 * document on the console, between two lines of "=====". Then the machine powers off. See record.sh.
 *
 * What is printed is what the kernel said, undecoded: the tests decode it, and write by hand what must come out.
 */
#define _GNU_SOURCE

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/vhost.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "kvmneg.h"

#define FILE_BYTES 16384

static bool first;

static void separate(void) {
        if (!first)
                printf(",\n");
        first = false;
}

static void print_string(const char *text, size_t size) {
        putchar('"');
        for (size_t i = 0; i < size; i++) {
                unsigned char c = (unsigned char) text[i];
                if (c == '"' || c == '\\')
                        printf("\\%c", c);
                else if (c < 0x20 || c > 0x7e)
                        printf("\\u%04x", c);
                else
                        putchar(c);
        }
        putchar('"');
}

static void load_modules(void) {
        static const char *const names[] = { "irqbypass", "kvm", "ccp", "kvm-amd", "tun", "tap",
                                             "vhost_iotlb", "vhost", "vhost_net" };

        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
                char path[64];
                int fd;

                snprintf(path, sizeof(path), "/modules/%s.ko", names[i]);
                fd = open(path, O_RDONLY | O_CLOEXEC);
                if (fd < 0)
                        continue;
                if (syscall(SYS_finit_module, fd, "", 0) < 0)
                        fprintf(stderr, "%s: %s\n", path, strerror(errno));
                close(fd);
        }
}

static void print_cpuid(const char *name, const struct kvmneg_cpuid *table) {
        printf("\"%s\": ", name);
        if (!table) {
                printf("null,\n");
                return;
        }
        printf("[\n");
        for (uint32_t i = 0; i < table->count; i++) {
                const struct kvmneg_cpuid_entry *e = &table->entries[i];
                printf("  [\"%#x\", %u, %u, \"%#x\", \"%#x\", \"%#x\", \"%#x\"]%s\n", e->function, e->index, e->flags,
                       e->eax, e->ebx, e->ecx, e->edx, i + 1 < table->count ? "," : "");
        }
        printf("],\n");
}

static void print_capabilities(const char *name, const int32_t *values) {
        bool some = false;

        printf("\"%s\": {", name);
        for (int i = 0; i < KVMNEG_CAPABILITIES; i++)
                if (values[i]) {
                        printf("%s\"%d\": %d", some ? ", " : "", i, values[i]);
                        some = true;
                }
        printf("}");
}

static void print_msrs(const struct kvmneg_msrs *msrs) {
        printf("\"feature_msrs\": [");
        for (uint32_t i = 0; msrs && i < msrs->count; i++) {
                const struct kvmneg_msr *m = &msrs->entries[i];
                printf("%s[\"%#x\", ", i ? ", " : "", m->index);
                if (m->refused)
                        printf("null]");
                else
                        printf("\"%#llx\"]", (unsigned long long) m->value);
        }
        printf("],\n");
}

static void print_file(const char *path) {
        static char text[FILE_BYTES];
        ssize_t size;
        int fd = open(path, O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return;
        size = read(fd, text, sizeof(text));
        close(fd);
        if (size < 0)
                return;
        separate();
        printf("  ");
        print_string(path, strlen(path));
        printf(": ");
        print_string(text, (size_t) size);
}

static void print_folder(const char *path) {
        DIR *folder = opendir(path);
        struct dirent *entry;

        while (folder && (entry = readdir(folder))) {
                char file[512];

                if (entry->d_name[0] == '.')
                        continue;
                snprintf(file, sizeof(file), "%s/%s", path, entry->d_name);
                print_file(file);
        }
        if (folder)
                closedir(folder);
}

static void print_module(const char *name) {
        static const char *const files[] = { "initstate", "srcversion", "notes/.note.gnu.build-id" };
        char path[128];

        for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
                snprintf(path, sizeof(path), "/sys/module/%s/%s", name, files[i]);
                print_file(path);
        }
        snprintf(path, sizeof(path), "/sys/module/%s/parameters", name);
        print_folder(path);
}

/* Bytes are printed as code points: a reader turns them back by ISO 8859-1. */
static void print_files(void) {
        static const char *const files[] = {
                "/proc/cmdline", "/proc/cpuinfo", "/proc/sys/kernel/osrelease", "/proc/sys/kernel/version",
                "/proc/sys/kernel/random/boot_id", "/sys/kernel/security/lockdown",
                "/sys/devices/system/cpu/online", "/sys/devices/system/cpu/smt/control",
                "/sys/devices/system/cpu/smt/active",
        };
        static const char *const dmi[] = { "bios_vendor", "bios_version", "bios_date", "board_vendor", "board_name",
                                           "board_version", "sys_vendor", "product_name", "product_version" };

        printf("\"files\": {\n");
        first = true;
        for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++)
                print_file(files[i]);
        for (size_t i = 0; i < sizeof(dmi) / sizeof(dmi[0]); i++) {
                char path[128];
                snprintf(path, sizeof(path), "/sys/class/dmi/id/%s", dmi[i]);
                print_file(path);
        }
        print_module("kvm");
        print_module("kvm_amd");
        printf("\n}\n");
}

static void print_masks(void) {
        unsigned tun = 0;
        unsigned long long vhost = 0;
        int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

        if (fd >= 0 && ioctl(fd, TUNGETFEATURES, &tun) >= 0)
                printf("\"tap_features\": \"%#x\",\n", tun);
        fd = open("/dev/vhost-net", O_RDWR | O_CLOEXEC);
        if (fd >= 0 && ioctl(fd, VHOST_GET_FEATURES, &vhost) >= 0)
                printf("\"vhost_net_features\": \"%#llx\",\n", vhost);
}

static int record(void) {
        struct kvmneg_cpuid *raw = NULL;
        struct kvmneg_probe *probe;
        int kvm_fd, vm_fd, vcpu_fd, r;

        r = kvmneg_open("/dev/kvm", &kvm_fd, NULL);
        if (r >= 0)
                r = kvmneg_create_scratch(kvm_fd, &vm_fd, &vcpu_fd, NULL);
        if (r >= 0)
                r = kvmneg_probe(kvm_fd, vm_fd, vcpu_fd, &probe, NULL);
        if (r >= 0)
                r = kvmneg_get_raw_cpuid(0, &raw);
        if (r < 0) {
                fprintf(stderr, "recording failed: %s\n", strerror(-r));
                return r;
        }
        printf("\n=====\n{\n");
        printf("\"capabilities\": {");
        print_capabilities("system", probe->capabilities.system);
        printf(",\n  ");
        print_capabilities("vm", probe->capabilities.vm);
        printf("},\n");
        print_cpuid("supported", probe->supported);
        print_cpuid("emulated", probe->emulated);
        print_cpuid("hyperv", probe->hyperv);
        print_cpuid("raw", raw);
        print_msrs(probe->feature_msrs);
        if (!probe->xcomp_error)
                printf("\"xcomp_guest_supp\": \"%#llx\",\n", (unsigned long long) probe->xcomp_guest_supp);
        print_masks();
        print_files();
        printf("}\n=====\n");
        return 0;
}

int main(void) {
        mount("proc", "/proc", "proc", 0, NULL);
        mount("sysfs", "/sys", "sysfs", 0, NULL);
        mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
        mount("securityfs", "/sys/kernel/security", "securityfs", 0, NULL);
        load_modules();
        (void) record();
        fflush(NULL);
        tcdrain(1);
        sync();
        reboot(RB_AUTOBOOT);
        return 1;
}
