/* The same three products as products.h, of bfloat16 on a processor's matrix tiles (Intel AMX).
 *
 * A tile has 16 rows of 16 items, or 16 items of 16 columns each; a step multiplies 16 rows by 16 columns over 32 numbers. Eight tiles:
 * four hold a BLOCK of 32 x 32 sums, two its rows, two its columns. Sums down a map are taken turned, [width][rows] times [rows][keys], so
 * that weights are woven on their way and need no transposing; gradients of keys and values are turned, too.
 */
#pragma once
#include "items.h"

#if !defined(BF16) || !defined(__AMX_BF16__)
#error "no tiles of bfloat16"
#endif
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t half;
enum { TILE = 16, STEP = 32, BLOCK = 2 * TILE, WHOLE = STEP, SPAN = 128 }; /* widths are multiples of WHOLE; SPAN: keys read at a time */

/* Whether the system lends its tiles to this process, which has to ask. */
int ready(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

static void open_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = TILE * sizeof(item), shape.rows[i] = TILE;
    _tile_loadconfig(&shape);
}

INLINE ptrdiff_t whole_steps(ptrdiff_t n) { return (n + STEP - 1) / STEP * STEP; }

/* Numbers from channel to channel: of turned rows, with room for a step from any row on; of gradients of keys or values. Neither is a
 * multiple of a page, whose channels would push each other out of the first-level cache. */
ptrdiff_t turned_length(ptrdiff_t length) { return whole_steps(length) + STEP; }
ptrdiff_t gradient_length(ptrdiff_t keys) { return whole_steps(keys) + TILE; }

/* Items of a head, and numbers of a head's gradients. */
INLINE ptrdiff_t woven_items(ptrdiff_t length, ptrdiff_t width) { return items_of(whole_steps(length)) * width; }
INLINE ptrdiff_t turned_items(ptrdiff_t length, ptrdiff_t width) { return items_of(turned_length(length)) * width; }
INLINE ptrdiff_t gradient_size(ptrdiff_t keys, ptrdiff_t width) { return gradient_length(keys) * width; }

/* One side of a product: its first tile, and bytes to the next row, tile and step. */
typedef struct {
    const void *at;
    ptrdiff_t row, tile, step;
} Operand;

INLINE const void *tile_at(const Operand *o, int tile, ptrdiff_t step) { return (const char *)o->at + tile * o->tile + step * o->step; }

/* out = the product over `steps`, or added to it: nr tiles of rows, two of columns. out_ld: numbers to the next row. */
INLINE void multiply(const Operand *rows, const Operand *columns, ptrdiff_t steps, real *out, ptrdiff_t out_ld, const int nr, const int add) {
    const size_t bytes = (size_t)out_ld * sizeof(real);
    real *below = out + TILE * out_ld;
    if (add) {
        _tile_loadd(0, out, bytes);
        _tile_loadd(1, out + TILE, bytes);
        if (nr > 1) _tile_loadd(2, below, bytes);
        if (nr > 1) _tile_loadd(3, below + TILE, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (nr > 1) _tile_zero(2);
        if (nr > 1) _tile_zero(3);
    }
    for (ptrdiff_t step = 0; step < steps; step++) {
        _tile_loadd(4, tile_at(rows, 0, step), (size_t)rows->row);
        _tile_loadd(6, tile_at(columns, 0, step), (size_t)columns->row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, tile_at(columns, 1, step), (size_t)columns->row);
        _tile_dpbf16ps(1, 4, 7);
        if (nr > 1) _tile_loadd(5, tile_at(rows, 1, step), (size_t)rows->row);
        if (nr > 1) _tile_dpbf16ps(2, 5, 6);
        if (nr > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + TILE, bytes);
    if (nr > 1) _tile_stored(2, below, bytes);
    if (nr > 1) _tile_stored(3, below + TILE, bytes);
}

/* The same for n <= BLOCK rows. */
INLINE void multiply_rows(const Operand *rows, const Operand *columns, ptrdiff_t steps, real *out, ptrdiff_t out_ld, ptrdiff_t n, const int add) {
    if (n > TILE)
        multiply(rows, columns, steps, out, out_ld, 2, add);
    else
        multiply(rows, columns, steps, out, out_ld, 1, add);
}

/* Rows of n items as rows of tiles, woven rows `width` wide as their columns. */
INLINE Operand as_rows(const item *at, ptrdiff_t n) {
    return (Operand){at, n * sizeof(item), TILE * n * sizeof(item), TILE * sizeof(item)};
}

INLINE Operand as_columns(const item *at, ptrdiff_t width) {
    return (Operand){at, width * sizeof(item), TILE * sizeof(item), TILE * width * sizeof(item)};
}

/* Ask for what is multiplied or added to next: it comes from beyond the second-level cache. */
INLINE void ask_for(const void *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)at + i);
}

/* map[r][j] = q[r] . k[j] on the visible keys, zero elsewhere. */
static void logits(const Strip *s, const item *q, ptrdiff_t width, const item *panels, real *map) {
    const ptrdiff_t n = items_of(width);
    item some[BLOCK * n];
    real sums[BLOCK][BLOCK] __attribute__((aligned(64)));
    open_tiles();
    for (ptrdiff_t top = 0; top < s->rows; top += BLOCK) {
        const ptrdiff_t nr = s->rows - top < BLOCK ? s->rows - top : BLOCK;
        const int odd = nr % TILE != 0; /* a tile that is not whole would read and write rows that are not there */
        Operand rows = as_rows(q + top * n, n);
        if (odd) {
            memcpy(some, rows.at, (size_t)(nr * n) * sizeof(item));
            memset(some + nr * n, 0, (size_t)((BLOCK - nr) * n) * sizeof(item));
            rows.at = some;
        }
        for (ptrdiff_t key = start_of(s, 0) / BLOCK * BLOCK; key < s->first + top + nr; key += BLOCK) {
            const Operand columns = as_columns(panels + key / PANEL * PANEL * n + key % PANEL, PANEL);
            real *out = map + top * s->ld + key;
            if (key % PANEL == 0) ask_for(panels + (key / PANEL + 1) * PANEL * n, PANEL * n * sizeof(item));
            if (odd) {
                multiply_rows(&rows, &columns, n / TILE, sums[0], BLOCK, nr, 0);
                for (ptrdiff_t r = 0; r < nr; r++) memcpy(out + r * s->ld, sums[r], sizeof sums[r]);
            } else
                multiply_rows(&rows, &columns, n / TILE, out, s->ld, nr, 0);
        }
    }
    _tile_release();
    for (ptrdiff_t r = 0; r < s->rows; r++) clear_outside(map + r * s->ld, s, start_of(s, r), s->first + r + 1);
}

/* out[r] = sum over the visible keys of map[r][j] * x[j]: values read, or the queries' gradient. x: of a head, woven. */
static void read_rows(const Strip *s, const real *map, const item *x, ptrdiff_t width, real *out) {
    item weights[BLOCK * SPAN / PER_ITEM];
    real sums[BLOCK * width] __attribute__((aligned(64)));
    open_tiles();
    for (ptrdiff_t top = 0; top < s->rows; top += BLOCK) {
        const ptrdiff_t nr = s->rows - top < BLOCK ? s->rows - top : BLOCK, end = s->first + top + nr;
        memset(sums, 0, sizeof sums);
        for (ptrdiff_t key = start_of(s, top) / STEP * STEP; key < end; key += SPAN) {
            const ptrdiff_t columns = end - key < SPAN ? whole_steps(end - key) : SPAN;
            ptrdiff_t row;
            const Operand rows = as_rows(along(map + top * s->ld + key, s->ld, nr, columns, weights, SPAN, &row), SPAN / PER_ITEM);
            ask_for(x + (key + SPAN) / PER_ITEM * width, SPAN / PER_ITEM * width * sizeof(item));
            for (ptrdiff_t d = 0; d < width; d += BLOCK) {
                const Operand values = as_columns(x + key / PER_ITEM * width + d, width);
                multiply_rows(&rows, &values, columns / STEP, sums + d, width, nr, 1);
            }
        }
        memcpy(out + top * width, sums, (size_t)(nr * width) * sizeof(real));
    }
    _tile_release();
}

/* y[d][j] += sum over the rows that see j of map[r][j] * x[r][d]: gradient of the keys or values of a head that a segment sees, turned.
 * x: of a head, turned, `length` rows; the strip's first is row `top`. */
static void accumulate(const Strip *s, const real *map, const item *x, ptrdiff_t length, ptrdiff_t top, ptrdiff_t width, real *y,
                       ptrdiff_t seen) {
    const ptrdiff_t room = whole_steps(s->rows), row = turned_length(length) * (ptrdiff_t)sizeof(half), ld = gradient_length(seen);
    item weights[items_of(room) * BLOCK];
    memset(weights, 0, sizeof weights); /* what rows are missing to a step */
    open_tiles();
    for (ptrdiff_t key = start_of(s, 0) / BLOCK * BLOCK; key < s->first + s->rows; key += BLOCK) {
        ptrdiff_t step;
        const Operand columns = as_columns(down(map + key, s->ld, s->rows, 0, BLOCK, weights, BLOCK, &step), BLOCK);
        for (ptrdiff_t d = 0; d < width; d += BLOCK) {
            const Operand channels = {(const char *)x + d * row + top * (ptrdiff_t)sizeof(half), row, TILE * row, STEP * sizeof(half)};
            for (ptrdiff_t i = d; i < d + BLOCK; i++) ask_for(y + i * ld + key + BLOCK, BLOCK * sizeof(real));
            multiply(&channels, &columns, room / STEP, y + d * ld + key, ld, 2, 1);
        }
    }
    _tile_release();
}
