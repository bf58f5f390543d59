/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the Python extension has: libkvmneg's header, and of libc what Python lacks. */
#include "kvmneg.h"
#ifdef KVMNEG_CDEF
int inotify_init1(int flags);
int inotify_add_watch(int fd, const char *pathname, uint32_t mask);
#else
#include <sys/inotify.h>
#endif
