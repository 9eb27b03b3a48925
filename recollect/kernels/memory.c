/* The Miras recurrence of a two-layer residual perceptron memory, one head of one batch element at a time.
 *
 *   y(x) = x + scale * norm(W_out gelu(W_in x)) + shift;  Z_t = diag(alpha_t) Z_{t-1} - eta_t * gradient at the chunk's first weights
 *
 * The weights W are Z (LINK IDENTITY), or Z times a factor that each chunk has of its first Z (SCALED), or to first order in what the chunk
 * has added a softmax of Z (SIMPLEX), see Point. Below, a state is a Z.
 *
 * Tokens go in pieces of at most TOKENS, none across the start of a chunk or document. All reads of a piece come from its first state
 * and an attention over the piece; its end is one rank-TOKENS update. Decays between two tokens of a piece are running products of
 * alpha, never a ratio: nothing overflows whatever alpha is. The backward pass replays a segment of pieces from a saved state.
 *
 * Layout. KEY, HIDDEN are known at compile time. A state is [2][HIDDEN][KEY]: W_in, and W_out transposed. Per piece, what is KEY wide is
 * [TOKENS][KEY], and [KEY][TOKENS] where it multiplies a state from the right; what is HIDDEN wide is [HIDDEN][TOKENS].
 * Every product is one tile loop: out[m][:] = sum over c of w[m][c] * x[c][:].
 */
#include "common.h"
#include "pages.h"
#include <stdlib.h>

#define TOKENS 16
#define AREA (HIDDEN * KEY)
#define STATE (2 * AREA)
#define MOMENTUM (RULE == 1)
#define FULL (STATE * (1 + MOMENTUM)) /* with momentum its S lies behind */
#define ACROSS (TOKENS / LANES)
#define ALONG (KEY / LANES)
#define SEGMENT 4 /* pieces between saved states */
#if BYTES == 64
#define TILES 16
#else
#define TILES 8
#endif
#define NORM_EPS ((real)1e-6)
#define BIAS_EPS ((real)1e-6)
#define LINK_EPS ((real)1e-8)

enum { L2, LP3, HUBER, L1, HUBER_NORM, LP, L_INFINITY, PSEUDO_HUBER, VALUE_SHIFT };
#define OVER_CHANNELS (BIAS == HUBER_NORM || BIAS == L_INFINITY || BIAS == VALUE_SHIFT) /* a channel's gradient has all residuals */
#define DELTA_ALONE (BIAS == HUBER || BIAS == PSEUDO_HUBER)                          /* a threshold for each channel */
#define DELTA_MEAN (BIAS == HUBER_NORM || BIAS == VALUE_SHIFT)                       /* one for all: their mean counts */
#define HAS_DELTA (DELTA_ALONE || DELTA_MEAN)
enum { IDENTITY, SCALED, SIMPLEX };
enum { OUT = LINK == SIMPLEX }; /* index of W_out's decay, W_in's being at 0: SIMPLEX has one number per token for W_in */
enum { CHUNK = 1, DOCUMENT = 2 };
enum { SET, ADD, DECAY };

typedef struct {
    int32_t first, count, flags, segment, anchor; /* segment: where its state is saved, -1 inside one; anchor: segment its chunk starts at */
} Entry;

typedef struct {
    ptrdiff_t batch, heads, length, rows, segments;           /* rows: of the table, per batch element */
    ptrdiff_t eta_channels, alpha_channels, delta_channels;   /* 1 or KEY */
    int threads;
    double sharpness;                                         /* the number that a bias has: L1's sharpness, LP's p, L_INFINITY's temperature */
    double retention;                                         /* q of link SCALED; of IDENTITY by how much a full chunk ends nearer to zero */
    const int32_t *order;                                     /* [batch][length] tokens that count, in order */
    const int32_t *n_entries, *closed;                        /* [batch]; closed: the last chunk is full */
    const Entry *table;                                       /* [batch][rows] */
    const real *q, *k, *v, *eta, *log_alpha, *delta;          /* [batch][length][heads][channels] */
    const real *log_momentum;                                 /* [batch][length][heads], RULE with momentum */
    const real *scale, *shift;                                /* [heads][KEY] */
    const real *radius;                                       /* [heads][2], link SCALED: where each matrix starts to shrink */
    const real *log_alpha_in, *kept_in, *kept_out;            /* SIMPLEX: W_in's [batch][length][heads]; log of the decay of the open chunk */
    const real *start_in, *start_out;                         /* [heads][HIDDEN][KEY], [heads][KEY][HIDDEN]: state of a new document */
    real *in, *out, *anchor_in, *anchor_out;                  /* [batch][heads][...]: states, overwritten by the last ones */
    real *momentum_in, *momentum_out;                         /* as in, out */
    real *y;                                                  /* [batch][length][heads][KEY] */
    real *saved;                                              /* [batch][heads][segments][FULL], NULL: no backward pass to come */
    real *written, *read;                                     /* as y: outputs of W_out for keys and queries, kept with `saved` */
} Call;

typedef struct { /* in: of the outputs; out: of the inputs, states overwritten */
    const real *y;
    real *q, *k, *v, *eta, *log_alpha, *delta, *log_momentum;
    real *scale, *shift;                                      /* [batch][heads][KEY] */
    real *radius;                                             /* [batch][heads][2] */
    real *log_alpha_in, *kept_in, *kept_out;                  /* kept: [batch][heads], [batch][heads][alpha_channels] */
    real *start_in, *start_out;                               /* [batch][heads][...] */
    real *in, *out, *anchor_in, *anchor_out, *momentum_in, *momentum_out;
} Gradients;

typedef real wide[TOKENS][KEY] __attribute__((aligned(64)));
typedef real turned[KEY][TOKENS] __attribute__((aligned(64)));
typedef real hidden[HIDDEN][TOKENS] __attribute__((aligned(64)));
typedef real square[TOKENS][TOKENS] __attribute__((aligned(64)));
typedef real line[KEY] __attribute__((aligned(64)));

typedef struct { real bend, by_delta; } Bend; /* see over_channels */

/* What a piece writes with; kept from the replay to the backward pass. */
typedef struct {
    hidden act, slope, curve, back, gp;  /* gelu, gelu', gelu'' of the pre-activation; gradient of act; gradient of the pre-activation */
    wide unit, phi, phi_slope, phi_delta, gu;
    real rate[TOKENS], mean_g[TOKENS], mean_gu[TOKENS];
    Bend bend[TOKENS];
    wide k, eta, f_in, f_out;            /* factors eta * k, eta * gu */
    wide alpha[OUT + 1];
    line total[OUT + 1];                 /* product of alpha over the piece */
    hidden act_even[OUT];                /* SIMPLEX: act and f_in less their means, which rows of sum zero do not see */
    wide f_even[OUT];
} Writes;

typedef struct {
    hidden act_even[OUT];
    hidden pre, act, slope;              /* pre, u: before the factor of link SCALED */
    wide q, decayed_q, u, unit;
    wide decay[OUT + 1];                 /* product of alpha up to and with token t */
    real rate[TOKENS];
    square s, s_turned, a_turned;        /* s[t][i]: attention of the first layer; a_turned[i][t]: of the second */
} Reads;

/* ---- tiles ---- */

INLINE void tile(real *out, ptrdiff_t ldo, const real *w, ptrdiff_t rs, ptrdiff_t cs, const real *x, ptrdiff_t ldx, ptrdiff_t depth, const int mode,
                 const int sign, const real *keep, const int nr, const int nv) {
    vec acc[TILES][2];
#pragma GCC unroll 16
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 2
        for (int n = 0; n < nv; n++) {
            acc[r][n] = mode == SET ? splat(0) : LOAD(out + r * ldo + n * LANES);
            if (mode == DECAY) acc[r][n] *= LOAD(keep + n * LANES);
        }
    for (ptrdiff_t c = 0; c < depth; c++) {
        vec value[2];
#pragma GCC unroll 2
        for (int n = 0; n < nv; n++) value[n] = LOAD(x + c * ldx + n * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < nr; r++)
#pragma GCC unroll 2
            for (int n = 0; n < nv; n++) {
                if (sign > 0) acc[r][n] += value[n] * w[r * rs + c * cs];
                else acc[r][n] -= value[n] * w[r * rs + c * cs];
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 2
        for (int n = 0; n < nv; n++) STORE(out + r * ldo + n * LANES, acc[r][n]);
}

/* out[m][:] (mode SET: =, ADD: +=, DECAY: = keep * out +) sign * sum over c of w[m * rs + c * cs] * x[c][:], `vecs` vectors wide. */
INLINE void product(real *out, ptrdiff_t ldo, const ptrdiff_t rows, const int vecs, const real *w, const ptrdiff_t rs, const ptrdiff_t cs,
                    const real *x, const ptrdiff_t ldx, const ptrdiff_t depth, const int mode, const int sign, const real *keep) {
    int done = 0;
#define BAND(nv)                                                                                                                   \
    for (; done + nv <= vecs; done += nv)                                                                                          \
        for (ptrdiff_t m = 0; m < rows; m += TILES / nv)                                                                           \
            tile(out + m * ldo + done * LANES, ldo, w + m * rs, rs, cs, x + done * LANES, ldx, depth, mode, sign,                  \
                 keep + (mode == DECAY ? done * LANES : 0), TILES / nv, nv);
    BAND(2) BAND(1) /* wider ones read the state, which lies in the second cache, more often */
#undef BAND
}

/* The five shapes of product. W: state half [HIDDEN][KEY]. */
INLINE void through(hidden out, const real *state, const turned x, int mode, int sign) { /* out = W x */
    product(out[0], TOKENS, HIDDEN, ACROSS, state, KEY, 1, x[0], TOKENS, KEY, mode, sign, NULL);
}
INLINE void gather(wide out, const hidden x, const real *state, int mode, int sign) { /* out = x^T W */
    product(out[0], KEY, TOKENS, ALONG, x[0], 1, TOKENS, state, KEY, HIDDEN, mode, sign, NULL);
}
INLINE void update(real *state, const hidden x, const wide f, int mode, int sign, const real *keep) { /* W = keep W + x f */
    product(state, KEY, HIDDEN, ALONG, x[0], TOKENS, 1, f[0], KEY, TOKENS, mode, sign, keep);
}
INLINE void mix(hidden out, const hidden x, const square s, int mode, int sign) { /* out = x s */
    product(out[0], TOKENS, HIDDEN, ACROSS, x[0], TOKENS, 1, s[0], TOKENS, TOKENS, mode, sign, NULL);
}
INLINE void scores(square out, const hidden x, const hidden y, int mode, int sign) { /* out = x^T y */
    product(out[0], TOKENS, TOKENS, ACROSS, x[0], 1, TOKENS, y[0], TOKENS, HIDDEN, mode, sign, NULL);
}

static void turn(turned out, const wide in) {
    for (int c = 0; c < KEY; c++)
        for (int t = 0; t < TOKENS; t++) out[c][t] = in[t][c];
}

#define EACH(n) for (ptrdiff_t n = 0; n < KEY; n += LANES)

INLINE real dot(const real *a, const real *b) {
    vec total = splat(0);
    EACH(c) total += LOAD(a + c) * LOAD(b + c);
    return sum_of(total);
}

INLINE real total_of(const real *a) {
    vec total = splat(0);
    EACH(c) total += LOAD(a + c);
    return sum_of(total);
}

/* ---- element by element ---- */

INLINE vec where(uvec mask, vec yes, vec no) { return (vec)(((uvec)yes & mask) | ((uvec)no & ~mask)); }

INLINE vec largest_of(vec a, vec b) { return where((uvec)(a > b), a, b); }

INLINE vec root(vec x) {
    vec y;
    for (int i = 0; i < LANES; i++) y[i] = sizeof(real) == 4 ? sqrtf((float)x[i]) : sqrt(x[i]);
    return y;
}

INLINE vec sigmoid(vec z) {
    const uvec negative = (uvec)(z < 0);
    const vec e = exp_of(where(negative, z, -z)), one = splat(1);
    return where(negative, e, one) / (one + e);
}

/* gelu(x) = x sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3); first and second derivative. */
INLINE void gelu(vec x, vec *value, vec *slope, vec *curve) {
    const real c = (real)1.5957691216057308, a = (real)0.044715;
    const vec xx = x * x, s = sigmoid(c * x * (1 + a * xx)), w = s * (1 - s), z1 = c * (1 + 3 * a * xx);
    *value = x * s;
    *slope = s + x * w * z1;
    if (curve) *curve = w * (2 * z1 + x * ((1 - 2 * s) * z1 * z1 + 6 * c * a * x));
}

/* Gradient of a bias that acts on every channel alone at residual r, its derivative by r and by delta. Of others: r. */
INLINE void bias(vec r, vec delta, real number, vec *value, vec *slope, vec *by_delta) {
    *by_delta = splat(0);
    if (BIAS == L2 || OVER_CHANNELS) {
        *value = r;
        *slope = splat(1);
    } else if (BIAS == LP3) {
        const vec size = root(r * r + BIAS_EPS);
        *value = r * size;
        *slope = size + r * r / size;
    } else if (BIAS == LP) {
        const vec squared = r * r + BIAS_EPS, weight = power_of(squared, number / 2 - 1);
        *value = r * weight;
        *slope = weight * (1 + (number - 2) * (r * r / squared));
    } else if (BIAS == L1) {
        const vec s = sigmoid(2 * number * r);
        *value = 2 * s - 1;
        *slope = 4 * number * s * (1 - s);
    } else if (BIAS == PSEUDO_HUBER) {
        const uvec tight = (uvec)(delta < BIAS_EPS);
        const vec ratio = r / where(tight, splat(BIAS_EPS), delta), rate = 1 / root(1 + ratio * ratio), cube = rate * rate * rate;
        *value = r * rate;
        *slope = cube;
        *by_delta = where(tight, splat(0), ratio * ratio * ratio * cube);
    } else {
        const uvec above = (uvec)(r > delta), below = (uvec)(r < -delta);
        *value = where(above, delta, where(below, -delta, r));
        *slope = where(above | below, splat(0), splat(1));
        *by_delta = where(above, splat(1), where(below, splat(-1), splat(0)));
    }
}

/* The gradient of a bias over all channels, in place of residuals r. Its pullback of d is slope d - r (r . d) bend in what is left of r,
 * and (r . d) by_delta to the mean of delta, which is read where the bias has one.
 * HUBER_NORM: r min(1, mean / |r|). VALUE_SHIFT: r (1 + mean / |r|). L_INFINITY: the first half of the softmax of (r, -r) / temperature
 * less its second half. */
INLINE Bend over_channels(real *r, const real *delta, real temperature, real *slope) {
    if (BIAS == L_INFINITY) {
        vec most = splat(0), total = splat(0);
        real top = 0;
        EACH(c) most = largest_of(most, largest_of(LOAD(r + c), -LOAD(r + c)));
        for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
        EACH(c) {
            const vec up = exp_of((LOAD(r + c) - top) / temperature), down = exp_of((-LOAD(r + c) - top) / temperature);
            total += up + down;
            STORE(r + c, up - down);
            STORE(slope + c, up + down);
        }
        const real share = 1 / sum_of(total);
        EACH(c) {
            STORE(r + c, LOAD(r + c) * share);
            STORE(slope + c, LOAD(slope + c) * (share / temperature));
        }
        return (Bend){1 / temperature, 0};
    }
    const real size = (real)sqrt(dot(r, r) + BIAS_EPS), mean = total_of(delta) / KEY;
    const int inside = BIAS == HUBER_NORM && (size <= mean || !(mean > 0)); /* padding has no threshold */
    const real factor = inside ? 1 : BIAS == HUBER_NORM ? mean / size : 1 + mean / size;
    EACH(c) {
        STORE(r + c, LOAD(r + c) * factor);
        STORE(slope + c, splat(factor));
    }
    if (inside) return (Bend){0, 0};
    return (Bend){mean / (size * size * size * factor * factor), 1 / (factor * size)};
}

/* unit = (u - mean) / sqrt(variance + eps) of a row times `factor`; its rate. */
INLINE real normalise(const real *u, real factor, real *unit) {
    const vec mean = splat(total_of(u) / KEY);
    EACH(c) STORE(unit + c, factor * (LOAD(u + c) - mean));
    const real rate = 1 / (real)sqrt(dot(unit, unit) / KEY + NORM_EPS);
    EACH(c) STORE(unit + c, LOAD(unit + c) * rate);
    return rate;
}

/* Pullback of normalise: d = rate * (g - mean(g) - unit * mean(g * unit)). */
INLINE void normalise_back(const real *g, const real *unit, real rate, real *d) {
    const real mean = total_of(g) / KEY, along = dot(g, unit) / KEY;
    EACH(c) STORE(d + c, rate * (LOAD(g + c) - mean - LOAD(unit + c) * along));
}

/* ---- tokens in and out ---- */

typedef struct {
    const Call *call;
    const Entry *entry;
    const int32_t *tokens;
    ptrdiff_t batch, head;
} Place;

INLINE ptrdiff_t row_of(const Place *p, int t) {
    return (p->batch * p->call->length + p->tokens[p->entry->first + t]) * p->call->heads + p->head;
}

static void load(const Place *p, const real *from, ptrdiff_t channels, wide out) {
    for (int t = 0; t < TOKENS; t++) {
        const real *row = t < p->entry->count ? from + row_of(p, t) * channels : NULL;
        EACH(c) STORE(out[t] + c, row == NULL ? splat(0) : channels == 1 ? splat(row[0]) : LOAD(row + c));
    }
}

static void store(const Place *p, const wide in, real *to, ptrdiff_t channels) {
    for (int t = 0; t < p->entry->count; t++) {
        real *row = to + row_of(p, t) * channels;
        if (channels == 1) row[0] = total_of(in[t]);
        else EACH(c) STORE(row + c, LOAD(in[t] + c));
    }
}

/* ---- the link: weights of a state, and what reads inside the chunk use ---- */

/* The state at the start of a chunk, and its weights: where the chunk's gradients are taken.
 * SCALED: weights = factor * dual, per matrix, factor = min(1, radius / (norm + eps))^(q - 2), norm the l_q norm; of a negative radius
 * (|radius| / (norm + eps))^(q - 2); all reads of the chunk are scaled by the same factor.
 * SIMPLEX: weights = I softmax(dual) - 1 along the I inputs of each row. The 1 is added to the products: once for W_in, never for W_out,
 * where the norm takes it away. Reads of the chunk multiply with decay * weights + (what dual has gained, less the mean of each row). */
typedef struct {
    const real *dual, *weights;
    real factor[2], norm[2];
} Point;

INLINE real factor_of(const Point *point, int half) { return LINK == SCALED ? point->factor[half] : 1; }

/* |x|^e of an entry of a matrix, in units of the largest one. */
INLINE vec entry_power(vec unit, real e) {
    if (e == 2) return unit * unit;
    return power_of(where((uvec)(unit < 0), -unit, unit), e);
}

/* The l_q norm of a matrix: in units of its largest entry, whose power may not be a number. */
static real norm_of(const real *x, const real q) {
    vec most = splat(0), total = splat(0);
    real largest = 0;
    for (ptrdiff_t n = 0; n < AREA; n += LANES) {
        const vec value = LOAD(x + n), size = where((uvec)(value < 0), -value, value);
        most = where((uvec)(size > most), size, most);
    }
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    if (largest == 0) return 0;
    for (ptrdiff_t n = 0; n < AREA; n += LANES) {
        const vec unit = LOAD(x + n) / largest;
        total += unit * unit * entry_power(unit, q - 2);
    }
    return largest * (real)pow(sum_of(total), 1 / q);
}

#define ROW(n, o) ((n) + (o) * KEY)

/* out = I softmax(x) - 1 along the inputs of each row: W_in's KEY, W_out's HIDDEN. */
static void softmax(const real *x, real *out) {
    for (int o = 0; o < HIDDEN; o++) {
        vec most = LOAD(ROW(x, o)), total = splat(0);
        real top;
        EACH(c) most = largest_of(most, LOAD(ROW(x, o) + c));
        top = most[0];
        for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
        EACH(c) {
            const vec e = exp_of(LOAD(ROW(x, o) + c) - top);
            STORE(ROW(out, o) + c, e);
            total += e;
        }
        const real share = KEY / sum_of(total);
        EACH(c) STORE(ROW(out, o) + c, LOAD(ROW(out, o) + c) * share - 1);
    }
    x += AREA, out += AREA;
    EACH(c) {
        vec most = LOAD(x + c), total = splat(0);
        for (int o = 1; o < HIDDEN; o++) most = largest_of(most, LOAD(ROW(x, o) + c));
        for (int o = 0; o < HIDDEN; o++) {
            const vec e = exp_of(LOAD(ROW(x, o) + c) - most);
            STORE(ROW(out, o) + c, e);
            total += e;
        }
        for (int o = 0; o < HIDDEN; o++) STORE(ROW(out, o) + c, LOAD(ROW(out, o) + c) * (HIDDEN / total) - 1);
    }
}

/* x of W = I softmax(x) - 1, from the gradient of W: d += (W + 1) (g - mean of (W + 1) g over the row). */
static void softmax_back(const real *w, const real *g, real *d) {
    for (int o = 0; o < HIDDEN; o++) {
        vec total = splat(0);
        EACH(c) total += (LOAD(ROW(w, o) + c) + 1) * LOAD(ROW(g, o) + c);
        const real mean = sum_of(total) / KEY;
        EACH(c) STORE(ROW(d, o) + c, LOAD(ROW(d, o) + c) + (LOAD(ROW(w, o) + c) + 1) * (LOAD(ROW(g, o) + c) - mean));
    }
    w += AREA, g += AREA, d += AREA;
    EACH(c) {
        vec total = splat(0);
        for (int o = 0; o < HIDDEN; o++) total += (LOAD(ROW(w, o) + c) + 1) * LOAD(ROW(g, o) + c);
        const vec mean = total / HIDDEN;
        for (int o = 0; o < HIDDEN; o++) STORE(ROW(d, o) + c, LOAD(ROW(d, o) + c) + (LOAD(ROW(w, o) + c) + 1) * (LOAD(ROW(g, o) + c) - mean));
    }
}

/* Take each row's mean away: W_in's rows are KEY long, W_out's HIDDEN. */
static void even_rows(real *x) {
    for (int o = 0; o < HIDDEN; o++) {
        const real mean = total_of(ROW(x, o)) / KEY;
        EACH(c) STORE(ROW(x, o) + c, LOAD(ROW(x, o) + c) - mean);
    }
    x += AREA;
    EACH(c) {
        vec total = splat(0);
        for (int o = 0; o < HIDDEN; o++) total += LOAD(ROW(x, o) + c);
        for (int o = 0; o < HIDDEN; o++) STORE(ROW(x, o) + c, LOAD(ROW(x, o) + c) - total / HIDDEN);
    }
}

/* The same of one piece's tokens, along what is KEY and what is HIDDEN wide. */
static void even_wide(const wide x, wide out) {
    for (int t = 0; t < TOKENS; t++) {
        const real mean = total_of(x[t]) / KEY;
        EACH(c) STORE(out[t] + c, LOAD(x[t] + c) - mean);
    }
}
static void even_hidden(const hidden x, hidden out) {
    for (int t = 0; t < TOKENS; t += LANES) {
        vec total = splat(0);
        for (int o = 0; o < HIDDEN; o++) total += LOAD(x[o] + t);
        for (int o = 0; o < HIDDEN; o++) STORE(out[o] + t, LOAD(x[o] + t) - total / HIDDEN);
    }
}

/* Per token, the sum along what is HIDDEN wide. */
static void sum_hidden(const hidden x, real *out) {
    for (int t = 0; t < TOKENS; t += LANES) {
        vec total = splat(0);
        for (int o = 0; o < HIDDEN; o++) total += LOAD(x[o] + t);
        STORE(out + t, total);
    }
}

/* out += the sum of x over KEY, per token: the 1 of W_in. */
static void add_ones(const wide x, hidden out) {
    real sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) sums[t] = total_of(x[t]);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) STORE(out[o] + t, LOAD(out[o] + t) + LOAD(sums + t));
}

/* The decay of both matrices between the start of entry n's chunk and entry n. */
static void kept_before(const Place *p, line kept[2]) {
    const Call *call = p->call;
    const Entry *first = call->table + p->batch * call->rows, *entry = p->entry;
    const ptrdiff_t h = p->batch * call->heads + p->head;
    Place at = *p;
    wide in, out;
    memset(kept, 0, 2 * sizeof(line));
    for (; !(entry->flags & CHUNK) && entry > first; entry--) {
        at.entry = entry - 1;
        load(&at, call->log_alpha_in, 1, in);
        load(&at, call->log_alpha, call->alpha_channels, out);
        for (int t = 0; t < TOKENS; t++)
            EACH(c) {
                STORE(kept[0] + c, LOAD(kept[0] + c) + LOAD(in[t] + c));
                STORE(kept[1] + c, LOAD(kept[1] + c) + LOAD(out[t] + c));
            }
    }
    const int open = !(entry->flags & CHUNK);
    const real *before = call->kept_out + h * call->alpha_channels;
    EACH(c) {
        const vec in_log = LOAD(kept[0] + c) + (open ? call->kept_in[h] : 0);
        const vec out_log = LOAD(kept[1] + c) + (!open ? splat(0) : call->alpha_channels == 1 ? splat(before[0]) : LOAD(before + c));
        STORE(kept[0] + c, exp_of(in_log));
        STORE(kept[1] + c, exp_of(out_log));
    }
}

/* What the reads of a piece multiply with; where that is no state, it goes to `room`. */
INLINE const real *frame_at(const Place *p, const Point *point, const real *state, real *room) {
    if (LINK != SIMPLEX) return state;
    if (p->entry->flags & CHUNK) return point->weights;
    line kept[2];
    kept_before(p, kept);
    for (int half = 0; half < 2; half++)
        for (ptrdiff_t n = half * AREA; n < (half + 1) * AREA; n += KEY)
            EACH(c) STORE(room + n + c, LOAD(state + n + c) - LOAD(kept[half] + c) * LOAD(point->dual + n + c));
    even_rows(room);
    for (int half = 0; half < 2; half++)
        for (ptrdiff_t n = half * AREA; n < (half + 1) * AREA; n += KEY)
            EACH(c) STORE(room + n + c, LOAD(room + n + c) + LOAD(kept[half] + c) * LOAD(point->weights + n + c));
    return room;
}

/* The point of the chunk that starts at `dual`; weights that differ from it go to `room`. */
INLINE Point point_at(const Place *p, const real *dual, real *room) {
    Point point = {dual, LINK == IDENTITY ? dual : room, {1, 1}, {0, 0}};
    if (LINK == SIMPLEX) softmax(dual, room);
    if (LINK == SCALED) for (int half = 0; half < 2; half++) {
        const real q = (real)p->call->retention, norm = norm_of(dual + half * AREA, q);
        const real radius = p->call->radius[p->head * 2 + half], ratio = (real)fabs(radius) / (norm + LINK_EPS);
        const real factor = ratio < 1 || radius < 0 ? (real)pow(ratio, q - 2) : 1;
        for (ptrdiff_t n = half * AREA; n < (half + 1) * AREA; n += LANES) STORE(room + n, LOAD(dual + n) * factor);
        point.factor[half] = factor;
        point.norm[half] = norm;
    }
    return point;
}

/* ---- forward ---- */

/* act and f_in as weights see them. The mean of act is left out of all products: it would only add rounding. */
#define EVEN_ACT(x) (LINK == SIMPLEX ? (x)->act_even[0] : (x)->act)
#define EVEN_F(w) (LINK == SIMPLEX ? (w)->f_even[0] : (w)->f_in)

/* The factors of a piece's gradients at the chunk's first state. */
static void write_piece(const Place *p, const real *anchor, Writes *w, const int again) {
    const Call *call = p->call;
    const real *scale = call->scale + p->head * KEY, *shift = call->shift + p->head * KEY;
    wide v, delta, u;
    turned x;
    load(p, call->k, KEY, w->k);
    load(p, call->v, KEY, v);
    if (MOMENTUM) for (int t = 0; t < TOKENS; t++) EACH(c) STORE(w->eta[t] + c, splat(1)); /* the mixture has it */
    else load(p, call->eta, call->eta_channels, w->eta);
    if (!MOMENTUM) load(p, call->log_alpha, call->alpha_channels, w->alpha[OUT]);
    if (LINK == SIMPLEX) load(p, call->log_alpha_in, 1, w->alpha[0]);
    if (HAS_DELTA) load(p, call->delta, call->delta_channels, delta);
    for (int half = 0; half <= OUT && !MOMENTUM; half++)
        EACH(c) {
            vec all = splat(0); /* not the product of alpha: its rounding, mostly the same at every token, would grow with the length */
            for (int t = 0; t < TOKENS; t++) {
                const vec log_alpha = LOAD(w->alpha[half][t] + c);
                STORE(w->alpha[half][t] + c, exp_of(log_alpha));
                all += log_alpha;
            }
            STORE(w->total[half] + c, exp_of(all));
        }
    turn(x, w->k);
    through(w->back, anchor, x, SET, 1);
    if (LINK == SIMPLEX) add_ones(w->k, w->back);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) {
            vec value, slope, curve;
            gelu(LOAD(w->back[o] + t), &value, &slope, again ? &curve : NULL);
            STORE(w->act[o] + t, value);
            STORE(w->slope[o] + t, slope);
            if (again) STORE(w->curve[o] + t, curve);
        }
    if (LINK == SIMPLEX) even_hidden(w->act, w->act_even[0]);
    if (again) load(p, call->written, KEY, u);
    else gather(u, EVEN_ACT(w), anchor + AREA, SET, 1);
    if (!again && call->saved) store(p, u, call->written, KEY);
    for (int t = 0; t < TOKENS; t++) {
        line g;
        w->rate[t] = normalise(u[t], 1, w->unit[t]);
        EACH(c) {
            const vec gain = LOAD(scale + c), unit = LOAD(w->unit[t] + c);
            vec value, slope, by_delta;
            bias(LOAD(w->k[t] + c) + gain * unit + LOAD(shift + c) - LOAD(v[t] + c), DELTA_ALONE ? LOAD(delta[t] + c) : splat(0),
                 (real)call->sharpness, &value, &slope, &by_delta);
            STORE(w->phi[t] + c, value);
            if (again) {
                STORE(w->phi_slope[t] + c, slope);
                STORE(w->phi_delta[t] + c, by_delta);
            }
        }
        if (OVER_CHANNELS) w->bend[t] = over_channels(w->phi[t], delta[t], (real)call->sharpness, w->phi_slope[t]);
        EACH(c) STORE(g + c, LOAD(scale + c) * LOAD(w->phi[t] + c));
        w->mean_g[t] = total_of(g) / KEY;
        w->mean_gu[t] = dot(g, w->unit[t]) / KEY;
        EACH(c) {
            const vec gu = w->rate[t] * (LOAD(g + c) - w->mean_g[t] - LOAD(w->unit[t] + c) * w->mean_gu[t]), eta = LOAD(w->eta[t] + c);
            STORE(w->gu[t] + c, gu);
            STORE(w->f_out[t] + c, eta * gu);
            STORE(w->f_in[t] + c, eta * LOAD(w->k[t] + c));
        }
    }
    if (LINK == SIMPLEX) even_wide(w->f_in, w->f_even[0]);
    turn(x, w->gu);
    through(w->back, anchor + AREA, x, SET, 1);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) STORE(w->gp[o] + t, LOAD(w->back[o] + t) * LOAD(w->slope[o] + t));
}

/* Multiply the rows before `end` by the decay of token `end`. */
INLINE void decay_rows(wide x, const wide alpha, int end) {
    for (int i = 0; i < end; i++) EACH(c) STORE(x[i] + c, LOAD(x[i] + c) * LOAD(alpha[end] + c));
}

/* Reads of a piece that starts at `state`: everything up to the normalised output. */
static void read_piece(const Place *p, const Writes *w, const Point *point, const real *state, Reads *r, const int again) {
    const Call *call = p->call;
    wide f;
    turned x;
    load(p, call->q, KEY, r->q);
    memcpy(f, EVEN_F(w), sizeof f);
    memset(r->s, 0, sizeof r->s);
    memset(r->s_turned, 0, sizeof r->s_turned);
    for (int t = 0; t < TOKENS; t++) {
        for (int half = 0; half <= OUT; half++)
            EACH(c) {
                const vec a = LOAD(w->alpha[half][t] + c), decay = t ? LOAD(r->decay[half][t - 1] + c) * a : a;
                STORE(r->decay[half][t] + c, decay);
                if (!half) STORE(r->decayed_q[t] + c, LOAD(r->q[t] + c) * decay);
            }
        decay_rows(f, w->alpha[0], t);
        for (int i = 0; i <= t; i++) r->s[t][i] = r->s_turned[i][t] = dot(r->q[t], f[i]);
    }
    turn(x, r->decayed_q);
    through(r->pre, state, x, SET, 1);
    mix(r->pre, w->gp, r->s_turned, ADD, -1);
    if (LINK == SIMPLEX) add_ones(r->q, r->pre);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) {
            vec value, slope;
            gelu(LOAD(r->pre[o] + t) * factor_of(point, 0), &value, &slope, NULL);
            STORE(r->act[o] + t, value);
            STORE(r->slope[o] + t, slope);
        }
    if (LINK == SIMPLEX) even_hidden(r->act, r->act_even[0]);
    scores(r->a_turned, EVEN_ACT(w), EVEN_ACT(r), SET, 1);
    if (again) load(p, call->read, KEY, r->u);
    else {
        gather(r->u, EVEN_ACT(r), state + AREA, SET, 1);
        memcpy(f, w->f_out, sizeof f);
        for (int t = 0; t < TOKENS; t++) {
            decay_rows(f, w->alpha[OUT], t);
            EACH(c) {
                vec sum = LOAD(r->u[t] + c) * LOAD(r->decay[OUT][t] + c);
                for (int i = 0; i <= t; i++) sum -= LOAD(f[i] + c) * r->a_turned[i][t];
                STORE(r->u[t] + c, sum);
            }
        }
        if (call->saved) store(p, r->u, call->read, KEY);
    }
    for (int t = 0; t < TOKENS; t++) r->rate[t] = normalise(r->u[t], factor_of(point, 1), r->unit[t]);
}

/* Factors decayed to the end of the piece. */
static void decay_to_end(const wide f, const wide alpha, wide out) {
    EACH(c) {
        vec later = splat(1);
        for (int t = TOKENS - 1; t >= 0; t--) {
            STORE(out[t] + c, LOAD(f[t] + c) * later);
            later *= LOAD(alpha[t] + c);
        }
    }
}

/* The state after a piece. */
static void carry_piece(const Writes *w, real *state) {
    wide f;
    decay_to_end(w->f_in, w->alpha[0], f);
    update(state, w->gp, f, DECAY, -1, w->total[0]);
    decay_to_end(w->f_out, w->alpha[OUT], f);
    update(state + AREA, w->act, f, DECAY, -1, w->total[OUT]);
}

/* Gradients of what a piece writes with, gathered from its reads, its carry and itself. */
typedef struct {
    hidden act, gp;      /* of act, gp */
    wide f_in, f_out;    /* of f_in, f_out */
    wide q, k, v, eta, delta;
    wide log_alpha[OUT + 1];
    line total[OUT + 1]; /* of the log of the decay over the piece */
} Back;

/* Gradients that every piece of a head adds to. */
typedef struct {
    line scale, shift;
    real factor[2], radius[2]; /* link SCALED; factor: of the chunk */
    line kept[2];              /* link SIMPLEX: of the log of the decay between the start of the chunk and the piece */
} Totals;

/* Gradient through y_t = q_t + scale * unit_t + shift: to what the norm takes, scale and shift. */
INLINE void output_back(const Place *p, const real *d_y, const Reads *r, int t, Totals *sums, real *d_u) {
    const real *scale = p->call->scale + p->head * KEY;
    line g;
    EACH(c) {
        const vec d = LOAD(d_y + c);
        STORE(g + c, d * LOAD(scale + c));
        STORE(sums->scale + c, LOAD(sums->scale + c) + d * LOAD(r->unit[t] + c));
        STORE(sums->shift + c, LOAD(sums->shift + c) + d);
    }
    normalise_back(g, r->unit[t], r->rate[t], d_u);
}

#if MOMENTUM
#include "memory_momentum.h"
#endif

/* States between the tensors' layout and the kernel's. */
static void load_state(const real *in, const real *out, real *state) {
    memcpy(state, in, AREA * sizeof(real));
    for (int c = 0; c < KEY; c++)
        for (int o = 0; o < HIDDEN; o++) state[AREA + o * KEY + c] = out[c * HIDDEN + o];
}

static void store_state(const real *state, real *in, real *out) {
    memcpy(in, state, AREA * sizeof(real));
    for (int c = 0; c < KEY; c++)
        for (int o = 0; o < HIDDEN; o++) out[c * HIDDEN + o] = state[AREA + o * KEY + c];
}

/* Whether full chunks end with entries nearer to zero. */
INLINE int shrinks(const Call *call) { return LINK == IDENTITY && call->retention > 0; }

/* Whether one ended so before entry n of a call. */
INLINE int settled(const Call *call, const Entry *entry, int32_t n) { return shrinks(call) && entry->flags == CHUNK && n > 0; }

/* Entries of a state nearer to zero by the threshold, those below it at zero; what is no number stays none. */
static void shrink(const Call *call, real *state) {
    const vec by = splat((real)call->retention);
    for (ptrdiff_t n = 0; n < STATE; n += LANES) {
        const vec x = LOAD(state + n);
        STORE(state + n, x - where((uvec)(x > by), by, where((uvec)(x < -by), -by, x)));
    }
}

/* Its pullback: d where the state that it left is not zero. */
static void shrink_back(const real *state, real *d) {
    for (ptrdiff_t n = 0; n < STATE; n += LANES) STORE(d + n, where((uvec)(LOAD(state + n) == 0), splat(0), LOAD(d + n)));
}

#define COPY(to, from) memcpy(to, from, STATE * sizeof(real))
#define COPY_FULL(to, from) memcpy(to, from, FULL * sizeof(real))

/* The state of a new document: what is learned, without momentum. */
static void start_state(const Place *p, real *state) {
    load_state(p->call->start_in + p->head * AREA, p->call->start_out + p->head * AREA, state);
    if (MOMENTUM) memset(state + STATE, 0, STATE * sizeof(real));
}

void forward(const Call *call) {
    const ptrdiff_t heads = call->batch * call->heads;
    const size_t tokens = (size_t)(heads * call->length * KEY) * sizeof(real);
    large_pages(call->y, tokens);
    if (call->saved) {
        large_pages(call->saved, (size_t)(heads * call->segments * FULL) * sizeof(real));
        large_pages(call->written, tokens);
        large_pages(call->read, tokens);
    }
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        Writes *w = aligned_alloc(64, (sizeof *w + 63) / 64 * 64);
        Reads *r = aligned_alloc(64, (sizeof *r + 63) / 64 * 64);
        real *state = aligned_alloc(64, (FULL + 3 * STATE) * sizeof(real)), *anchor = state + FULL, *room = anchor + STATE;
#pragma omp for schedule(dynamic, 1)
        for (ptrdiff_t h = 0; h < heads; h++) {
            Place p = {call, NULL, call->order + h / call->heads * call->length, h / call->heads, h % call->heads};
            const Entry *entries = call->table + p.batch * call->rows;
            const real *scale = call->scale + p.head * KEY, *shift = call->shift + p.head * KEY;
            load_state(call->anchor_in + h * AREA, call->anchor_out + h * AREA, anchor);
            load_state(call->in + h * AREA, call->out + h * AREA, state);
            if (MOMENTUM) load_state(call->momentum_in + h * AREA, call->momentum_out + h * AREA, state + STATE);
            Point point = {0};
            for (int32_t n = 0; n < call->n_entries[p.batch]; n++) {
                p.entry = entries + n;
                if (p.entry->flags & DOCUMENT) start_state(&p, state);
                if (settled(call, p.entry, n)) shrink(call, state);
                if (p.entry->flags & CHUNK) COPY(anchor, state);
                if (p.entry->flags & CHUNK || n == 0) point = point_at(&p, anchor, room);
                if (p.entry->segment >= 0 && call->saved) COPY_FULL(call->saved + (h * call->segments + p.entry->segment) * FULL, state);
                write_piece(&p, point.weights, w, 0);
#if MOMENTUM
                Mixture m;
                mixture_of(&p, &m);
                read_mixed(&p, w, &m, state, r, 0);
#else
                read_piece(&p, w, &point, frame_at(&p, &point, state, room + STATE), r, 0);
#endif
                for (int t = 0; t < p.entry->count; t++) {
                    real *y = call->y + row_of(&p, t) * KEY;
                    EACH(c) STORE(y + c, LOAD(r->q[t] + c) + LOAD(scale + c) * LOAD(r->unit[t] + c) + LOAD(shift + c));
                }
#if MOMENTUM
                carry_mixed(&p, w, &m, state);
#else
                carry_piece(w, state);
#endif
            }
            if (call->closed[p.batch]) {
                if (shrinks(call)) shrink(call, state);
                COPY(anchor, state);
            }
            store_state(state, call->in + h * AREA, call->out + h * AREA);
            if (MOMENTUM) store_state(state + STATE, call->momentum_in + h * AREA, call->momentum_out + h * AREA);
            store_state(anchor, call->anchor_in + h * AREA, call->anchor_out + h * AREA);
        }
        free(w), free(r), free(state);
    }
}

/* ---- backward ---- */

/* d[i] += sign * sum over t >= i of s[t][i] * g[t] * (decay between i and t). */
INLINE void attend_back(wide d, const square s, const wide g, const wide alpha, const int sign) {
    wide later;
    memcpy(later, g, sizeof later);
    for (int i = TOKENS - 1; i >= 0; i--) {
        for (int t = i; t < TOKENS; t++)
            EACH(c) {
                vec x = LOAD(later[t] + c);
                if (t > i && i + 1 < TOKENS) {
                    x *= LOAD(alpha[i + 1] + c);
                    STORE(later[t] + c, x);
                }
                if (sign > 0) STORE(d[i] + c, LOAD(d[i] + c) + s[t][i] * x);
                else STORE(d[i] + c, LOAD(d[i] + c) - s[t][i] * x);
            }
    }
}

/* Gradient through a piece's carry; d_state, of the state after it, becomes that of the state before it (less what reads add). */
static void carry_back(const Writes *w, const real *state, real *d_state, Back *b) {
    wide f, d;
    turned x;
    for (int half = 0; half < 2; half++) {
        const real *from = state + half * AREA;
        real *grad = d_state + half * AREA;
        const real(*factor)[KEY] = half ? w->f_out : w->f_in;
        real(*d_factor)[KEY] = half ? b->f_out : b->f_in;
        const wide *alpha = &w->alpha[half * OUT];
        decay_to_end(factor, *alpha, f);
        turn(x, f);
        through(half ? b->act : b->gp, grad, x, SET, -1);
        gather(d, half ? w->act : w->gp, grad, SET, -1);
        EACH(c) { /* back to each token's own factor */
            vec a = splat(1), along = splat(0);
            for (int t = TOKENS - 1; t >= 0; t--) {
                const vec g = LOAD(d[t] + c) * a;
                STORE(d_factor[t] + c, g);
                along += g * LOAD(factor[t] + c);
                a *= LOAD((*alpha)[t] + c);
            }
            const vec keep = LOAD(w->total[half * OUT] + c);
            for (int o = 0; o < HIDDEN; o++) {
                const vec g = LOAD(grad + o * KEY + c) * keep;
                along += g * LOAD(from + o * KEY + c);
                STORE(grad + o * KEY + c, g);
            }
            STORE(b->total[half * OUT] + c, half && !OUT ? LOAD(b->total[0] + c) + along : along);
        }
    }
}

/* Gradient through a piece's reads: to q, the state, and what the piece writes with. */
static void read_back(const Place *p, const Gradients *out, const Writes *w, const Point *point, const real *state, const Reads *r, real *d_state,
                      Totals *sums, Back *b) {
    wide d_y, d_u, f, moved;
    hidden d_act;
    square d_s, d_a, d_a_turned;
    turned x;
    load(p, out->y, KEY, d_y);
    memset(d_a, 0, sizeof d_a);
    memset(d_a_turned, 0, sizeof d_a_turned);
    memcpy(f, w->f_out, sizeof f);
    for (int t = 0; t < TOKENS; t++) {
        output_back(p, d_y[t], r, t, sums, d_u[t]);
        if (LINK == SCALED) {
            sums->factor[1] += dot(d_u[t], r->u[t]);
            EACH(c) STORE(d_u[t] + c, LOAD(d_u[t] + c) * factor_of(point, 1));
        }
        decay_rows(f, w->alpha[OUT], t);
        for (int i = 0; i <= t; i++) d_a[t][i] = d_a_turned[i][t] = -dot(d_u[t], f[i]);
        EACH(c) STORE(b->log_alpha[OUT][t] + c, LOAD(d_u[t] + c) * LOAD(r->u[t] + c));
        EACH(c) STORE(moved[t] + c, LOAD(d_u[t] + c) * LOAD(r->decay[OUT][t] + c));
    }
    square a; /* a[t][i], zero above the diagonal */
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < TOKENS; i++) a[t][i] = i <= t ? r->a_turned[i][t] : 0;
    attend_back(b->f_out, a, d_u, w->alpha[OUT], -1);
    turn(x, moved);
    through(d_act, state + AREA, x, SET, 1);
    update(d_state + AREA, EVEN_ACT(r), moved, ADD, 1, NULL);
    mix(d_act, EVEN_ACT(w), d_a_turned, ADD, 1);
    mix(b->act, EVEN_ACT(r), d_a, ADD, 1);
    vec along = splat(0);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) { /* of pre */
            const vec d = LOAD(d_act[o] + t) * LOAD(r->slope[o] + t);
            if (LINK == SCALED) along += d * LOAD(r->pre[o] + t);
            STORE(d_act[o] + t, d * factor_of(point, 0));
        }
    if (LINK == SCALED) sums->factor[0] += sum_of(along);
    gather(moved, d_act, state, SET, 1);
    update(d_state, d_act, r->decayed_q, ADD, 1, NULL);
    mix(b->gp, d_act, r->s, ADD, -1);
    scores(d_a_turned, w->gp, d_act, SET, -1);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < TOKENS; i++) d_s[t][i] = i <= t ? d_a_turned[i][t] : 0;
    memcpy(f, EVEN_F(w), sizeof f);
    real ones[TOKENS];
    if (LINK == SIMPLEX) sum_hidden(d_act, ones);
    for (int t = 0; t < TOKENS; t++) {
        decay_rows(f, w->alpha[0], t);
        EACH(c) {
            vec d = LOAD(moved[t] + c) * LOAD(r->decay[0][t] + c);
            for (int i = 0; i <= t; i++) d += d_s[t][i] * LOAD(f[i] + c);
            const vec along = d * LOAD(r->q[t] + c);
            STORE(b->log_alpha[0][t] + c, OUT ? along : LOAD(b->log_alpha[0][t] + c) + along);
            STORE(b->q[t] + c, d + LOAD(d_y[t] + c) + (LINK == SIMPLEX ? ones[t] : 0));
        }
    }
    if (LINK == SIMPLEX) {
        memset(f, 0, sizeof f);
        attend_back(f, d_s, r->q, w->alpha[0], 1);
        even_wide(f, f);
        for (int t = 0; t < TOKENS; t++) EACH(c) STORE(b->f_in[t] + c, LOAD(b->f_in[t] + c) + LOAD(f[t] + c));
    } else attend_back(b->f_in, d_s, r->q, w->alpha[0], 1);
}

/* Gradient through what a piece writes with: to k, v, the gates and the chunk's first state. */
static void write_back(const Place *p, const real *anchor, const Writes *w, real *d_anchor, Totals *sums, Back *b) {
    const real *scale = p->call->scale + p->head * KEY;
    hidden d_pre;
    wide d_gu, d_u;
    turned x;
    for (int t = 0; t < TOKENS; t++)
        EACH(c) {
            const vec f_in = LOAD(b->f_in[t] + c), f_out = LOAD(b->f_out[t] + c), eta = LOAD(w->eta[t] + c);
            STORE(b->k[t] + c, f_in * eta);
            STORE(d_gu[t] + c, f_out * eta);
            if (MOMENTUM) continue;
            STORE(b->log_alpha[0][t] + c, LOAD(b->log_alpha[0][t] + c) - f_in * LOAD(w->f_in[t] + c));
            STORE(b->log_alpha[OUT][t] + c, LOAD(b->log_alpha[OUT][t] + c) - f_out * LOAD(w->f_out[t] + c));
            STORE(b->eta[t] + c, f_in * LOAD(w->k[t] + c) + f_out * LOAD(w->gu[t] + c));
        }
    for (int half = 0; half <= OUT && !MOMENTUM; half++)
        EACH(c) {
            vec later = LOAD(b->total[half] + c);
            for (int t = TOKENS - 1; t >= 0; t--) {
                later += LOAD(b->log_alpha[half][t] + c);
                STORE(b->log_alpha[half][t] + c, later);
            }
        }
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) {
            const vec g = LOAD(b->gp[o] + t);
            STORE(d_pre[o] + t, g * LOAD(w->back[o] + t) * LOAD(w->curve[o] + t));
            STORE(b->gp[o] + t, g * LOAD(w->slope[o] + t)); /* of back */
        }
    gather(d_gu, b->gp, anchor + AREA, ADD, 1);
    update(d_anchor + AREA, b->gp, w->gu, ADD, 1, NULL);
    for (int t = 0; t < TOKENS; t++) {
        line a, unit, g; /* a: gradient of gu / rate; then of unit */
        const real rate = w->rate[t];
        EACH(c) STORE(a + c, LOAD(d_gu[t] + c) * rate);
        const real mean = total_of(a) / KEY, along = dot(a, w->unit[t]) / KEY, of_rate = dot(d_gu[t], w->gu[t]) * rate / KEY;
        real of_phi = 0, bent = 0; /* phi . d_phi, and what the norm takes of it */
        if (OVER_CHANNELS) {
            line d_phi;
            EACH(c) STORE(d_phi + c, LOAD(scale + c) * (LOAD(a + c) - mean - LOAD(w->unit[t] + c) * along));
            of_phi = dot(w->phi[t], d_phi);
            bent = of_phi * w->bend[t].bend;
        }
        EACH(c) {
            const vec gain = LOAD(scale + c), u = LOAD(w->unit[t] + c), phi = LOAD(w->phi[t] + c), d = LOAD(a + c);
            const vec d_g = d - mean - u * along, d_phi = gain * d_g;
            const vec along_r = d_phi * LOAD(w->phi_slope[t] + c), d_r = OVER_CHANNELS ? along_r - phi * bent : along_r;
            STORE(unit + c, gain * d_r - d * w->mean_gu[t] - gain * phi * along);
            STORE(sums->scale + c, LOAD(sums->scale + c) + d_g * phi + d_r * u);
            STORE(sums->shift + c, LOAD(sums->shift + c) + d_r);
            STORE(b->k[t] + c, LOAD(b->k[t] + c) + d_r);
            STORE(b->v[t] + c, -d_r);
            if (DELTA_ALONE) STORE(b->delta[t] + c, d_phi * LOAD(w->phi_delta[t] + c));
            if (DELTA_MEAN) STORE(b->delta[t] + c, splat(of_phi * w->bend[t].by_delta / KEY));
        }
        normalise_back(unit, w->unit[t], rate, g);
        EACH(c) STORE(d_u[t] + c, LOAD(g + c) - of_rate * LOAD(w->unit[t] + c));
    }
    turn(x, d_u);
    through(b->act, anchor + AREA, x, ADD, 1);
    update(d_anchor + AREA, EVEN_ACT(w), d_u, ADD, 1, NULL);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) STORE(d_pre[o] + t, LOAD(d_pre[o] + t) + LOAD(b->act[o] + t) * LOAD(w->slope[o] + t));
    gather(b->k, d_pre, anchor, ADD, 1);
    if (LINK == SIMPLEX) {
        real ones[TOKENS];
        sum_hidden(d_pre, ones);
        for (int t = 0; t < TOKENS; t++) EACH(c) STORE(b->k[t] + c, LOAD(b->k[t] + c) + ones[t]);
    }
    update(d_anchor, d_pre, w->k, ADD, 1, NULL);
}

/* Everything a thread needs to replay and differentiate one segment. */
typedef struct {
    Writes writes[SEGMENT];
    Reads reads;
    Back back;
    real state[SEGMENT][FULL] __attribute__((aligned(64))); /* at the start of each piece */
    real anchor[STATE] __attribute__((aligned(64)));         /* of the chunk that is open when the segment starts */
    real d_state[FULL] __attribute__((aligned(64))), d_anchor[STATE] __attribute__((aligned(64))), d_start[STATE] __attribute__((aligned(64)));
    /* for links: weights of chunks that start at a piece (or are open at the first); gradient of the chunk's weights */
    real room[SEGMENT][STATE] __attribute__((aligned(64))), d_weights[STATE] __attribute__((aligned(64)));
    real frame[STATE] __attribute__((aligned(64))), d_frame[STATE] __attribute__((aligned(64))); /* of a piece inside a chunk */
    Totals sums;
#if MOMENTUM
    Mixture mixture;
    MixtureBack d_mixture;
#endif
} Work;

static void add_state(real *to, const real *from) {
    for (ptrdiff_t n = 0; n < STATE; n += LANES) STORE(to + n, LOAD(to + n) + LOAD(from + n));
}

/* Gradient of a chunk's weights and factors, to its first state and the radius. */
INLINE void point_back(const Place *p, const Point *point, Work *m, real *d_dual) {
    if (LINK == IDENTITY) return;
    if (LINK == SIMPLEX) softmax_back(point->weights, m->d_weights, d_dual);
    if (LINK == SCALED) for (int half = 0; half < 2; half++) {
        const real *x = point->dual + half * AREA, *g = m->d_weights + half * AREA;
        const real q = (real)p->call->retention, radius = p->call->radius[p->head * 2 + half];
        const real size = point->norm[half] + LINK_EPS, factor = point->factor[half];
        vec sum = splat(0);
        for (ptrdiff_t n = 0; n < AREA; n += LANES) sum += LOAD(x + n) * LOAD(g + n);
        const real along = radius <= size ? (q - 2) * factor * (m->sums.factor[half] + sum_of(sum)) : 0;
        const real inverse = point->norm[half] > 0 ? 1 / point->norm[half] : 0;
        for (ptrdiff_t n = 0; n < AREA; n += LANES) {
            const vec unit = LOAD(x + n) * inverse;
            real *to = d_dual + half * AREA + n;
            STORE(to, LOAD(to) + factor * LOAD(g + n) - along / size * unit * entry_power(unit, q - 2));
        }
        m->sums.radius[half] += along / radius;
        m->sums.factor[half] = 0;
    }
    memset(m->d_weights, 0, sizeof m->d_weights);
}

/* Gradient of a piece's frame, m->d_frame: to its state, the chunk's first state and weights, and the decay between. */
static void frame_back(const Place *p, const Point *point, Work *m) {
    real *g = m->d_frame;
    line kept[2];
    kept_before(p, kept);
    for (int half = 0; half < 2; half++)
        for (ptrdiff_t n = half * AREA; n < (half + 1) * AREA; n += KEY)
            EACH(c) {
                const vec d = LOAD(kept[half] + c) * LOAD(g + n + c);
                STORE(m->d_weights + n + c, LOAD(m->d_weights + n + c) + d);
                STORE(m->sums.kept[half] + c, LOAD(m->sums.kept[half] + c) + d * LOAD(point->weights + n + c));
            }
    even_rows(g);
    add_state(m->d_state, g);
    for (int half = 0; half < 2; half++)
        for (ptrdiff_t n = half * AREA; n < (half + 1) * AREA; n += KEY)
            EACH(c) {
                const vec d = LOAD(kept[half] + c) * LOAD(g + n + c);
                STORE(m->d_anchor + n + c, LOAD(m->d_anchor + n + c) - d);
                STORE(m->sums.kept[half] + c, LOAD(m->sums.kept[half] + c) - d * LOAD(point->dual + n + c));
            }
}

/* One segment: entries from `low` to `high`. */
static void segment_back(Place *p, const Gradients *out, ptrdiff_t h, int32_t low, int32_t high, Work *m) {
    const Call *call = p->call;
    const Entry *entries = call->table + p->batch * call->rows;
    const real *saved = call->saved + h * call->segments * FULL;
    real *d_weights = LINK == IDENTITY ? m->d_anchor : m->d_weights;
    Point points[SEGMENT];
    COPY_FULL(m->state[0], saved + entries[low].segment * FULL);
    if (!(entries[low].flags & CHUNK)) {
        if (entries[low].anchor >= 0) COPY(m->anchor, saved + entries[low].anchor * FULL);
        else load_state(call->anchor_in + h * AREA, call->anchor_out + h * AREA, m->anchor);
    }
    for (int32_t n = low; n < high; n++) {
        const int32_t at = n - low;
        p->entry = entries + n;
        if (at && entries[n].flags & DOCUMENT) start_state(p, m->state[at]);
        if (at && settled(call, entries + n, n)) shrink(call, m->state[at]);
        if (entries[n].flags & CHUNK || !at) points[at] = point_at(p, entries[n].flags & CHUNK ? m->state[at] : m->anchor, m->room[at]);
        else points[at] = points[at - 1];
        write_piece(p, points[at].weights, &m->writes[at], 1);
        if (n + 1 < high) {
            COPY_FULL(m->state[at + 1], m->state[at]);
#if MOMENTUM
            mixture_of(p, &m->mixture);
            carry_mixed(p, &m->writes[at], &m->mixture, m->state[at + 1]);
#else
            carry_piece(&m->writes[at], m->state[at + 1]);
#endif
        }
    }
    for (int32_t n = high - 1; n >= low; n--) {
        const int32_t at = n - low;
        const Writes *w = &m->writes[at];
        Back *b = &m->back;
        p->entry = entries + n;
#if MOMENTUM
        mixture_of(p, &m->mixture);
        memset(&m->d_mixture, 0, sizeof m->d_mixture);
        read_mixed(p, w, &m->mixture, m->state[at], &m->reads, 1);
        carry_mixed_back(p, w, &m->mixture, m->state[at], m->d_state, &m->d_mixture, b);
        read_mixed_back(p, out, w, &m->mixture, m->state[at], &m->reads, m->d_state, &m->sums, &m->d_mixture, b);
        mixture_back(p, out, &m->mixture, &m->d_mixture);
#else
        const int inside = LINK == SIMPLEX && !(p->entry->flags & CHUNK);
        const real *frame = frame_at(p, &points[at], m->state[at], m->frame);
        real *d_frame = inside ? m->d_frame : LINK == SIMPLEX ? m->d_weights : m->d_state;
        read_piece(p, w, &points[at], frame, &m->reads, 1);
        carry_back(w, m->state[at], m->d_state, b);
        if (LINK == SIMPLEX) /* later pieces of the chunk see the decay of this one in their frames, too */
            for (int half = 0; half < 2; half++) {
                real *total = b->total[half * OUT];
                EACH(c) STORE(total + c, LOAD(total + c) + LOAD(m->sums.kept[half] + c));
            }
        if (inside) memset(m->d_frame, 0, sizeof m->d_frame);
        read_back(p, out, w, &points[at], frame, &m->reads, d_frame, &m->sums, b);
        if (inside) frame_back(p, &points[at], m);
#endif
        write_back(p, points[at].weights, w, d_weights, &m->sums, b);
        store(p, b->q, out->q, KEY);
        store(p, b->k, out->k, KEY);
        store(p, b->v, out->v, KEY);
        if (!MOMENTUM) store(p, b->eta, out->eta, call->eta_channels);
        if (!MOMENTUM) store(p, b->log_alpha[OUT], out->log_alpha, call->alpha_channels);
        if (LINK == SIMPLEX) store(p, b->log_alpha[0], out->log_alpha_in, 1);
        if (HAS_DELTA) store(p, b->delta, out->delta, call->delta_channels);
        if (entries[n].flags & CHUNK) {
            add_state(m->d_state, m->d_anchor);
            memset(m->d_anchor, 0, sizeof m->d_anchor);
            point_back(p, &points[at], m, m->d_state);
            if (LINK == SIMPLEX) memset(m->sums.kept, 0, sizeof m->sums.kept);
        } else if (n == 0) point_back(p, &points[at], m, m->d_anchor);
        if (settled(call, entries + n, n)) shrink_back(m->state[at], m->d_state);
        if (entries[n].flags & DOCUMENT) {
            add_state(m->d_start, m->d_state);
            memset(m->d_state, 0, sizeof m->d_state); /* a document starts without momentum */
        }
    }
}

/* Gradients of a call whose `in`, `out`, anchors are those it started from; `saved` is what forward left there. */
void backward(const Call *call, const Gradients *out) {
    const ptrdiff_t heads = call->batch * call->heads;
    const size_t tokens = (size_t)(heads * call->length * KEY) * sizeof(real);
    large_pages(out->q, tokens);
    large_pages(out->k, tokens);
    large_pages(out->v, tokens);
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        Work *m = aligned_alloc(64, (sizeof *m + 63) / 64 * 64);
#pragma omp for schedule(dynamic, 1)
        for (ptrdiff_t h = 0; h < heads; h++) {
            Place p = {call, NULL, call->order + h / call->heads * call->length, h / call->heads, h % call->heads};
            const Entry *entries = call->table + p.batch * call->rows;
            memset(&m->sums, 0, sizeof m->sums);
            if (LINK != IDENTITY) memset(m->d_weights, 0, sizeof m->d_weights);
            memset(m->d_start, 0, sizeof m->d_start);
            load_state(out->in + h * AREA, out->out + h * AREA, m->d_state);
            if (MOMENTUM) load_state(out->momentum_in + h * AREA, out->momentum_out + h * AREA, m->d_state + STATE);
            load_state(out->anchor_in + h * AREA, out->anchor_out + h * AREA, m->d_anchor);
            if (call->closed[p.batch]) {
                add_state(m->d_state, m->d_anchor);
                memset(m->d_anchor, 0, sizeof m->d_anchor);
            }
            for (int32_t high = call->n_entries[p.batch], low; high > 0; high = low) {
                for (low = high - 1; entries[low].segment < 0; low--) {}
                segment_back(&p, out, h, low, high, m);
            }
            store_state(m->d_state, out->in + h * AREA, out->out + h * AREA);
            if (MOMENTUM) store_state(m->d_state + STATE, out->momentum_in + h * AREA, out->momentum_out + h * AREA);
            store_state(m->d_anchor, out->anchor_in + h * AREA, out->anchor_out + h * AREA);
            if (out->start_in) store_state(m->d_start, out->start_in + h * AREA, out->start_out + h * AREA);
            memcpy(out->scale + h * KEY, m->sums.scale, sizeof m->sums.scale);
            memcpy(out->shift + h * KEY, m->sums.shift, sizeof m->sums.shift);
            if (LINK == SIMPLEX) {
                real *to = out->kept_out + h * call->alpha_channels;
                out->kept_in[h] = total_of(m->sums.kept[0]);
                if (call->alpha_channels == 1) to[0] = total_of(m->sums.kept[1]);
                else memcpy(to, m->sums.kept[1], sizeof m->sums.kept[1]);
            }
            if (LINK == SCALED) memcpy(out->radius + h * 2, m->sums.radius, sizeof m->sums.radius);
        }
        free(m);
    }
}

/* The table of pieces. phase [batch]: tokens in the open chunk, before and after; valid, reset [batch][length] or NULL.
 * order needs batch * length, table batch * length entries; returns the largest number of segments. The rows of the table are `length`. */
ptrdiff_t plan(ptrdiff_t batch, ptrdiff_t length, ptrdiff_t chunk, const uint8_t *valid, const uint8_t *reset, int64_t *phase, int32_t *order,
               Entry *table, int32_t *n_entries, int32_t *closed) {
    const ptrdiff_t need = (chunk + TOKENS - 1) / TOKENS;
    ptrdiff_t most = 0;
    for (ptrdiff_t b = 0; b < batch; b++) {
        int32_t n = -1, count = 0, segments = 0, pieces = 0, chunk_segment = -1;
        for (ptrdiff_t t = 0; t < length; t++) {
            if (valid && !valid[b * length + t]) continue;
            const int document = reset && reset[b * length + t];
            if (document) phase[b] = 0;
            if (n < 0 || phase[b] == 0 || table[b * length + n].count == TOKENS) {
                const int flags = (document ? DOCUMENT : 0) | (phase[b] == 0 ? CHUNK : 0);
                const int fresh = n < 0 || pieces == SEGMENT || (flags & CHUNK && (need > SEGMENT || pieces + need > SEGMENT));
                if (fresh) segments++, pieces = 0;
                if (flags & CHUNK) chunk_segment = segments - 1;
                table[b * length + ++n] = (Entry){count, 0, flags, fresh ? segments - 1 : -1, chunk_segment};
                pieces++;
            }
            order[b * length + count++] = (int32_t)t;
            table[b * length + n].count++;
            phase[b] = (phase[b] + 1) % chunk;
        }
        n_entries[b] = n + 1;
        closed[b] = n >= 0 && phase[b] == 0;
        if (segments > most) most = segments;
    }
    return most;
}
