/* One side of Multi-Token Attention on a strip of query rows: convolution over queries and keys, then head mixing, then (before the
 * softmax) the softmax; and the backward of that side. Called by attention.c. Oracle: recollect/ops/multi_token.py, `materialized`.
 *
 * Compiled once per shape of the mixing and cached (compile.py):
 *   CQ, CK   kernel size in queries and keys; CQ = 0: this side has no convolution
 *   CH       heads mixed together; CH = 1: this side has no head mixing
 */
#include "map.h"

#if CQ > 0
#define HALO (CQ - 1)
#else
#define HALO 0
#endif

#if CQ > 0
/* out[r][c] = sum over (k, b) of kernel[k][b] * in[r + k][c + b]: nr rows, of which `keep` are written, nv vectors of columns. */
INLINE void stencil(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t out_ld, ptrdiff_t keep, const int nr,
                    const int nv) {
    vec acc[ROWS][VECS];
#pragma GCC unroll 16
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
#pragma GCC unroll 16
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) __builtin_prefetch(out + r * out_ld + v * LANES, 1);
#pragma GCC unroll 40
    for (int row = 0; row < nr + CQ - 1; row++) {
        const real *line = in + row * in_ld;
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) __builtin_prefetch(line + CK - 1 + (nv + v) * LANES); /* of the next columns */
        for (int b = 0; b < CK; b++) {
            vec x[VECS];
#pragma GCC unroll 8
            for (int v = 0; v < nv; v++) {
                x[v] = LOAD(line + b + v * LANES);
                HOLD(x[v]);
            }
#pragma GCC unroll 16
            for (int r = 0; r < nr; r++) {
                if (row - r < 0 || row - r >= CQ) continue;
                vec weight = splat(kernel[(row - r) * CK + b]);
#pragma GCC unroll 8
                for (int v = 0; v < nv; v++) acc[r][v] += x[v] * weight;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < nr; r++)
        if (r < keep)
#pragma GCC unroll 8
            for (int v = 0; v < nv; v++) STORE(out + r * out_ld + v * LANES, acc[r][v]);
}

/* One row of the same with only rows k = low .. high of the kernel: where a document begins inside the window. */
static void stencil_cut(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t width, ptrdiff_t low, ptrdiff_t high) {
    for (ptrdiff_t c = 0; c < width; c += LANES) {
        vec acc = splat(0);
        for (ptrdiff_t k = low; k < high; k++)
            for (int b = 0; b < CK; b++) acc += LOAD(in + k * in_ld + c + b) * kernel[k * CK + b];
        STORE(out + c, acc);
    }
}

/* `keep` of nr rows, known at compile time, of the convolution, `width` columns (a multiple of LANES). */
INLINE void stencil_columns(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t out_ld, ptrdiff_t keep,
                            ptrdiff_t width, const int nr) {
    ptrdiff_t c = 0;
    for (; c + VECS * LANES <= width; c += VECS * LANES) stencil(in + c, in_ld, kernel, out + c, out_ld, keep, nr, VECS);
    for (; c < width; c += LANES) stencil(in + c, in_ld, kernel, out + c, out_ld, keep, nr, 1);
}

/* Rows 0 .. nr <= ROWS of the convolution. The map has room for ROWS + HALO: more rows may be read than are written. */
__attribute__((noinline)) /* by itself it has all registers */
static void stencil_span(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t out_ld, ptrdiff_t nr, ptrdiff_t width) {
    if (nr > ROWS / 2)
        stencil_columns(in, in_ld, kernel, out, out_ld, nr, width, ROWS);
    else if (nr > 1)
        stencil_columns(in, in_ld, kernel, out, out_ld, nr, width, ROWS / 2);
    else
        for (ptrdiff_t r = 0; r < nr; r++) stencil_columns(in + r * in_ld, in_ld, kernel, out + r * out_ld, out_ld, 1, width, 1);
}
#endif

#if CH > 1
/* out[o] = sum over p of matrix[o][p] * in[p] on one vector of columns of every head. */
INLINE void mix_vector(const real *in, ptrdiff_t in_hs, const real *matrix, real *out, ptrdiff_t out_hs) {
    vec y[CH];
#pragma GCC unroll 4
    for (int o = 0; o < CH; o += 4) {
        vec acc[4] = {splat(0), splat(0), splat(0), splat(0)};
#pragma GCC unroll 64
        for (int p = 0; p < CH; p++) {
            vec x = LOAD(in + p * in_hs);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                if (o + i < CH) acc[i] += x * matrix[(o + i) * CH + p];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            if (o + i < CH) y[o + i] = acc[i];
    }
#pragma GCC unroll 64
    for (int o = 0; o < CH; o++) STORE(out + o * out_hs, y[o]);
}
#endif

/* Finish a row whose columns from .. to are computed, of which low .. high are visible. */
INLINE void finish_row(real *row, const Strip *s, ptrdiff_t low, ptrdiff_t high, ptrdiff_t from, ptrdiff_t to, int mode, real *lse) {
    if (mode != LINEAR) {
        const real none = -(real)INFINITY;
        for (ptrdiff_t j = from; j < low; j++) row[j] = none;
        for (ptrdiff_t j = high; j < to; j++) row[j] = none;
        real shift = *lse;
        if (mode == SOFTMAX) {
            vec top = splat(none);
            for (ptrdiff_t j = from; j < to; j += LANES) {
                vec x = LOAD(row + j);
                uvec more = (uvec)(x > top);
                top = (vec)(((uvec)x & more) | ((uvec)top & ~more));
            }
            shift = top[0];
            for (int i = 1; i < LANES; i++) shift = top[i] > shift ? top[i] : shift;
        }
        vec total = splat(0), minus = splat(shift);
        for (ptrdiff_t j = from; j < to; j += LANES) {
            vec y = exp_of(LOAD(row + j) - minus);
            total += y;
            STORE(row + j, y);
        }
        if (mode == SOFTMAX) {
            real sum = sum_of(total), scale = 1 / sum;
            for (ptrdiff_t j = from; j < to; j += LANES) STORE(row + j, LOAD(row + j) * scale);
            *lse = shift + (real)log(sum);
        }
    }
    clear_outside(row, s, low, high);
}

/* Forward of CH heads.
 *   in      row 0 is HALO rows above the strip; in_hs, out_hs, mid_hs: elements between heads
 *   kernel  [CH][CQ][CK]; matrix [CH][CH]
 *   out     result; mid: the convolution alone, kept for the matrix's gradient (NULL: not wanted)
 *   mode    LINEAR: zeros outside; SOFTMAX: of each row, its log-sum-exp to lse [heads][lse_hs]; SOFTMAX_KNOWN: with that lse
 */
void forward(const Strip *s, const real *in, ptrdiff_t in_hs, const real *kernel, const real *matrix, real *out, ptrdiff_t out_hs,
             real *mid, ptrdiff_t mid_hs, int mode, real *lse, ptrdiff_t lse_hs) {
    for (ptrdiff_t top = 0; top < s->rows; top += ROWS) {
        const ptrdiff_t nr = s->rows - top < ROWS ? s->rows - top : ROWS;
        const ptrdiff_t from = span_from(s, top), to = span_to(s, from, top, nr);
        const real *source = in + top * s->ld;
#if CQ > 0
        const int cut = start_of(s, top + nr - 1) > s->first + top - HALO && start_of(s, top + nr - 1) > 0;
#endif
        enum { WIDE = VECS * LANES };
        real work[CH][ROWS][WIDE] __attribute__((aligned(64)));
        for (ptrdiff_t c = from; c < to; c += WIDE) {
            const ptrdiff_t width = to - c < WIDE ? to - c : WIDE;
            for (int h = 0; h < CH; h++) {
#if CQ > 0
                const real *taps = kernel + h * CQ * CK, *window = source + h * in_hs + c - s->left;
                if (!cut)
                    stencil_span(window, s->ld, taps, work[h][0], WIDE, nr, width);
                else
                    for (ptrdiff_t r = 0; r < nr; r++) {
                        ptrdiff_t low = start_of(s, top + r) - (s->first + top + r - HALO);
                        stencil_cut(window + r * s->ld, s->ld, taps, work[h][r], width, low > 0 ? low : 0, CQ);
                    }
#else
                for (ptrdiff_t r = 0; r < nr; r++) memcpy(work[h][r], source + h * in_hs + r * s->ld + c, (size_t)width * sizeof(real));
#endif
            }
            for (ptrdiff_t r = 0; r < nr; r++) {
                real *to_out = out + (top + r) * s->ld + c;
#if CH > 1
                for (ptrdiff_t v = 0; v < width; v += LANES) { /* and ask for where the next columns go */
                    mix_vector(work[0][r] + v, ROWS * WIDE, matrix, to_out + v, out_hs);
                    for (int h = 0; h < CH; h++) __builtin_prefetch(to_out + h * out_hs + v + WIDE, 1);
                }
                for (int h = 0; mid && h < CH; h++) {
                    real *to_mid = mid + h * mid_hs + (top + r) * s->ld + c;
                    for (ptrdiff_t v = 0; v < width; v += LANES) {
                        STORE(to_mid + v, LOAD(work[h][r] + v));
                        __builtin_prefetch(to_mid + v + WIDE, 1);
                    }
                }
#else
                memcpy(to_out, work[0][r], (size_t)width * sizeof(real));
#endif
            }
        }
        for (int h = 0; mid && h < CH; h++)
            for (ptrdiff_t r = 0; r < nr; r++) clear_outside(mid + h * mid_hs + (top + r) * s->ld, s, from, to);
        for (int h = 0; h < CH; h++)
            for (ptrdiff_t r = 0; r < nr; r++)
                finish_row(out + h * out_hs + (top + r) * s->ld, s, start_of(s, top + r), s->first + top + r + 1, from, to, mode,
                           lse ? lse + h * lse_hs + top + r : &(real){0});
    }
}

#if CH > 1
/* sums [CH][CH][LANES] += a[o] * b[p] on one row, for MIXED output heads from `o` on and as many input heads from `p` on. */
INLINE void mix_gradient_tile(const real *a, ptrdiff_t a_hs, const real *b, ptrdiff_t b_hs, ptrdiff_t from, ptrdiff_t to, ptrdiff_t ld, int o, int p,
                              real *sums) {
    const real *left[MIXED], *right[MIXED];
    vec acc[MIXED][MIXED];
#pragma GCC unroll 4
    for (int i = 0; i < MIXED; i++) {
        left[i] = a + (o + i < CH ? o + i : 0) * a_hs;
        right[i] = b + (p + i < CH ? p + i : 0) * b_hs;
#pragma GCC unroll 4
        for (int k = 0; k < MIXED; k++) acc[i][k] = splat(0);
    }
    const real *next_left = left[p / MIXED % MIXED] + ld, *next_right = right[o / MIXED % MIXED] + ld;
    for (ptrdiff_t j = from; j < to; j += LANES) {
        vec x[MIXED], y[MIXED];
        __builtin_prefetch(next_left + j);
        __builtin_prefetch(next_right + j);
#pragma GCC unroll 4
        for (int i = 0; i < MIXED; i++) x[i] = LOAD(left[i] + j), y[i] = LOAD(right[i] + j);
#pragma GCC unroll 4
        for (int i = 0; i < MIXED; i++)
#pragma GCC unroll 4
            for (int k = 0; k < MIXED; k++) acc[i][k] += x[i] * y[k];
    }
#pragma GCC unroll 4
    for (int i = 0; i < MIXED; i++)
#pragma GCC unroll 4
        for (int k = 0; k < MIXED; k++)
            if (o + i < CH && p + k < CH) {
                real *total = sums + ((o + i) * CH + p + k) * LANES;
                STORE(total, LOAD(total) + acc[i][k]);
            }
}

/* What the output heads first .. last, of MIXED each, give to the matrix's gradient: sums [CH][CH][LANES] += grad[o] * mid[p]; mid: the
 * mixing's input. Row by row, since every pair of heads reads them; meanwhile the next row is asked for. */
void mix_gradient(const Strip *s, const real *grad, ptrdiff_t grad_hs, const real *mid, ptrdiff_t mid_hs, int first, int last, real *sums) {
    const ptrdiff_t from = span_from(s, 0), to = span_to(s, from, 0, s->rows);
    for (ptrdiff_t r = 0; r < s->rows; r++)
        for (int o = first * MIXED; o < last * MIXED; o += MIXED)
            for (int p = 0; p < CH; p += MIXED)
                mix_gradient_tile(grad + r * s->ld, grad_hs, mid + r * s->ld, mid_hs, from, to, s->ld, o, p, sums);
}

/* Backward of the head mixing of CH heads, in place: grad := matrix^T grad. grad is zero outside the visible keys and stays so.
 *   transposed  [CH][CH], row = input head
 */
void mix_backward(const Strip *s, real *grad, ptrdiff_t grad_hs, const real *transposed) {
    const ptrdiff_t from = span_from(s, 0), to = span_to(s, from, 0, s->rows);
    for (ptrdiff_t r = 0; r < s->rows; r++)
        for (ptrdiff_t j = from; j < to; j += LANES)
            mix_vector(grad + r * s->ld + j, grad_hs, transposed, grad + r * s->ld + j, grad_hs);
}
#endif

#if CQ > 0
/* Sums of in[i][j + b - left] * grad[i + HALO - k][j] for b0 <= b < b0 + nb, every k, added to sums [CQ][CK][LANES]. */
INLINE void correlate_taps(const Strip *s, const real *in, const real *grad, ptrdiff_t low, real *sums, const int b0, const int nb) {
    enum { WIDE = 512 };
    static const real zeros[WIDE + 64];
    const ptrdiff_t columns = s->first + s->rows + HALO; /* of the last row of grad */
    vec acc[CQ][4];
#pragma GCC unroll 40
    for (int k = 0; k < CQ; k++)
#pragma GCC unroll 4
        for (int b = 0; b < nb; b++) acc[k][b] = splat(0);
    for (ptrdiff_t c = start_of(s, low) / LANES * LANES; c < columns; c += WIDE)
        for (ptrdiff_t row = 0; row < s->rows; row++) {
            const ptrdiff_t position = s->first + row;
            ptrdiff_t end = position + s->left + 1; /* further right, `in` is zero; past the last column, `grad` is (and the map may end) */
            end = end < s->ld - 2 * s->pad ? end : s->ld - 2 * s->pad;
            end = end < c + WIDE ? end : c + WIDE;
            const real *below[CQ]; /* the rows of grad that read it */
#pragma GCC unroll 40
            for (int k = 0; k < CQ; k++) {
                const ptrdiff_t r = row + HALO - k;
                below[k] = r >= low && position >= start_of(s, r) ? grad + r * s->ld + c : zeros;
            }
            const real *line = in + row * s->ld + b0 - s->left;
            for (ptrdiff_t j = c; j < end; j += LANES) {
                vec d[CQ];
                if (b0 == 0) { /* the next row, which the first taps are the first to read */
                    __builtin_prefetch(line + s->ld + j);
                    __builtin_prefetch(grad + (row + HALO + 1) * s->ld + j);
                }
#pragma GCC unroll 40
                for (int k = 0; k < CQ; k++) {
                    d[k] = LOAD(below[k] + (j - c));
                    if (CQ <= 6) HOLD(d[k]);
                }
#pragma GCC unroll 4
                for (int b = 0; b < nb; b++) {
                    vec x = LOAD(line + j + b);
#pragma GCC unroll 40
                    for (int k = 0; k < CQ; k++) acc[k][b] += d[k] * x;
                }
            }
        }
#pragma GCC unroll 40
    for (int k = 0; k < CQ; k++)
#pragma GCC unroll 4
        for (int b = 0; b < nb; b++) {
            real *total = sums + (k * CK + b0 + b) * LANES;
            STORE(total, LOAD(total) + acc[k][b]);
        }
}

/* What the strip's rows of the convolution's input give to the kernel's gradient, one head.
 *   in    the strip's rows; grad: gradient of the output from the same row on, HALO rows more
 *   low   rows of grad before this one are not there
 */
void correlate(const Strip *s, const real *in, const real *grad, ptrdiff_t low, real *sums) {
#pragma GCC unroll 16
    for (int b = 0; b < CK; b += 4) {
        if (CK - b >= 4) correlate_taps(s, in, grad, low, sums, b, 4);
        if (CK - b == 3) correlate_taps(s, in, grad, low, sums, b, 3);
        if (CK - b == 2) correlate_taps(s, in, grad, low, sums, b, 2);
        if (CK - b == 1) correlate_taps(s, in, grad, low, sums, b, 1);
    }
}
#endif

/* Backward of the convolution, one head.
 *   grad     [rows + HALO][ld], gradient of its output
 *   flipped  [CQ][CK], the kernel turned by 180 degrees
 *   grad_in  receives the gradient of the strip's rows (may be `grad` if CQ = 0)
 *   weights  NULL, or the softmax that the input is: grad_in then becomes the gradient of the softmax's input
 */
void convolution_backward(const Strip *s, const real *grad, const real *flipped, real *grad_in, const real *weights) {
    for (ptrdiff_t top = 0; top < s->rows; top += ROWS) {
        const ptrdiff_t nr = s->rows - top < ROWS ? s->rows - top : ROWS;
        const ptrdiff_t from = span_from(s, top), to = span_to(s, from, top, nr);
        real *y = grad_in + top * s->ld;
#if CQ > 0
        const real *window = grad + top * s->ld + from - (CK - 1 - s->left);
        /* does a query below, reading these rows, belong to a later document? */
        if (start_of(s, top + nr - 1 + HALO) <= s->first + top)
            stencil_span(window, s->ld, flipped, y + from, s->ld, nr, to - from);
        else
            for (ptrdiff_t r = 0; r < nr; r++) {
                ptrdiff_t high = 1;
                while (high < CQ && start_of(s, top + r + high) <= s->first + top + r) high++;
                stencil_cut(window + r * s->ld, s->ld, flipped, y + r * s->ld + from, to - from, 0, high);
            }
#endif
        for (ptrdiff_t r = 0; r < nr; r++) {
            real *row = y + r * s->ld;
            clear_outside(row, s, start_of(s, top + r), s->first + top + r + 1);
            if (!weights) continue;
            const real *p = weights + (top + r) * s->ld;
            vec total = splat(0);
            for (ptrdiff_t j = from; j < to; j += LANES) total += LOAD(p + j) * LOAD(row + j);
            const vec mean = splat(sum_of(total));
            for (ptrdiff_t j = from; j < to; j += LANES) STORE(row + j, LOAD(p + j) * (LOAD(row + j) - mean));
        }
    }
}
