/* The matrix products around the stencil, on the causal part only: logits, reads of values, and their backward.
 * Layout of maps: common.h. Rows of queries, keys, values are [heads][length][stride], stride a multiple of the vector.
 */
#include "common.h"

enum { PANEL = VECS * LANES }; /* keys of a packed panel */
#define READ_ROWS 4
#define READ_VECS 6 /* READ_ROWS x READ_VECS accumulators */

int panel_width(void) { return PANEL; }

int lanes(void) { return LANES; }

/* Keys [heads][length][stride] to panels [heads][panels][size][PANEL], zeros past the end. */
void pack(const real *in, ptrdiff_t heads, ptrdiff_t length, ptrdiff_t in_hs, ptrdiff_t stride, ptrdiff_t size, real *out, int threads) {
    const ptrdiff_t panels = (length + PANEL - 1) / PANEL;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (ptrdiff_t head = 0; head < heads; head++)
        for (ptrdiff_t panel = 0; panel < panels; panel++) {
            real *to = out + (head * panels + panel) * size * PANEL;
            for (ptrdiff_t j = 0; j < PANEL; j++) {
                const ptrdiff_t key = panel * PANEL + j;
                const real *from = in + head * in_hs + key * stride;
                for (ptrdiff_t d = 0; d < size; d++) to[d * PANEL + j] = key < length ? from[d] : 0;
            }
        }
}

/* nr rows of queries times one panel of keys. */
INLINE void panel_product(const real *q, ptrdiff_t stride, const real *panel, ptrdiff_t size, real *out, ptrdiff_t ld, const int nr) {
    vec acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) acc[r][v] = splat(0);
    for (ptrdiff_t d = 0; d < size; d++) {
        vec x[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) x[v] = LOAD(panel + d * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) acc[r][v] += x[v] * q[r * stride + d];
    }
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) STORE(out + r * ld + v * LANES, acc[r][v]);
}

/* map[r][j] = q[r] . k[j] on the visible keys, zero elsewhere. The map needs PANEL columns of room past the last key. */
void logits(const Geometry *g, const real *q, ptrdiff_t q_hs, ptrdiff_t stride, ptrdiff_t size, const real *panels, ptrdiff_t panel_hs,
            real *map, ptrdiff_t map_hs) {
    const ptrdiff_t chunks = 4; /* of strips, for parallelism beyond the heads */
    const ptrdiff_t strips = (g->rows + STRIP - 1) / STRIP, share = (strips + chunks - 1) / chunks;
#pragma omp parallel for collapse(2) schedule(static) num_threads(g->threads) if (g->threads > 1)
    for (ptrdiff_t head = 0; head < g->groups; head++)
        for (ptrdiff_t chunk = 0; chunk < chunks; chunk++) {
            const ptrdiff_t low = chunk * share * STRIP, end = low + share * STRIP;
            const ptrdiff_t high = end < g->rows ? end : g->rows;
            if (low >= high) continue;
            const ptrdiff_t last = (g->first + high - 1) / PANEL;
            for (ptrdiff_t panel = start_of(g, head, low) / PANEL; panel <= last; panel++)
                for (ptrdiff_t top = low; top < high; top += STRIP) {
                    const ptrdiff_t nr = high - top < STRIP ? high - top : STRIP;
                    if (panel * PANEL >= g->first + top + nr) continue;
                    const real *rows = q + head * q_hs + top * stride, *keys = panels + head * panel_hs + panel * size * PANEL;
                    real *out = map + head * map_hs + top * g->ld + panel * PANEL;
                    switch (nr) { /* a tile for every number of rows: blocks seldom hold whole strips */
#define TILE(n) \
    case n: \
        panel_product(rows, stride, keys, size, out, g->ld, n < ROWS ? n : ROWS); \
        break;
                        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#undef TILE
                    }
                }
            for (ptrdiff_t row = low; row < high; row++)
                clear_outside(map + head * map_hs + row * g->ld, g, start_of(g, head, row), g->first + row + 1);
        }
}

/* out[r] = sum over j of map[r][j] * x[j], nv vectors wide. */
INLINE void read_tile(const real *map, ptrdiff_t ld, const real *x, ptrdiff_t stride, ptrdiff_t from, ptrdiff_t to, real *out,
                      ptrdiff_t out_stride, const int nr, const int nv) {
    vec acc[READ_ROWS][READ_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
    for (ptrdiff_t j = from; j < to; j++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) {
            const vec value = LOAD(x + j * stride + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < nr; r++) acc[r][v] += value * map[r * ld + j];
        }
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) STORE(out + r * out_stride + v * LANES, acc[r][v]);
}

/* y[j] += sum over r of map[r][j] * x[r] for nr keys j, nv vectors wide. */
INLINE void accumulate_tile(const real *map, ptrdiff_t ld, const real *x, ptrdiff_t stride, ptrdiff_t low, ptrdiff_t high, real *y,
                            ptrdiff_t y_stride, const int nr, const int nv) {
    vec acc[READ_ROWS][READ_VECS];
#pragma GCC unroll 8
    for (int k = 0; k < nr; k++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) acc[k][v] = splat(0);
    for (ptrdiff_t r = low; r < high; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) {
            const vec value = LOAD(x + r * stride + v * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < nr; k++) acc[k][v] += value * map[r * ld + k];
        }
#pragma GCC unroll 8
    for (int k = 0; k < nr; k++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) { /* block sums first, then the total: less rounding than one long sum */
            real *to = y + k * y_stride + v * LANES;
            STORE(to, LOAD(to) + acc[k][v]);
        }
}

/* Tiles of READ_ROWS rows, as wide as the accumulators allow; a width of n vectors goes in steps of 6, 4, 2 or 1. */
#define EACH_TILE(TILE, nr, width, offset)                              \
    for (ptrdiff_t offset = 0, tile_; offset < (width); offset += tile_) { \
        const ptrdiff_t left_ = ((width) - offset) / LANES;             \
        const int step_ = left_ == 8 ? 4 : left_ >= 6 ? 6 : left_ >= 4 ? 4 : left_ >= 2 ? 2 : 1; \
        tile_ = (ptrdiff_t)step_ * LANES;                               \
        if ((nr) == READ_ROWS && step_ == 6) { TILE(READ_ROWS, 6); }    \
        else if ((nr) == READ_ROWS && step_ == 4) { TILE(READ_ROWS, 4); } \
        else if ((nr) == READ_ROWS && step_ == 2) { TILE(READ_ROWS, 2); } \
        else if ((nr) == READ_ROWS) { TILE(READ_ROWS, 1); }             \
        else for (ptrdiff_t row_ = 0; row_ < (nr); row_++) {            \
            if (step_ == 6) { TILE(1, 6); }                             \
            else if (step_ == 4) { TILE(1, 4); }                        \
            else if (step_ == 2) { TILE(1, 2); }                        \
            else { TILE(1, 1); }                                        \
        }                                                               \
    }

/* out[r] = sum over the visible keys of map[r][j] * x[j], `width` wide: values read, or the queries' gradient. */
void read_rows(const Geometry *g, const real *map, ptrdiff_t map_hs, const real *x, ptrdiff_t x_hs, ptrdiff_t stride, ptrdiff_t width,
               real *out, ptrdiff_t out_hs, ptrdiff_t out_stride) {
    const ptrdiff_t strips = (g->rows + READ_ROWS - 1) / READ_ROWS;
#pragma omp parallel for collapse(2) schedule(static) num_threads(g->threads) if (g->threads > 1)
    for (ptrdiff_t head = 0; head < g->groups; head++)
        for (ptrdiff_t strip = 0; strip < strips; strip++) {
            const ptrdiff_t top = strip * READ_ROWS, nr = g->rows - top < READ_ROWS ? g->rows - top : READ_ROWS;
            const ptrdiff_t from = start_of(g, head, top), to = g->first + top + nr;
            const real *line = map + head * map_hs + top * g->ld, *values = x + head * x_hs;
            real *y = out + head * out_hs + top * out_stride;
            const ptrdiff_t row_ = 0;
#define READ(nr_, nv_) read_tile(line + row_ * g->ld, g->ld, values + offset, stride, from, to, y + row_ * out_stride + offset, out_stride, nr_, nv_)
            EACH_TILE(READ, nr, width, offset)
#undef READ
        }
}

/* y[j] += sum over the rows that see j of map[r][j] * x[r], `width` wide: gradient of values or keys. */
void accumulate(const Geometry *g, const real *map, ptrdiff_t map_hs, const real *x, ptrdiff_t x_hs, ptrdiff_t stride, ptrdiff_t width,
                real *y, ptrdiff_t y_hs, ptrdiff_t y_stride) {
    const ptrdiff_t columns = g->first + g->rows, strips = (columns + READ_ROWS - 1) / READ_ROWS;
#pragma omp parallel for collapse(2) schedule(static) num_threads(g->threads) if (g->threads > 1)
    for (ptrdiff_t head = 0; head < g->groups; head++)
        for (ptrdiff_t strip = 0; strip < strips; strip++) {
            const ptrdiff_t key = strip * READ_ROWS, nr = columns - key < READ_ROWS ? columns - key : READ_ROWS;
            if (key + nr <= start_of(g, head, 0)) continue;
            const ptrdiff_t low = key > g->first ? key - g->first : 0, high = g->rows;
            const real *column = map + head * map_hs + key, *rows = x + head * x_hs;
            real *into = y + head * y_hs + key * y_stride;
            const ptrdiff_t row_ = 0;
#define ADD(nr_, nv_) accumulate_tile(column + row_, g->ld, rows + offset, stride, low, high, into + row_ * y_stride + offset, y_stride, nr_, nv_)
            EACH_TILE(ADD, nr, width, offset)
#undef ADD
        }
}
