# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every quantity a client, a file or the kernel controls has its limit here, by name.

Each has a test that crosses it. Sizes are bytes, times are seconds unless the name says otherwise.
"""

# varlink, one connection
CALL_BYTES = 64 * 1024  # one call, without its NUL
REPLY_QUEUE_BYTES = 64 * 1024  # high water of unsent replies: reading stops until they are taken
READ_CHUNK_BYTES = 64 * 1024  # read from one connection in one turn of the loop, so that others get theirs
REPLY_BYTES = 4 * 1024 * 1024  # what a client accepts from a daemon
NESTING_DEPTH = 32  # of JSON in a call
TURN_SECONDS = 0.02  # spent on calls left over from earlier turns, before new ones are looked for
COPY_SECONDS = 0.2  # after a change of the fence its copy is written
COPY_AGAIN_SECONDS = 30.0  # after one that could not be written
CALLS_PER_TURN = 64  # answered from what one connection pipelined, before the others get their turn

# varlink, all connections
CONNECTIONS = 1024
CONNECTIONS_PER_UID = 256
# A person can have many uids (subuid(5)), and fill what all have: above it, for administrators and users of the system.
CONNECTIONS_RESERVED = 128
SYSTEM_UIDS = 1000  # below are users of the system: root, and those that services run as
FIRST_CALL_SECONDS = 10.0  # a connection that sends no complete call by then is closed
WATCHERS = 256
WATCHERS_PER_UID = 64
WATCHER_STALL_SECONDS = 10.0  # a watcher that takes nothing of what is queued for it that long is dropped
ACCEPT_PER_TURN = 64
ACCEPT_PAUSE_SECONDS = 0.1  # without a descriptor left even for refusing
TROUBLE_SECONDS = 60.0  # the same trouble (no descriptors left) is reported once in that time
STOP_SECONDS = 2.0  # for handing out queued replies when the daemon stops
CACHED_REPLIES = 256  # distinct calls whose reply bytes are kept
CACHED_CALL_BYTES = 8 * 1024  # longer calls are answered and not kept
CACHED_REPLY_BYTES = 64 * 1024  # longer replies are not kept either
CACHED_OFFERS = 1024  # contracts offered and not begun that GetContract and Begin still know

# D-Bus
BUS_CALLS = 256  # calls by D-Bus that wait for their answer
BUS_CALLS_PER_CALLER = 32  # of one connection to the bus
BUS_CALLS_PER_UID = 64
BUS_CALLERS = 1024  # connections to the bus whose credentials are kept
BUS_RETRY_SECONDS = 60.0  # at most, before a bus that was not there, or has gone, is tried again
POLKIT_QUESTIONS = 64  # calls that wait for polkit
POLKIT_QUESTIONS_PER_UID = 8
POLKIT_SECONDS = 120.0  # for polkit's answer, which may need a person's password; then it is a no

# requests
REQUEST_FEATURES = 1024  # names in require, optional and exact together
REASON_CHARACTERS = 1024
GENERATIONS = 1 << 53  # where JSON's numbers end for those who read them as double precision
LEASES = 16384  # contracts begun and not ended, all users
LEASES_PER_UID = 4096
LEASES_RESERVED = 4096  # above LEASES, for users of the system (SYSTEM_UIDS)
# distinct contracts of those, and sets that were reported: VMs share them, and files of CONTRACT_BYTES lie in /run
CONTRACTS = 2048
CONTRACTS_PER_UID = 512  # and above CONTRACTS for users of the system
LEASES_FINISHED = 16384  # leases ended or expired that are kept for the record
LEASE_UNSTARTED_SECONDS = 600.0  # a contract begun, held by no process and not started by then has expired
HOLDERS_PER_LEASE = 2  # a VM monitor and the one that takes its VM over
GUESTS_NAMED = 1000  # guests in one refusal, plan or progress; the rest are counted
FEATURES_NAMED = 16  # of each such guest, and in one audit record; the rest are counted
CONSENTS = 256  # combos that one commit lets leave the roll-back set
OVERRIDES = 1024  # guests that one commit passes over
PROPOSAL_SECONDS = 14 * 86400.0  # a raise that was proposed and not committed by then is aborted

# files
REPORT_BYTES = 8 * 1024 * 1024
FENCE_BYTES = 1024 * 1024
CONTRACT_BYTES = 1024 * 1024
COPY_BYTES = 16 * 1024 * 1024  # the copy beside the database: fences, roll-back set and its reports
# entries of a binary contract: CPUID (what KVM takes), MSRs, arm64 registers, words with a name, portable state,
# initialisation flags; csrc/kvmneg.h has the same
CONTRACT_ENTRIES = (256, 1024, 8192, 256, 8192, 64)
WORDS = 4096  # in one feature set
REGISTERS = 8192  # arm64 register ids in one report; KVM lists some 400
REPORTS_PER_BASELINE = 100_000

# the host
CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES
FEATURE_MSRS = 1024
TSC_KHZ = (1 << 31) - 1  # KVM scales to no higher rate on any CPU
VOLATILE_SECONDS = 1.0  # inputs that change without an event are never older at Negotiate
WATCH_POLL_SECONDS = 30.0  # between two looks at those inputs when nobody asks
WATCH_SETTLE_SECONDS = 0.1  # after a uevent or a new file: what comes with it is looked at together
WATCHED_FOLDERS = 64  # for VMMs: those of PATH and the usual ones
INOTIFY_BYTES = 64 * 1024  # of events, read in one turn of the loop
MEASURE_SECONDS = 10.0  # for measuring again; emulated hosts need a second
MEASURE_RETRY_SECONDS = 10.0  # after a measurement that hung; doubled each time
MEASURE_RETRY_MOST_SECONDS = 320.0
GUEST_SECONDS = 10.0  # for all a proof guest does in one mode; emulated hosts need a second
PROOF_SECONDS = 120  # for all guests of a proof that the daemon has made, whole seconds
PROOFS = 16  # combos whose proof is kept
APART_SECONDS = 5.0  # for the measuring unit to be started and to answer
APART_BYTES = 4 * 1024 * 1024  # of its answer
VMM_BUILDS = 64  # VMM binaries whose version is looked up
QEMU_SECONDS = 10.0  # for an installed QEMU to say what it knows, or to start paused
HISTORY_ROWS = 1000  # audit records in one reply
COMBO_ROWS = 1000  # combos ever measured in one reply
COMBOS_SEARCHED = 100_000  # combos of one host among which an asked one is looked for
ROLLBACK_COMBOS = 64  # combos that an admin wants to be able to return to
ROLLBACK_DIMENSIONS = 64  # dimensions of a combo that one question names
ROLLBACK_SETS = 64  # distinct sets of guests whose reasons one answer tells; the others' guests are named
ROLLBACK_REASON_BYTES = 1024 * 1024  # of reasons of guests in one answer; the rest are left out
IMAGE_PARTS, IMAGE_PART_BYTES = 64, 64 * 1024  # read of a saved image, to tell it from another of its size

# guests
SETS_KEPT = 1024  # distinct sets of guests that the daemon keeps read; others are read again
UEVENT_BYTES = 8 * 1024  # the kernel's own limit is 2 KiB of variables (UEVENT_BUFFER_SIZE)
UEVENTS_PER_TURN = 64  # read in one turn of the loop
UEVENT_TURNS = 64  # of those, before an answer about VMs; where more wait, all processes are looked at
LOOK_SLICE_SECONDS = 0.005  # of looking for VMs through /proc, in one turn of the loop
STRANGER_SECONDS = 2.0  # for a VM monitor that has a VM to begin its contract, before it is told of
UNKNOWN_GUESTS = 16384  # processes with a VM that nobody negotiated for
WAIVERS = 1024  # unknown guests of one boot that do not block
GUEST_NAME_CHARACTERS = 256  # of what a command line calls a guest

# what is told (kvmneg.service.journal)
EVENT_BURST = 100  # messages of one kind that clients can bring about, in EVENT_SECONDS; the rest are counted
EVENT_BURST_PER_UID = 10  # of those, by one user: nobody's are hidden by another's
EVENT_SECONDS = 60.0
EVENT_LINE_CHARACTERS = 2048  # of one line of a message
EVENT_FIELD_CHARACTERS = 4096  # of one field
