/* A map of weights or logits, and a strip of its rows.
 *
 * Layout. A map is [heads][rows][ld]; column j stands at index j of the pointers passed in (they point past the left padding), and
 * everything outside the visible keys, padding included, holds zeros: they are why the stencil needs no masks. Row r of a strip is the
 * query at position first + r; it sees keys start[r] .. first + r (start = NULL: from 0).
 */
#pragma once
#include "common.h"

enum { LINEAR, SOFTMAX, SOFTMAX_KNOWN }; /* what a side ends with: nothing, a softmax, one whose log-sum-exp is known */
enum { MIXED = 4 };                      /* rows and columns of a head matrix' gradient that are summed at a time */

typedef struct {
    ptrdiff_t rows, first;  /* rows of the strip, position of the first */
    ptrdiff_t ld, pad;      /* row stride; zeros kept left and right of the columns */
    ptrdiff_t end;          /* no strip that reads these rows reads further right */
    ptrdiff_t left;         /* keys reached to the left of the current one */
    const int64_t *start;   /* of the first row on, also past the strip; NULL: all zero */
} Strip;

INLINE ptrdiff_t start_of(const Strip *s, ptrdiff_t row) { return s->start ? s->start[row] : 0; }

/* Zero a row outside [low, high), from -pad to the end. */
INLINE void clear_outside(real *row, const Strip *s, ptrdiff_t low, ptrdiff_t high) {
    memset(row - s->pad, 0, (size_t)(low + s->pad) * sizeof(real));
    memset(row + high, 0, (size_t)(s->end - high) * sizeof(real));
}

/* The vectors of columns that nr rows from row `top` on see: first column, and one past the last. */
INLINE ptrdiff_t span_from(const Strip *s, ptrdiff_t top) { return start_of(s, top) / LANES * LANES; }

INLINE ptrdiff_t span_to(const Strip *s, ptrdiff_t from, ptrdiff_t top, ptrdiff_t nr) {
    return from + (s->first + top + nr - from + LANES - 1) / LANES * LANES;
}
