/* The matrix products around the stencil, of one head and a strip of its rows, on the causal part only: logits, reads of values, and
 * their backward. products_tiles.h has the same for processors with matrix tiles.
 *
 * A product goes in steps, and what a lane multiplies in one is an item (items.h).
 */
#pragma once
#include "items.h"

#ifdef BF16
#define LOAD_ITEMS(p) _mm512_loadu_si512(p)
#define ADD_PRODUCT(sum, x, w) ((vec)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(x), (__m512bh)_mm512_set1_epi32((int)(w))))
typedef __m512i item_vec;
#else
#define LOAD_ITEMS(p) LOAD(p)
#define ADD_PRODUCT(sum, x, w) ((sum) + (x) * (w))
typedef vec item_vec;
#endif

enum { KEYS = 60, WHOLE = LANES }; /* keys whose values stay in the first-level cache; widths are multiples of WHOLE */
_Static_assert(KEYS % ROWS == 0 && KEYS % PER_ITEM == 0, "KEYS are whole tiles of whole items");

/* Items of a head, and numbers of a head's gradients. */
INLINE ptrdiff_t woven_items(ptrdiff_t length, ptrdiff_t width) { return items_of(length) * width; }
INLINE ptrdiff_t turned_items(ptrdiff_t length, ptrdiff_t width) { return woven_items(length, width); }
INLINE ptrdiff_t gradient_size(ptrdiff_t keys, ptrdiff_t width) { return keys * width; }

/* out[r] = sum over low <= n < high of weights[r * row + n * step] * x[n * stride], nr rows, nv vectors wide; added to out if `add`: the
 * new sums first, then the total, which is less rounding than one long sum. What a strip multiplies or adds to comes from beyond the
 * second-level cache, slowly, and the processor does not foresee it: meanwhile a line a step is asked for from `next` on. */
INLINE void tile(const item *weights, ptrdiff_t row, ptrdiff_t step, const item *x, ptrdiff_t stride, ptrdiff_t low, ptrdiff_t high, real *out,
                 ptrdiff_t out_stride, const int nr, const int nv, const int add, const char *next) {
    vec acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) __builtin_prefetch(out + r * out_stride + v * LANES, 1);
    for (ptrdiff_t n = low; n < high; n++) {
        item_vec value[VECS];
        __builtin_prefetch(next + (n - low) * LINE);
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) value[v] = LOAD_ITEMS(x + n * stride + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
            for (int v = 0; v < nv; v++) acc[r][v] = ADD_PRODUCT(acc[r][v], value[v], weights[r * row + n * step]);
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
static void logits(const Strip *s, const item *q, ptrdiff_t width, const item *panels, real *map) {
    const ptrdiff_t n = items_of(width);
    for (ptrdiff_t key = start_of(s, 0) / PANEL * PANEL; key < s->first + s->rows; key += PANEL)
        for (ptrdiff_t top = 0; top < s->rows; top += ROWS) {
            const ptrdiff_t nr = s->rows - top < ROWS ? s->rows - top : ROWS, keys = s->first + top + nr - key;
            const item *rows = q + top * n, *panel = panels + key * n;
            const char *next = (const char *)(panel + PANEL * n + top * PANEL / s->rows * n);
            real *out = map + top * s->ld + key;
            if (keys > PANEL - LANES) {
                switch (nr) { /* a tile for every number of rows: the last strip is seldom whole */
#define TILE(rows_)                                                                       \
    case rows_:                                                                           \
        tile(rows, n, 1, panel, PANEL, 0, n, out, s->ld, rows_ < ROWS ? rows_ : ROWS, VECS, 0, next); \
        break;
                    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#undef TILE
                }
            } else
                for (ptrdiff_t v = 0; v < keys; v += LANES) {
                    if (nr == ROWS)
                        tile(rows, n, 1, panel + v, PANEL, 0, n, out + v, s->ld, ROWS, 1, 0, next);
                    else
                        for (ptrdiff_t r = 0; r < nr; r++)
                            tile(rows + r * n, n, 1, panel + v, PANEL, 0, n, out + r * s->ld + v, s->ld, 1, 1, 0, next);
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

/* out[r] = sum over the visible keys of map[r][j] * x[j]: values read, or the queries' gradient. x: woven [items_of(keys)][width]. */
static void read_rows(const Strip *s, const real *map, const item *x, ptrdiff_t width, real *out) {
    item room[ROWS * room_for(KEYS) / PER_ITEM];
    memset(out, 0, (size_t)(s->rows * width) * sizeof(real));
    for (ptrdiff_t key = start_of(s, 0) / PER_ITEM * PER_ITEM; key < s->first + s->rows; key += KEYS)
        for (ptrdiff_t top = 0; top < s->rows; top += ROWS) {
            const ptrdiff_t nr = s->rows - top < ROWS ? s->rows - top : ROWS, seen = s->first + top + nr - key;
            const ptrdiff_t columns = seen < KEYS ? seen : KEYS, n = items_of(columns);
            if (columns <= 0) continue;
            ptrdiff_t row;
            const item *weights = along(map + top * s->ld + key, s->ld, nr, columns, room, room_for(KEYS), &row), *from = x + key / PER_ITEM * width;
            real *y = out + top * width;
            const char *next = (const char *)(from + KEYS / PER_ITEM * width + top * KEYS / s->rows / PER_ITEM * width);
#define READ(nr_, nv_)                                                                                                        \
    tile(weights + row_ * row, row, 1, from + offset, width, 0, n, y + row_ * width + offset, width, nr_, nv_, 1,                 \
         next + offset / (VECS * LANES) * n * LINE)
            EACH_TILE(READ, nr, width)
#undef READ
        }
}

/* y[j] += sum over the rows that see j of map[r][j] * x[r]: gradient of values or keys. x: of a head, woven, `length` rows; the strip's
 * first is row `top`, which may be the second of an item. */
static void accumulate(const Strip *s, const real *map, const item *x, ptrdiff_t length, ptrdiff_t top, ptrdiff_t width, real *y,
                       ptrdiff_t seen) {
    const ptrdiff_t odd = top % PER_ITEM, columns = s->first + s->rows, n = items_of(odd + s->rows);
    (void)length, (void)seen;
    x += top / PER_ITEM * width;
    item room[n * room_for(KEYS)];
    for (ptrdiff_t first = start_of(s, 0); first < columns; first += KEYS) {
        const ptrdiff_t last = columns - first < KEYS ? columns : first + KEYS;
        ptrdiff_t step;
        const item *weights = down(map + first, s->ld, s->rows, odd, last - first, room, room_for(KEYS), &step);
        for (ptrdiff_t key = first; key < last; key += ROWS) {
            const ptrdiff_t nr = last - key < ROWS ? last - key : ROWS, low = key > s->first ? (key - s->first + odd) / PER_ITEM : 0;
            const item *part = weights + key - first;
            real *into = y + key * width;
            const char *next = (const char *)(into + ROWS * width);
#define ADD(nr_, nv_)                                                                                         \
    tile(part + row_, 1, step, x + offset, width, low, n, into + row_ * width + offset, width, nr_, nv_, 1, \
         next + offset / (VECS * LANES) * n * LINE)
            EACH_TILE(ADD, nr, width)
#undef ADD
        }
    }
}
