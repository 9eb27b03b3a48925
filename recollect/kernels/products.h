/* The matrix products around the stencil, of one head and a strip of its rows, on the causal part only: logits, reads of values, and
 * their backward. Rows of queries, keys and values are `stride` apart, `width` wide, a multiple of the vector.
 */
#pragma once
#include "map.h"

enum { PANEL = VECS * LANES, KEYS = 64 }; /* keys of a packed panel; keys whose values stay in the first-level cache */

/* Keys [length][stride] to panels [panels][width][PANEL], zeros past the end. */
static void pack(const real *in, ptrdiff_t length, ptrdiff_t stride, ptrdiff_t width, real *out) {
    for (ptrdiff_t first = 0; first < length; first += PANEL, out += width * PANEL)
        for (ptrdiff_t j = 0; j < PANEL; j++)
            for (ptrdiff_t d = 0; d < width; d++) out[d * PANEL + j] = first + j < length ? in[(first + j) * stride + d] : 0;
}

/* out[r] = sum over low <= n < high of weights[r * row + n * step] * x[n * stride], nr rows, nv vectors wide; added to out if `add`: the
 * new sums first, then the total, which is less rounding than one long sum. */
INLINE void tile(const real *weights, ptrdiff_t row, ptrdiff_t step, const real *x, ptrdiff_t stride, ptrdiff_t low, ptrdiff_t high, real *out,
                 ptrdiff_t out_stride, const int nr, const int nv, const int add) {
    vec acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
    for (ptrdiff_t n = low; n < high; n++) {
        vec value[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) value[v] = LOAD(x + n * stride + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
            for (int v = 0; v < nv; v++) acc[r][v] += value[v] * weights[r * row + n * step];
    }
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) {
            real *to = out + r * out_stride + v * LANES;
            STORE(to, add ? LOAD(to) + acc[r][v] : acc[r][v]);
        }
}

/* map[r][j] = q[r] . k[j] on the visible keys, zero elsewhere. */
static void logits(const Strip *s, const real *q, ptrdiff_t stride, ptrdiff_t width, const real *panels, real *map) {
    for (ptrdiff_t key = start_of(s, 0) / PANEL * PANEL; key < s->first + s->rows; key += PANEL)
        for (ptrdiff_t top = 0; top < s->rows; top += ROWS) {
            const ptrdiff_t nr = s->rows - top < ROWS ? s->rows - top : ROWS, keys = s->first + top + nr - key;
            const real *rows = q + top * stride, *panel = panels + key * width;
            real *out = map + top * s->ld + key;
            if (keys > PANEL - LANES) {
                switch (nr) { /* a tile for every number of rows: the last strip is seldom whole */
#define TILE(n)                                                                                   \
    case n:                                                                                       \
        tile(rows, stride, 1, panel, PANEL, 0, width, out, s->ld, n < ROWS ? n : ROWS, VECS, 0); \
        break;
                    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#undef TILE
                }
            } else
                for (ptrdiff_t v = 0; v < keys; v += LANES) {
                    if (nr == ROWS)
                        tile(rows, stride, 1, panel + v, PANEL, 0, width, out + v, s->ld, ROWS, 1, 0);
                    else
                        for (ptrdiff_t r = 0; r < nr; r++)
                            tile(rows + r * stride, stride, 1, panel + v, PANEL, 0, width, out + r * s->ld + v, s->ld, 1, 1, 0);
                }
        }
    for (ptrdiff_t r = 0; r < s->rows; r++) clear_outside(map + r * s->ld, s, start_of(s, r), s->first + r + 1);
}

/* Calls TILE(rows, vectors) for tiles of nr rows, `width` wide, from `offset` on; odd rows come one by one as row_. */
#define EACH_TILE(TILE, nr, width)                                        \
    for (ptrdiff_t offset = 0; offset < (width);) {                       \
        const int wide_ = (width) - offset >= VECS * LANES ? VECS : (width) - offset >= 2 * LANES ? 2 : 1; \
        if ((nr) == ROWS) {                                               \
            const ptrdiff_t row_ = 0;                                     \
            if (wide_ == VECS) { TILE(ROWS, VECS); }                      \
            else if (wide_ == 2) { TILE(ROWS, 2); }                       \
            else { TILE(ROWS, 1); }                                       \
        } else for (ptrdiff_t row_ = 0; row_ < (nr); row_++) {            \
            if (wide_ == VECS) { TILE(1, VECS); }                         \
            else if (wide_ == 2) { TILE(1, 2); }                          \
            else { TILE(1, 1); }                                          \
        }                                                                 \
        offset += wide_ * LANES;                                          \
    }

/* out[r] = sum over the visible keys of map[r][j] * x[j]: values read, or the queries' gradient. */
static void read_rows(const Strip *s, const real *map, const real *x, ptrdiff_t stride, ptrdiff_t width, real *out, ptrdiff_t out_stride) {
    for (ptrdiff_t r = 0; r < s->rows; r++) memset(out + r * out_stride, 0, (size_t)width * sizeof(real));
    for (ptrdiff_t key = start_of(s, 0); key < s->first + s->rows; key += KEYS)
        for (ptrdiff_t top = 0; top < s->rows; top += ROWS) {
            const ptrdiff_t nr = s->rows - top < ROWS ? s->rows - top : ROWS, seen = s->first + top + nr;
            const ptrdiff_t to = seen < key + KEYS ? seen : key + KEYS;
            const real *rows = map + top * s->ld;
            real *y = out + top * out_stride;
#define READ(nr_, nv_) tile(rows + row_ * s->ld, s->ld, 1, x + offset, stride, key, to, y + row_ * out_stride + offset, out_stride, nr_, nv_, 1)
            EACH_TILE(READ, nr, width)
#undef READ
        }
}

/* y[j] += sum over the rows that see j of map[r][j] * x[r]: gradient of values or keys. */
static void accumulate(const Strip *s, const real *map, const real *x, ptrdiff_t stride, ptrdiff_t width, real *y, ptrdiff_t y_stride) {
    const ptrdiff_t columns = s->first + s->rows;
    for (ptrdiff_t key = start_of(s, 0); key < columns; key += ROWS) {
        const ptrdiff_t nr = columns - key < ROWS ? columns - key : ROWS, low = key > s->first ? key - s->first : 0;
        real *into = y + key * y_stride;
#define ADD(nr_, nv_) tile(map + key + row_, 1, s->ld, x + offset, stride, low, s->rows, into + row_ * y_stride + offset, y_stride, nr_, nv_, 1)
        EACH_TILE(ADD, nr, width)
#undef ADD
    }
}
