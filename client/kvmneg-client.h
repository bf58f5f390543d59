/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libkvmneg-client: asks kvmnegd(8) for the contract of a guest, over varlink. libkvmneg applies it.
 *
 *      request      {"request": {"level": "x86-64-v2", "optional": ["avx2"]}, "digestOnly": true}
 *      negotiate    an offer; binds nobody
 *      begin        the contract of one VM, opened; from here it counts as a guest's
 *      receive      the same for a VM that comes from another host, with the contract it has there
 *      started      the VM runs: the contract does not expire any more
 *      end          the VM is gone
 *      call         any other method: hand the VM over, save it, report what it was given
 *
 * The contract of every function here:
 *   - it returns 0 on success and a negative errno on failure;
 *   - what a `ret_` parameter points to is written on success only, but for `ret_refusal`;
 *   - it blocks, for `timeout_ms` milliseconds in all, connecting included; without a limit if that is negative;
 *   - it makes one connection for one call and closes it; a VM's contract does not depend on a connection, but on a
 *     process where one is named;
 *   - it keeps no state, has no globals, never logs, raises no signal (SIGPIPE neither), goes on after EINTR, and may be
 *     called from any thread;
 *   - descriptors it opens have O_CLOEXEC, and none is left open.
 *
 *      -EREMOTEIO    the daemon said no: *ret_refusal (unless NULL) tells which error it is, and why
 *      -EINVAL       `request` or `parameters` is no JSON object, or another argument is NULL or not printable ASCII; `pid` is
 *                    negative; `socket` is too long or empty
 *      -EMSGSIZE     the call is longer than KVMNEG_CLIENT_CALL_MAX
 *      -ENOENT, -ECONNREFUSED, -EACCES, ...  from connect(2): nobody serves there, or not for this user
 *      -ETIMEDOUT    no whole reply in time
 *      -ECONNRESET   the connection was closed without a whole reply
 *      -EFBIG        the reply is longer than KVMNEG_CLIENT_REPLY_MAX, or has too many objects and arrays
 *      -EBADMSG      the reply is not JSON, not varlink's, or has not the fields it must have
 *      -ENOMEM
 *
 * Methods, fields and errors are those of the interface org.kvmneg; its commented text is installed with kvmneg, and
 * `varlinkctl introspect /run/kvmneg/org.kvmneg org.kvmneg` shows it.
 *
 * With KVMNEG_CDEF defined this file is plain declarations, for bindings.
 */
#ifndef KVMNEG_CDEF
#pragma once
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define KVMNEG_CLIENT_SOCKET "/run/kvmneg/org.kvmneg"
#endif

enum {
        KVMNEG_CLIENT_CALL_MAX = 64 * 1024,        /* bytes of a call; what the daemon takes */
        KVMNEG_CLIENT_REPLY_MAX = 1024 * 1024,     /* bytes of a reply; that of Negotiate has some 10,000 */
        KVMNEG_CLIENT_DEPTH_MAX = 32,              /* nesting of JSON, both ways */
        KVMNEG_CLIENT_CONTAINERS_MAX = 16 * 1024,  /* objects and arrays in a reply: each takes up to 1 KiB */
        KVMNEG_CLIENT_DIGEST_SIZE = 7 + 64 + 1,    /* "sha256:", 64 hexadecimal digits, NUL */
};

/*
 * Why the daemon said no. Text is UTF-8 for people, never NULL, "" where there is none, without control characters;
 * in a text of several lines each ends with a newline. Release with kvmneg_refusal_free().
 */
struct kvmneg_refusal {
        const char *name;      /* the error, "org.kvmneg.Blocked": this one is for programs, compare it whole */
        const char *message;   /* one sentence */
        const char *hint;      /* what to do */
        const char *blockers;  /* a line for each reason: feature, word and bit, who wants it, why, the layer */
        uint32_t blocker_count;
        uint32_t padding;
        const char *reply;     /* the reply as it came: JSON, {"error": name, "parameters": {...}} */
};

struct kvmneg_refusal *kvmneg_refusal_free(struct kvmneg_refusal *refusal);

/* What Negotiate offers. Text as above. Release with kvmneg_offer_free(). */
struct kvmneg_offer {
        char digest[KVMNEG_CLIENT_DIGEST_SIZE]; /* the contract's name: what kvmneg_begin() takes */
        uint64_t generation;                    /* of the fence */
        const char *not_granted;                /* a line for each optional feature that is not in it */
        uint32_t not_granted_count;
        uint32_t padding;
        const char *scope;                      /* a line for each thing that was judged, or was not */
        const char *reply;                      /* as it came: JSON, {"parameters": {"digest": ..., ...}} */
};

struct kvmneg_offer *kvmneg_offer_free(struct kvmneg_offer *offer);

/* A contract granted to a VM. Release with kvmneg_grant_free(). */
struct kvmneg_grant {
        char digest[KVMNEG_CLIENT_DIGEST_SIZE];
        uint64_t generation;
        uint64_t expires_in_seconds; /* by then kvmneg_started() has to be called, unless a process keeps it */
        const char *path;            /* the file with its binary form, absolute; it is there while a VM holds it */
};

struct kvmneg_grant *kvmneg_grant_free(struct kvmneg_grant *grant);

struct kvmneg_contract; /* kvmneg.h */

/*
 * Method Negotiate. `request` is the UTF-8 JSON of its parameters, {"request": {...}}. With "digestOnly": true beside it
 * the reply has no contract: that is a tenth of the bytes, and parsing them was most of the time. Leave it away to read
 * the contract's JSON in the offer's `reply`; kvmneg_begin() opens its binary form either way.
 */
int kvmneg_negotiate(const char *socket, const char *request, int timeout_ms, struct kvmneg_offer **ret_offer,
                     struct kvmneg_refusal **ret_refusal);

/*
 * Method Begin: takes the offer `digest` for the VM with the UUID `vm`, and opens the file with its contract
 * (kvmneg_contract_open(); release it with kvmneg_contract_free()). `ret_contract` may be NULL, then nothing is opened,
 * and so may `ret_grant`. Calling it again is no error.
 *
 * `pid` is the process that runs the VM, getpid() of a VMM that asks for itself: the VM counts for as long as it lives,
 * so that a VMM that is killed needs no kvmneg_end(). 0: the grant lasts until kvmneg_end(), and expires where
 * kvmneg_started() does not come in time. It is the number that the daemon sees: across PID namespaces give 0.
 *   -EBADMSG     also where the file is no contract
 *   -EBADE       the daemon grants another digest than it was asked for, or the file has another one
 *   -ENOENT, -EACCES, ...  from open(2) too
 * Where it fails after the daemon granted, the grant expires by itself; kvmneg_end() takes it back at once.
 */
int kvmneg_begin(const char *socket, const char *digest, const char *vm, int pid, int timeout_ms,
                 struct kvmneg_contract **ret_contract, struct kvmneg_grant **ret_grant,
                 struct kvmneg_refusal **ret_refusal);

/*
 * Method Receive of org.kvmneg.Guests, in the place of kvmneg_negotiate() and kvmneg_begin(): the VM comes from another
 * host with its contract, which it keeps. The daemon judges it by what this host accepts from an incoming guest, which
 * can be more than it offers to new ones: to be called before any of the guest's state is loaded. `vmm` is what runs it
 * here ("qemu-10.0"; NULL: what KVM accepts counts); the rest is as for kvmneg_begin(), and so are the errors.
 * `ret_contract` is the file that the daemon keeps: the bytes of `contract`.
 *   -EMSGSIZE    the contract does not fit a call
 */
int kvmneg_receive(const char *socket, const struct kvmneg_contract *contract, const char *vm, const char *vmm, int pid,
                   int timeout_ms, struct kvmneg_contract **ret_contract, struct kvmneg_grant **ret_grant,
                   struct kvmneg_refusal **ret_refusal);

/* Method Started: the VM runs. */
int kvmneg_started(const char *socket, const char *vm, int timeout_ms, struct kvmneg_refusal **ret_refusal);

/* Method End: the VM is gone. */
int kvmneg_end(const char *socket, const char *vm, int timeout_ms, struct kvmneg_refusal **ret_refusal);

/*
 * Any other method, by its full name: the VM goes on in another process ("org.kvmneg.Guests.Handover"), lies in an image
 * ("org.kvmneg.Guests.Saved"), was given other words ("org.kvmneg.Guests.Report"). `parameters` is the UTF-8 JSON of its
 * parameters, NULL for none. *ret_reply (unless NULL) is the reply as it came, {"parameters": {...}}: release it with
 * free(3). One that gives more than one reply (Watch) is refused: those need a connection that stays.
 */
int kvmneg_call(const char *socket, const char *method, const char *parameters, int timeout_ms, char **ret_reply,
                struct kvmneg_refusal **ret_refusal);

#ifndef KVMNEG_CDEF
#ifdef __cplusplus
}
#endif
#endif
