/* What products of a map multiply: an item is a number, or with BF16 two of bfloat16, whose products are summed in fp32.
 *
 * Rows of queries are items of neighbouring columns; where rows are summed over they are woven: items of neighbouring rows. Weights are
 * always fp32 in their map and become items for a tile at a time. `width` counts numbers, a multiple of the vector.
 */
#pragma once
#include "map.h"

#ifdef BF16
#ifndef __AVX512BF16__
#error "this processor multiplies no bfloat16"
#endif
#include <immintrin.h>
typedef uint32_t item;
enum { PER_ITEM = 2 };
#else
typedef real item;
enum { PER_ITEM = 1 };
#endif

enum { PANEL = VECS * LANES }; /* keys of a packed panel */
enum { LINE = 64 };            /* bytes of a cache line */

INLINE ptrdiff_t items_of(ptrdiff_t numbers) { return (numbers + PER_ITEM - 1) / PER_ITEM; }

/* Keys [length][items_of(width)] to panels [panels][items_of(width)][PANEL], zeros past the end. */
static void pack(const item *in, ptrdiff_t length, ptrdiff_t width, item *out) {
    const ptrdiff_t n = items_of(width);
    for (ptrdiff_t first = 0; first < length; first += PANEL, out += n * PANEL)
        for (ptrdiff_t j = 0; j < PANEL; j++)
            for (ptrdiff_t d = 0; d < n; d++) out[d * PANEL + j] = first + j < length ? in[(first + j) * n + d] : 0;
}

/* Weights of nr rows and some columns of a map as items, `*row` apart from row to row and `*step` from step to step: of neighbouring
 * columns (along), or of neighbouring rows (down), the first of which comes `odd` rows before the map's. BF16 fills `room`, whose rows have
 * `wide` columns: the next multiple of two vectors. */
#ifdef BF16
INLINE ptrdiff_t room_for(ptrdiff_t columns) { return (columns + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

static const item *along(const real *map, ptrdiff_t ld, ptrdiff_t nr, ptrdiff_t columns, item *room, ptrdiff_t wide, ptrdiff_t *row) {
    *row = wide / PER_ITEM;
    for (ptrdiff_t r = 0; r < nr; r++)
        for (ptrdiff_t j = 0; j < columns; j += 2 * LANES) {
            const __m512 low = (__m512)LOAD(map + r * ld + j);
            const __m512 high = j + LANES < columns ? (__m512)LOAD(map + r * ld + j + LANES) : _mm512_setzero_ps();
            _mm512_storeu_si512(room + r * *row + j / PER_ITEM, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    return room;
}

INLINE __m512i lower_halves(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

static const item *down(const real *map, ptrdiff_t ld, ptrdiff_t nr, ptrdiff_t odd, ptrdiff_t columns, item *room, ptrdiff_t wide,
                        ptrdiff_t *step) {
    *step = wide;
    for (ptrdiff_t r = -odd; r < nr; r += PER_ITEM) {
        const real *even = map + r * ld, *next = even + ld;
        item *to = room + (r + odd) / PER_ITEM * wide;
        for (ptrdiff_t j = 0; j < columns; j += LANES) {
            const __m512i low = lower_halves(r < 0 ? _mm512_setzero_ps() : (__m512)LOAD(even + j));
            const __m512i high = lower_halves(r + 1 < nr ? (__m512)LOAD(next + j) : _mm512_setzero_ps());
            _mm512_storeu_si512(to + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
    return room;
}
#else
INLINE ptrdiff_t room_for(ptrdiff_t columns) { return (void)columns, PER_ITEM; }

INLINE const item *along(const real *map, ptrdiff_t ld, ptrdiff_t nr, ptrdiff_t columns, item *room, ptrdiff_t wide, ptrdiff_t *row) {
    (void)nr, (void)columns, (void)room, (void)wide;
    *row = ld;
    return map;
}

INLINE const item *down(const real *map, ptrdiff_t ld, ptrdiff_t nr, ptrdiff_t odd, ptrdiff_t columns, item *room, ptrdiff_t wide,
                        ptrdiff_t *step) {
    (void)nr, (void)odd, (void)columns, (void)room, (void)wide;
    *step = ld;
    return map;
}
#endif
