/* One side of Multi-Token Attention on a block of query rows: convolution over queries and keys, then head mixing, then (before the
 * softmax) the softmax; and the backward of that side. Oracle: recollect/ops/multi_token.py, `materialized`.
 *
 * Compiled once per shape of the mixing and cached (compile.py):
 *   CQ, CK   kernel size in queries and keys; CQ = 0: this side has no convolution
 *   CH       heads mixed together; CH = 1: this side has no head mixing
 * Maps are laid out as in common.h: the zeros outside the visible keys are why the stencil needs no masks. Heads of a group are
 * consecutive; a task is a group.
 */
#include "common.h"

#if CQ > 0
#define HALO (CQ - 1)
#else
#define HALO 0
#endif

#if CQ > 0
/* out[r][c] = sum over (k, b) of kernel[k][b] * in[r + k][c + b]: nr rows, nv vectors of columns, both known at compile time. */
INLINE void stencil(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t out_ld, const int nr, const int nv) {
    vec acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
#pragma GCC unroll 40
    for (int row = 0; row < nr + CQ - 1; row++) {
        const real *line = in + row * in_ld;
        for (int b = 0; b < CK; b++) {
            vec x[VECS];
#pragma GCC unroll 8
            for (int v = 0; v < nv; v++) x[v] = LOAD(line + b + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < nr; r++) {
                if (row - r < 0 || row - r >= CQ) continue;
                vec weight = splat(kernel[(row - r) * CK + b]);
#pragma GCC unroll 8
                for (int v = 0; v < nv; v++) acc[r][v] += x[v] * weight;
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
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

#define HALF (ROWS / 2)

/* nr rows, known at compile time, of the convolution, `width` columns (a multiple of LANES). */
INLINE void stencil_columns(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t out_ld, ptrdiff_t width,
                            const int nr) {
    ptrdiff_t c = 0;
    for (; c + VECS * LANES <= width; c += VECS * LANES) stencil(in + c, in_ld, kernel, out + c, out_ld, nr, VECS);
    for (; c < width; c += LANES) stencil(in + c, in_ld, kernel, out + c, out_ld, nr, 1);
}

/* Rows 0 .. nr <= ROWS of the convolution: a whole strip, or the last rows of a block as half a strip, then one by one. */
static void stencil_span(const real *in, ptrdiff_t in_ld, const real *kernel, real *out, ptrdiff_t out_ld, ptrdiff_t nr, ptrdiff_t width) {
    if (nr == ROWS) {
        stencil_columns(in, in_ld, kernel, out, out_ld, width, ROWS);
        return;
    }
    if (nr >= HALF) {
        stencil_columns(in, in_ld, kernel, out, out_ld, width, HALF);
        in += HALF * in_ld, out += HALF * out_ld, nr -= HALF;
    }
    for (ptrdiff_t r = 0; r < nr; r++) stencil_columns(in + r * in_ld, in_ld, kernel, out + r * out_ld, out_ld, width, 1);
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

enum { LINEAR = 0, SOFTMAX = 1, SOFTMAX_KNOWN = 2 };

/* Finish a row of `width` computed columns of which low .. high are visible. */
INLINE void finish_row(real *row, const Geometry *g, ptrdiff_t low, ptrdiff_t high, ptrdiff_t from, ptrdiff_t to, int mode, real *lse) {
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
    clear_outside(row, g, low, high);
}

/* Forward of one side.
 *   in      row 0 is HALO rows above the block; in_hs, out_hs, mid_hs: elements between heads
 *   kernel  [heads of a batch element][CQ][CK]; matrix [groups of a batch element][CH][CH]
 *   out     result; mid: the convolution alone, kept for the matrix's gradient (NULL: not wanted)
 *   mode    LINEAR: zeros outside; SOFTMAX: of each row, its log-sum-exp to lse [heads][lse_hs]; SOFTMAX_KNOWN: with that lse
 */
void forward(const Geometry *g, const real *in, ptrdiff_t in_hs, const real *kernel, const real *matrix, real *out, ptrdiff_t out_hs,
             real *mid, ptrdiff_t mid_hs, int mode, real *lse, ptrdiff_t lse_hs) {
    const ptrdiff_t strips = (g->rows + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) schedule(static) num_threads(g->threads) if (g->threads > 1)
    for (ptrdiff_t group = 0; group < g->groups; group++)
        for (ptrdiff_t strip = 0; strip < strips; strip++) {
            const ptrdiff_t top = strip * STRIP, nr = g->rows - top < STRIP ? g->rows - top : STRIP, head = group * CH;
            const ptrdiff_t from = span_from(g, group, top), to = span_to(g, from, top, nr);
            const real *source = in + head * in_hs + top * g->ld;
#if CQ > 0
            const int cut = start_of(g, group, top + nr - 1) > g->first + top - HALO && start_of(g, group, top + nr - 1) > 0;
#endif
            enum { WIDE = VECS * LANES };
            real work[CH][ROWS][WIDE] __attribute__((aligned(64)));
            for (ptrdiff_t c = from; c < to; c += WIDE) {
                const ptrdiff_t width = to - c < WIDE ? to - c : WIDE;
                for (int h = 0; h < CH; h++) {
#if CQ > 0
                    const real *taps = kernel + (group % g->per_batch * CH + h) * CQ * CK;
                    const real *window = source + h * in_hs + c - g->left;
                    if (!cut)
                        stencil_span(window, g->ld, taps, work[h][0], WIDE, nr, width);
                    else
                        for (ptrdiff_t r = 0; r < nr; r++) {
                            ptrdiff_t low = start_of(g, group, top + r) - (g->first + top + r - HALO);
                            stencil_cut(window + r * g->ld, g->ld, taps, work[h][r], width, low > 0 ? low : 0, CQ);
                        }
#else
                    for (ptrdiff_t r = 0; r < nr; r++)
                        memcpy(work[h][r], source + h * in_hs + r * g->ld + c, (size_t)width * sizeof(real));
#endif
                }
                for (ptrdiff_t r = 0; r < nr; r++) {
                    real *to_out = out + head * out_hs + (top + r) * g->ld + c;
#if CH > 1
                    for (ptrdiff_t v = 0; v < width; v += LANES)
                        mix_vector(work[0][r] + v, ROWS * WIDE, matrix + group % g->per_batch * CH * CH, to_out + v, out_hs);
                    if (mid)
                        for (int h = 0; h < CH; h++)
                            memcpy(mid + (head + h) * mid_hs + (top + r) * g->ld + c, work[h][r], (size_t)width * sizeof(real));
#else
                    memcpy(to_out, work[0][r], (size_t)width * sizeof(real));
#endif
                }
            }
            for (int h = 0; mid && h < CH; h++)
                for (ptrdiff_t r = 0; r < nr; r++) clear_outside(mid + (head + h) * mid_hs + (top + r) * g->ld, g, from, to);
            for (int h = 0; h < CH; h++)
                for (ptrdiff_t r = 0; r < nr; r++)
                    finish_row(out + (head + h) * out_hs + (top + r) * g->ld, g, start_of(g, group, top + r), g->first + top + r + 1,
                               from, to, mode, lse ? lse + (head + h) * lse_hs + top + r : &(real){0});
        }
}

#if CH > 1
/* Backward of the head mixing, in place: grad := matrix^T grad. grad is zero outside the visible keys and stays so.
 *   transposed  [groups of a batch element][CH][CH], row = input head
 *   mid         input of the mixing; grad_matrix [groups][slots][CH][CH] receives sums of grad[o] * mid[p] over a slot's strips
 */
void mix_backward(const Geometry *g, real *grad, ptrdiff_t grad_hs, const real *mid, ptrdiff_t mid_hs, const real *transposed,
                  real *grad_matrix, ptrdiff_t slots) {
    const ptrdiff_t strips = (g->rows + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) schedule(static) num_threads(g->threads) if (g->threads > 1)
    for (ptrdiff_t group = 0; group < g->groups; group++)
        for (ptrdiff_t slot = 0; slot < slots; slot++) {
            vec total[CH][CH];
            memset(total, 0, sizeof(total));
            for (ptrdiff_t strip = strips * slot / slots; strip < strips * (slot + 1) / slots; strip++) {
                const ptrdiff_t top = strip * STRIP, nr = g->rows - top < STRIP ? g->rows - top : STRIP;
                const ptrdiff_t from = span_from(g, group, top), to = span_to(g, from, top, nr);
                real *dy = grad + group * CH * grad_hs + top * g->ld;
                const real *x = mid + group * CH * mid_hs + top * g->ld;
                enum { WIDE = 8 * LANES };
                for (ptrdiff_t c = from; c < to; c += WIDE) {
                    const ptrdiff_t end = to - c < WIDE ? to : c + WIDE;
                    for (int o = 0; o < CH; o += 4)
                        for (int p = 0; p < CH; p += 4) {
                            vec acc[4][4];
#pragma GCC unroll 4
                            for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                                for (int k = 0; k < 4; k++) acc[i][k] = splat(0);
                            for (ptrdiff_t r = 0; r < nr; r++)
                                for (ptrdiff_t j = c; j < end; j += LANES) {
                                    vec a[4], b[4];
#pragma GCC unroll 4
                                    for (int i = 0; i < 4; i++) {
                                        a[i] = o + i < CH ? LOAD(dy + (o + i) * grad_hs + r * g->ld + j) : splat(0);
                                        b[i] = p + i < CH ? LOAD(x + (p + i) * mid_hs + r * g->ld + j) : splat(0);
                                    }
#pragma GCC unroll 4
                                    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                                        for (int k = 0; k < 4; k++) acc[i][k] += a[i] * b[k];
                                }
                            for (int i = 0; i < 4; i++)
                                for (int k = 0; k < 4; k++)
                                    if (o + i < CH && p + k < CH) total[o + i][p + k] += acc[i][k];
                        }
                    for (ptrdiff_t r = 0; r < nr; r++)
                        for (ptrdiff_t j = c; j < end; j += LANES)
                            mix_vector(dy + r * g->ld + j, grad_hs, transposed + group % g->per_batch * CH * CH, dy + r * g->ld + j,
                                       grad_hs);
                }
            }
            for (int o = 0; o < CH; o++)
                for (int p = 0; p < CH; p++) grad_matrix[((group * slots + slot) * CH + o) * CH + p] = sum_of(total[o][p]);
        }
}
#endif

#if CQ > 0
/* Sums of grad[i][j] * in[i - HALO + k][j + b - left] for b0 <= b < b0 + nb, every k, into out[k][b]. */
INLINE void correlate(const Geometry *g, ptrdiff_t group, const real *grad, const real *in, real *out, const int b0, const int nb) {
    enum { WIDE = 512 };
    static const real zeros[WIDE + 64];
    const ptrdiff_t columns = g->first + g->rows;
    vec acc[CQ][4], total[CQ][4]; /* sums of a few rows, and of these: less rounding than one long sum */
#pragma GCC unroll 40
    for (int k = 0; k < CQ; k++)
#pragma GCC unroll 4
        for (int b = 0; b < nb; b++) acc[k][b] = total[k][b] = splat(0);
    for (ptrdiff_t c = start_of(g, group, 0) / LANES * LANES; c < columns; c += WIDE)
        for (ptrdiff_t row = 0; row < g->rows + HALO; row++) { /* a row of `in`: position first - HALO + row */
            const ptrdiff_t position = g->first - HALO + row;
            ptrdiff_t end = position + g->left + 1; /* further right, `in` is zero; past the last column, `grad` is (and the map may end) */
            end = end < columns ? end : columns;
            end = end < c + WIDE ? end : c + WIDE;
            const real *below[CQ]; /* the rows of grad that read it, most recent kernel row last */
#pragma GCC unroll 40
            for (int k = 0; k < CQ; k++) {
                const ptrdiff_t r = row - k;
                const int reads = r >= 0 && r < g->rows && position >= start_of(g, group, r < 0 || r >= g->rows ? 0 : r);
                below[k] = reads ? grad + r * g->ld + c : zeros;
            }
            const real *line = in + row * g->ld + b0 - g->left;
            for (ptrdiff_t j = c; j < end; j += LANES) {
                vec d[CQ];
#pragma GCC unroll 40
                for (int k = 0; k < CQ; k++) d[k] = LOAD(below[k] + (j - c));
#pragma GCC unroll 4
                for (int b = 0; b < nb; b++) {
                    vec x = LOAD(line + j + b);
#pragma GCC unroll 40
                    for (int k = 0; k < CQ; k++) acc[k][b] += d[k] * x;
                }
            }
            if (row % 8 != 7 && row != g->rows + HALO - 1) continue;
#pragma GCC unroll 40
            for (int k = 0; k < CQ; k++)
#pragma GCC unroll 4
                for (int b = 0; b < nb; b++) {
                    total[k][b] += acc[k][b];
                    acc[k][b] = splat(0);
                }
        }
#pragma GCC unroll 40
    for (int k = 0; k < CQ; k++)
#pragma GCC unroll 4
        for (int b = 0; b < nb; b++) out[k * CK + b0 + b] = sum_of(total[k][b]);
}
#endif

/* Backward of the convolution.
 *   grad      [heads][rows + HALO][ld], gradient of its output; the last HALO rows are the first rows of the next block
 *   in        its input, HALO rows above the block first; grad_in receives the gradient of the block's rows (may be `grad` if CQ = 0)
 *   flipped   [heads of a batch element][CQ][CK], the kernel turned by 180 degrees
 *   grad_kernel [heads][CQ][CK]
 *   weights   NULL, or the softmax that `in` is: grad_in then becomes the gradient of the softmax's input
 */
void convolution_backward(const Geometry *g, const real *grad, ptrdiff_t grad_hs, const real *in, ptrdiff_t in_hs, const real *flipped,
                          real *grad_kernel, real *grad_in, ptrdiff_t grad_in_hs, const real *weights, ptrdiff_t weights_hs) {
#pragma omp parallel for schedule(static) num_threads(g->threads) if (g->threads > 1)
    for (ptrdiff_t head = 0; head < g->groups; head++) { /* one task a head: per_batch counts heads here */
#if CQ > 0
        const real *d = grad + head * grad_hs, *taps = flipped + head % g->per_batch * CQ * CK;
        const real *x = in + head * in_hs;
        real *sums = grad_kernel + head * CQ * CK;
#pragma GCC unroll 16
        for (int b = 0; b < CK; b += 4) {
            if (CK - b >= 4) correlate(g, head, d, x, sums, b, 4);
            if (CK - b == 3) correlate(g, head, d, x, sums, b, 3);
            if (CK - b == 2) correlate(g, head, d, x, sums, b, 2);
            if (CK - b == 1) correlate(g, head, d, x, sums, b, 1);
        }
#endif
        for (ptrdiff_t top = 0; top < g->rows; top += STRIP) {
            const ptrdiff_t nr = g->rows - top < STRIP ? g->rows - top : STRIP;
            const ptrdiff_t from = span_from(g, head, top), to = span_to(g, from, top, nr);
            real *y = grad_in + head * grad_in_hs + top * g->ld;
#if CQ > 0
            const real *window = d + top * g->ld + from - (CK - 1 - g->left);
            const ptrdiff_t last = top + nr - 1 + HALO < g->rows ? top + nr - 1 + HALO : g->rows - 1 + HALO;
            int cut = 0; /* does a query below, reading these rows, belong to a later document? */
            if (g->start) cut = start_of(g, head, last) > g->first + top;
            if (!cut)
                stencil_span(window, g->ld, taps, y + from, g->ld, nr, to - from);
            else
                for (ptrdiff_t r = 0; r < nr; r++) {
                    ptrdiff_t high = 1;
                    while (high < CQ && start_of(g, head, top + r + high) <= g->first + top + r) high++;
                    stencil_cut(window + r * g->ld, g->ld, taps, y + r * g->ld + from, to - from, 0, high);
                }
#endif
            for (ptrdiff_t r = 0; r < nr; r++) {
                const ptrdiff_t low = start_of(g, head, top + r), high = g->first + top + r + 1;
                real *row = y + r * g->ld;
                clear_outside(row, g, low, high);
                if (!weights) continue;
                const real *p = weights + head * weights_hs + (top + r) * g->ld;
                vec total = splat(0);
                for (ptrdiff_t j = from; j < to; j += LANES) total += LOAD(p + j) * LOAD(row + j);
                const vec mean = splat(sum_of(total));
                for (ptrdiff_t j = from; j < to; j += LANES) STORE(row + j, LOAD(p + j) * (LOAD(row + j) - mean));
            }
        }
    }
}
