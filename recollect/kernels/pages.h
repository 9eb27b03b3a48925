/* Large pages for fresh buffers. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Ask for large pages: a fresh buffer of small ones costs a fault per 4 KiB, a tenth of the time of a memory's step. */
static inline void large_pages(void *buffer, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, low = ((uintptr_t)buffer + page - 1) / page * page, high = ((uintptr_t)buffer + bytes) / page * page;
    if (low < high) madvise((void *)low, high - low, MADV_HUGEPAGE);
#endif
    (void)buffer, (void)bytes;
}
