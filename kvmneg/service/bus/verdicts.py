# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why polkit did not permit something, in the journal's words: what the daemon and its child say alike."""

DENIED = "polkit did not permit it"
NEEDS_PERSON = "polkit would ask for a password, and the caller did not allow that"
NO_AGENT = "polkit would ask for a password, and has no agent that could"
LATE = "polkit did not answer in time"
OFF = "D-Bus is off, so polkit was not asked"
NO_BUS = "there is no bus, so polkit was not asked"
ENDED = "its process has ended, so polkit was not asked"
ONEWAY = "it wants no answer, so polkit was not asked"
GONE = "what asks it ended while polkit was asked"
