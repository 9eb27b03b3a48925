/* Multi-Token Attention, forward and backward: a task walks over the rows of a few heads, strip by strip, and nothing but the strips it
 * stands on is ever in memory. Products: products.h; what mixes tokens and heads: stencil.c, of which a call brings the functions for
 * its shapes. Oracle: recollect/ops/multi_token.py, `materialized`.
 *
 * A task is a group of heads that mix, of one batch element, and a segment of the queries. Forward goes down: every strip leaves the
 * last rows of raw logits and of weights to the next, which its convolutions read. Backward goes up: it computes raw logits and weights
 * again, as many rows ahead as the convolutions reach, and every strip leaves the first rows of its gradients to the one above. A segment
 * starts with strips of its neighbour that are computed and not counted. Threads have tasks of their own, or where these are few work as
 * a team on one task after the other, every step of a strip shared by heads or rows; no sum depends on who does what.
 */
#ifdef TILES
#include "products_tiles.h"
#else
#include "products.h"
#endif
#include "pages.h"

/* One side of the softmax: what it has learned, and its functions (stencil.c). NULL where a part is missing. */
typedef struct {
    ptrdiff_t halo, left, taps, group; /* rows above that are read, keys to the left, CQ * CK, CH */
    const real *kernel, *flipped;      /* [heads][taps] */
    const real *matrix, *transposed;   /* [heads / CH][CH][CH] */
    real *kernel_grad, *matrix_grad;   /* [segments][batch][as above], zeros at first */
    void (*forward)(const Strip *, const real *, ptrdiff_t, const real *, const real *, real *, ptrdiff_t, real *, ptrdiff_t, int, real *,
                    ptrdiff_t);
    void (*mix_gradient)(const Strip *, const real *, ptrdiff_t, const real *, ptrdiff_t, int, int, real *);
    void (*mix_backward)(const Strip *, real *, ptrdiff_t, const real *);
    void (*correlate)(const Strip *, const real *, const real *, ptrdiff_t, real *);
    void (*convolution_backward)(const Strip *, const real *, const real *, real *, const real *);
} Side;

/* One call. Row r of queries stands at position keys - queries + r. Rows of q, grad_out, out are [batch * heads][length][width]. */
typedef struct {
    ptrdiff_t batch, heads, group, queries, keys, width, value_width;
    ptrdiff_t segments;             /* of the queries; segment i is bounds[i] .. bounds[i + 1] */
    const int64_t *bounds;
    ptrdiff_t strip;                /* rows of a strip */
    ptrdiff_t ld, pad, start_stride;
    const int64_t *start;           /* [batch][start_stride], NULL: all zero */
    const item *q, *packed;         /* packed: keys (forward), keys and values (backward), as pack() lays them */
    const item *woven_k, *woven_v, *turned_q, *turned_grad; /* keys, values, queries and grad_out as sums along and down a map read them */
    const real *mask;               /* [batch * heads][rows from bounds[0] on][keys], NULL: no dropout */
    ptrdiff_t mask_rows;
    const real *carried_raw, *carried_weights; /* [batch * heads][halo][ld], NULL: zeros */
    real *lse;                      /* [batch * heads][queries] */
    real *out, *last_raw, *last_weights; /* last_*: [batch * heads][halo][keys], NULL: not wanted */
    const item *grad_out;
    const real *grad_raw, *grad_weights; /* grad_raw, grad_weights: of the last rows, [batch * heads][n_*][keys] */
    ptrdiff_t n_raw, n_weights;
    real *grad_q, *const *grad_k, *const *grad_v; /* grad_k, grad_v: of every segment [batch * heads][seen_by][width], zeros at first */
    real *scratch;
    ptrdiff_t scratch_size;         /* of a task */
    int threads, team;              /* threads of a task: one, or all of them */
    Side pre, post;
} Call;

/* What a task holds. Maps point at column 0 of row 0 of the first head; `rows` of them lie between heads. */
typedef struct {
    real *at;
    ptrdiff_t rows;
} Map;

typedef struct {
    const Call *c;
    ptrdiff_t batch, head, segment; /* head: batch * heads + the first of the group */
    Map raw, soft, mid_pre, out, mid_post, d_post, d_pre, d_raw;
    real *sums_pre, *sums_post, *matrix_pre, *matrix_post; /* [group][taps][LANES], [group / CH][CH][CH][LANES] */
} Task;

/* A loop whose steps the threads of a task share. */
#define SHARED _Pragma("omp parallel for schedule(static) num_threads(c->team) if (c->team > 1)")

int lanes(void) { return WHOLE; }

int panel_width(void) { return PANEL; }

static ptrdiff_t padded(ptrdiff_t length) { return (length + PANEL - 1) / PANEL * PANEL; }

INLINE ptrdiff_t stride_of(const Task *t, Map m) { return m.rows * t->c->ld; }

INLINE real *row_of(const Task *t, Map m, ptrdiff_t head, ptrdiff_t row) { return m.at + (head * m.rows + row) * t->c->ld; }

static Map take_map(const Call *c, real **free, ptrdiff_t rows) {
    Map m = {*free + c->pad, rows};
    *free += c->group * rows * c->ld;
    return m;
}

static real *take(real **free, ptrdiff_t size) {
    real *at = *free;
    *free += size;
    return at;
}

/* Lay out a task's scratch; returns where it ends. */
static real *lay_out(const Call *c, Task *t, real *free, int backward) {
    const Side *pre = &c->pre, *post = &c->post;
    t->raw = take_map(c, &free, c->strip + pre->halo + (backward ? post->halo : 0));
    t->soft = take_map(c, &free, c->strip + post->halo);
    t->out = take_map(c, &free, c->strip);
    if (!backward) return free;
    t->mid_pre = take_map(c, &free, pre->matrix ? c->strip + post->halo : 0);
    t->mid_post = take_map(c, &free, post->matrix ? c->strip : 0);
    t->d_pre = take_map(c, &free, c->strip + pre->halo);
    t->d_post = post->kernel ? take_map(c, &free, c->strip + post->halo) : t->d_pre;
    t->d_raw = pre->kernel ? take_map(c, &free, c->strip) : t->d_pre;
    t->sums_pre = take(&free, c->group * pre->taps * LANES);
    t->sums_post = take(&free, c->group * post->taps * LANES);
    t->matrix_pre = take(&free, pre->matrix ? c->group * pre->group * LANES : 0);
    t->matrix_post = take(&free, post->matrix ? c->group * post->group * LANES : 0);
    return free;
}

/* Reals that a task needs. */
ptrdiff_t scratch_size(const Call *c, int backward) {
    Task t;
    return lay_out(c, &t, NULL, backward) - (real *)NULL + LANES;
}

static Task task_at(const Call *c, ptrdiff_t number, real *scratch, int backward) {
    const ptrdiff_t groups = c->heads / c->group, group = number % (c->batch * groups);
    Task t = {.c = c, .batch = group / groups, .head = group * c->group, .segment = c->segments - 1 - number / (c->batch * groups)};
    lay_out(c, &t, scratch, backward);
    return t;
}

static Strip strip_at(const Task *t, const Side *side, ptrdiff_t top, ptrdiff_t rows) {
    const Call *c = t->c;
    const ptrdiff_t first = c->keys - c->queries + top;
    /* The next strip reads rows of this one, up to its own last key, a vector and the reach of the convolution further. */
    const ptrdiff_t end = first + rows + c->strip + c->pre.halo + c->post.halo + PANEL + c->pad;
    return (Strip){rows, first, c->ld, c->pad, end < c->ld - c->pad ? end : c->ld - c->pad, side ? side->left : 0,
                   c->start ? c->start + t->batch * c->start_stride + top : NULL};
}

/* Rows top .. top + n of a strip. */
static Strip part_of(const Strip *s, ptrdiff_t top, ptrdiff_t n) {
    Strip part = *s;
    part.rows = n, part.first += top, part.start = s->start ? s->start + top : NULL;
    return part;
}

/* Move n rows of every head within a map. */
static void move(const Task *t, Map m, ptrdiff_t to, ptrdiff_t from, ptrdiff_t n) {
    const Call *c = t->c;
    if (to == from || m.rows == 0) return;
    SHARED for (ptrdiff_t h = 0; h < c->group; h++)
        memmove(row_of(t, m, h, to) - c->pad, row_of(t, m, h, from) - c->pad, (size_t)(n * c->ld) * sizeof(real));
}

/* Rows before the first query: the last n of `halo` carried ones, or zeros. */
static void fill_carried(const Task *t, Map m, ptrdiff_t row, ptrdiff_t first, ptrdiff_t n, const real *carried, ptrdiff_t halo) {
    const Call *c = t->c;
    for (ptrdiff_t h = 0; h < c->group; h++)
        for (ptrdiff_t i = 0; i < n; i++) {
            const ptrdiff_t from = halo + first + i; /* of the carried rows; `first` counts from the first query, so it is below zero */
            real *to = row_of(t, m, h, row + i) - c->pad;
            if (carried && from >= 0)
                memcpy(to, carried + ((t->head + h) * halo + from) * c->ld, (size_t)c->ld * sizeof(real));
            else
                memset(to, 0, (size_t)c->ld * sizeof(real));
        }
}

/* Those of the queries top .. bottom that come before the first, into a map from `row` on; returns how many they are. */
static ptrdiff_t fill_earlier(const Task *t, Map m, ptrdiff_t row, ptrdiff_t top, ptrdiff_t bottom, const real *carried, ptrdiff_t halo) {
    const ptrdiff_t n = top < 0 ? (bottom < 0 ? bottom : 0) - top : 0;
    fill_carried(t, m, row, top, n, carried, halo);
    return n;
}

/* Raw logits of the queries top .. bottom into the map from `row` on; rows before the first query are carried ones. */
static void raw_rows(const Task *t, ptrdiff_t row, ptrdiff_t top, ptrdiff_t bottom) {
    const Call *c = t->c;
    const ptrdiff_t n = fill_earlier(t, t->raw, row, top, bottom, c->carried_raw, c->pre.halo);
    row += n, top += n;
    if (top >= bottom) return;
    const Strip s = strip_at(t, NULL, top, bottom - top);
    SHARED for (ptrdiff_t h = 0; h < c->group; h++)
        logits(&s, c->q + ((t->head + h) * c->queries + top) * items_of(c->width), c->width,
               c->packed + (t->head + h) * padded(c->keys) * items_of(c->width), row_of(t, t->raw, h, row));
}

/* Forward of one side: a strip's rows of `out` (and `mid`, if there is one) from the rows of `in`. lse [heads][lse_hs], or NULL. */
static void side_forward(const Task *t, const Side *side, const Strip *s, Map in, ptrdiff_t in_row, Map out, ptrdiff_t out_row, Map mid,
                         int mode, real *lse, ptrdiff_t lse_hs) {
    const Call *c = t->c;
    const ptrdiff_t tiles = (s->rows + ROWS - 1) / ROWS;
    SHARED for (ptrdiff_t n = 0; n < c->group / side->group * tiles; n++) {
        const ptrdiff_t h = n / tiles * side->group, head = (t->head + h) % c->heads, top = n % tiles * ROWS;
        const Strip part = part_of(s, top, s->rows - top < ROWS ? s->rows - top : ROWS);
        side->forward(&part, row_of(t, in, h, in_row + top), stride_of(t, in), side->kernel ? side->kernel + head * side->taps : NULL,
                      side->matrix ? side->matrix + head * side->group : NULL, row_of(t, out, h, out_row + top), stride_of(t, out),
                      mid.rows ? row_of(t, mid, h, out_row + top) : NULL, stride_of(t, mid), mode, lse ? lse + h * lse_hs + top : NULL,
                      lse_hs);
    }
}

/* Softmax weights of the queries top .. bottom into the map from `row` on, from raw logits whose first row is `in`, c->pre.halo above. */
static void soft_rows(const Task *t, ptrdiff_t row, ptrdiff_t in, ptrdiff_t top, ptrdiff_t bottom, int mode, int own) {
    const Call *c = t->c;
    const ptrdiff_t n = fill_earlier(t, t->soft, row, top, bottom, c->carried_weights, c->post.halo);
    row += n, in += n, top += n;
    if (top >= bottom) return;
    const Strip s = strip_at(t, &c->pre, top, bottom - top);
    side_forward(t, &c->pre, &s, t->raw, in, t->soft, row, t->mid_pre, mode, own ? c->lse + t->head * c->queries + top : NULL, c->queries);
}

/* Multiply a strip's rows of a map with the dropout mask. */
static void apply_mask(const Task *t, Map m, ptrdiff_t top, ptrdiff_t n) {
    const Call *c = t->c;
    if (!c->mask) return;
    const Strip s = strip_at(t, NULL, top, n);
    SHARED for (ptrdiff_t h = 0; h < c->group; h++)
        for (ptrdiff_t r = 0; r < n; r++) {
            const real *mask = c->mask + ((t->head + h) * c->mask_rows + top - c->bounds[0] + r) * c->keys;
            real *row = row_of(t, m, h, r);
            for (ptrdiff_t j = start_of(&s, r); j <= s.first + r; j++) row[j] *= mask[j];
        }
}

/* Weights that values are read with, of the queries top .. top + n, whose softmax weights start in row 0 of the map, halo above. */
static Map final_rows(const Task *t, ptrdiff_t top, ptrdiff_t n) {
    const Call *c = t->c;
    const Side *side = &c->post;
    if (!side->kernel && !side->matrix && !c->mask) return t->soft;
    const Strip s = strip_at(t, side, top, n);
    side_forward(t, side, &s, t->soft, 0, t->out, 0, t->mid_post, LINEAR, NULL, 0);
    apply_mask(t, t->out, top, n);
    return t->out;
}

/* The last `halo` rows that stand before row `end` of a map, as carried rows. */
static void keep_last(const Task *t, Map m, ptrdiff_t end, ptrdiff_t halo, real *to) {
    const Call *c = t->c;
    for (ptrdiff_t h = 0; to && h < c->group; h++)
        for (ptrdiff_t i = 0; i < halo; i++)
            memcpy(to + ((t->head + h) * halo + i) * c->keys, row_of(t, m, h, end - halo + i), (size_t)c->keys * sizeof(real));
}

static void forward_task(const Task *t) {
    const Call *c = t->c;
    const ptrdiff_t pre = c->pre.halo, post = c->post.halo;
    const ptrdiff_t low = c->bounds[t->segment], high = c->bounds[t->segment + 1];
    ptrdiff_t bottom, top = low > pre + post ? low - pre - post : 0;
    fill_carried(t, t->raw, 0, -pre, pre, top ? NULL : c->carried_raw, pre);
    fill_carried(t, t->soft, 0, -post, post, top ? NULL : c->carried_weights, post);
    for (; top < high; top = bottom) {
        const ptrdiff_t end = top < low ? low : high;
        bottom = top + c->strip < end ? top + c->strip : end;
        const ptrdiff_t n = bottom - top;
        raw_rows(t, pre, top, bottom);
        soft_rows(t, post, 0, top, bottom, SOFTMAX, top >= low);
        if (top >= low) {
            const Map weights = final_rows(t, top, n);
            const Strip s = strip_at(t, NULL, top, n);
            SHARED for (ptrdiff_t h = 0; h < c->group; h++)
                read_rows(&s, row_of(t, weights, h, 0), c->woven_v + (t->head + h) * woven_items(c->keys, c->value_width), c->value_width,
                          c->out + ((t->head + h) * c->queries + top) * c->value_width);
        }
        if (bottom == c->queries) {
            keep_last(t, t->raw, pre + n, pre, c->last_raw);
            keep_last(t, t->soft, post + n, post, c->last_weights);
        }
        move(t, t->raw, 0, n, pre);
        move(t, t->soft, 0, n, post);
    }
}

/* Add the gradient of the last rows that the call returned to the rows of a map that are among them, where they are no constant zeros. */
static void add_last(const Task *t, ptrdiff_t h, Map m, ptrdiff_t top, ptrdiff_t n, const real *grad, ptrdiff_t n_last) {
    const Call *c = t->c;
    const Strip s = strip_at(t, NULL, top, n);
    const ptrdiff_t first = c->queries - n_last;
    for (ptrdiff_t r = first > top ? first - top : 0; grad && r < n; r++) {
        const real *from = grad + ((t->head + h) * n_last + top + r - first) * c->keys;
        real *row = row_of(t, m, h, r);
        for (ptrdiff_t j = start_of(&s, r); j <= s.first + r; j++) row[j] += from[j];
    }
}

/* The gradient of a softmax's input, in place of that of its output. */
static void softmax_backward(const Task *t, ptrdiff_t h, Map grad, Map soft, ptrdiff_t in_soft, ptrdiff_t top, ptrdiff_t n) {
    const Strip s = strip_at(t, NULL, top, n);
    for (ptrdiff_t r = 0; r < n; r++) {
        real *d = row_of(t, grad, h, r), total = 0;
        const real *p = row_of(t, soft, h, in_soft + r);
        for (ptrdiff_t j = start_of(&s, r); j <= s.first + r; j++) total += p[j] * d[j];
        for (ptrdiff_t j = start_of(&s, r); j <= s.first + r; j++) d[j] = p[j] * (d[j] - total);
    }
}

/* Head mixing backward of rows of a strip. The gradient of the matrix, from the output heads first .. last (of MIXED each). */
static void matrix_back(const Task *t, const Side *side, const Strip *s, ptrdiff_t h, ptrdiff_t row, Map grad, Map mid, ptrdiff_t in_mid,
                        ptrdiff_t first, ptrdiff_t last, real *sums) {
    side->mix_gradient(s, row_of(t, grad, h, row), stride_of(t, grad), row_of(t, mid, h, in_mid + row), stride_of(t, mid), (int)first,
                       (int)last, sums + h * side->group * LANES);
}

/* Then that of the map, in place on the first n rows of `grad`; sums: NULL where the rows are not the task's own. */
static void mix_back(const Task *t, const Side *side, Map grad, Map mid, ptrdiff_t in_mid, ptrdiff_t top, ptrdiff_t n, real *sums) {
    const Call *c = t->c;
    if (!side->matrix) return;
    const Strip s = strip_at(t, side, top, n);
    const ptrdiff_t groups = c->group / side->group, parts = (side->group + MIXED - 1) / MIXED;
    if (sums && c->team > 1) { /* threads share the output heads */
        SHARED for (ptrdiff_t i = 0; i < groups * parts; i++)
            matrix_back(t, side, &s, i / parts * side->group, 0, grad, mid, in_mid, i % parts, i % parts + 1, sums);
    }
    SHARED for (ptrdiff_t i = 0; i < groups * n; i++) { /* by rows, each of which stays in the second-level cache for both */
        const ptrdiff_t h = i / n * side->group, row = i % n;
        const Strip one = part_of(&s, row, 1);
        if (sums && c->team == 1) matrix_back(t, side, &one, h, row, grad, mid, in_mid, 0, parts, sums);
        side->mix_backward(&one, row_of(t, grad, h, row), stride_of(t, grad), side->transposed + (t->head + h) % c->heads * side->group);
    }
}

static void correlate_rows(const Task *t, const Side *side, ptrdiff_t h, Map in, ptrdiff_t in_row, Map grad, ptrdiff_t low, ptrdiff_t top,
                           ptrdiff_t n, real *sums) {
    const Call *c = t->c;
    const Strip s = strip_at(t, side, top, n);
    side->correlate(&s, row_of(t, in, h, in_row), row_of(t, grad, h, 0) - low * c->ld, low, sums + h * side->taps * LANES);
}

static void convolve_back(const Task *t, const Side *side, ptrdiff_t h, Map grad, Map grad_in, Map soft, ptrdiff_t in_soft, ptrdiff_t top,
                          ptrdiff_t n) {
    const Strip s = strip_at(t, side, top, n);
    side->convolution_backward(&s, row_of(t, grad, h, 0), side->flipped ? side->flipped + (t->head + h) % t->c->heads * side->taps : NULL,
                               row_of(t, grad_in, h, 0), soft.rows ? row_of(t, soft, h, in_soft) : NULL);
}

/* Keys that the queries of a segment see. */
static ptrdiff_t seen_by(const Call *c, ptrdiff_t segment) {
    return segment == c->segments - 1 ? c->keys : c->keys - c->queries + c->bounds[segment + 1];
}

/* Queries top .. bottom; `own`: they belong to the task, so their gradients count. */
static void backward_strip(const Task *t, ptrdiff_t top, ptrdiff_t bottom, int own) {
    const Call *c = t->c;
    const Side *pre = &c->pre, *post = &c->post;
    const ptrdiff_t n = bottom - top, up = pre->halo + post->halo, size = c->value_width, seen = seen_by(c, t->segment);
    const Strip s = strip_at(t, NULL, top, n);
    const Map none = {NULL, 0};

    move(t, t->raw, n, 0, up);
    raw_rows(t, 0, top - up, bottom - up);
    move(t, t->soft, n, 0, post->halo);
    move(t, t->mid_pre, n, 0, post->halo);
    soft_rows(t, 0, 0, top - post->halo, bottom - post->halo, SOFTMAX_KNOWN, 1);
    const Map weights = final_rows(t, top, n);

    move(t, t->d_pre, n, 0, pre->halo);
    if (post->kernel) move(t, t->d_post, n, 0, post->halo);
    SHARED for (ptrdiff_t h = 0; h < c->group; h++) {
        const ptrdiff_t head = t->head + h, before_values = c->batch * c->heads * items_of(c->width);
        if (own)
            accumulate(&s, row_of(t, weights, h, 0), c->turned_grad + head * turned_items(c->queries, size), c->queries, top, size,
                       c->grad_v[t->segment] + head * gradient_size(seen, size), seen);
        logits(&s, c->grad_out + (head * c->queries + top) * items_of(size), size,
               c->packed + (before_values + head * items_of(size)) * padded(c->keys), row_of(t, t->d_post, h, 0));
    }
    apply_mask(t, t->d_post, top, n);
    mix_back(t, post, t->d_post, t->mid_post, 0, top, n, own ? t->matrix_post : NULL);
    /* What follows is done head by head: the maps of one stay in the second-level cache from step to step. */
    const int returned = c->grad_weights && bottom > c->queries - c->n_weights;
    SHARED for (ptrdiff_t h = 0; h < c->group; h++) {
        if (post->kernel && own) correlate_rows(t, post, h, t->soft, post->halo, t->d_post, 0, top, n, t->sums_post);
        convolve_back(t, post, h, t->d_post, t->d_pre, returned ? none : t->soft, post->halo, top, n);
        if (!returned) continue;
        add_last(t, h, t->d_pre, top, n, c->grad_weights, c->n_weights);
        softmax_backward(t, h, t->d_pre, t->soft, post->halo, top, n);
    }
    mix_back(t, pre, t->d_pre, t->mid_pre, post->halo, top, n, own ? t->matrix_pre : NULL);
    if (!own) return;
    SHARED for (ptrdiff_t h = 0; h < c->group; h++) {
        if (pre->kernel) {
            correlate_rows(t, pre, h, t->raw, up, t->d_pre, 0, top, n, t->sums_pre);
            convolve_back(t, pre, h, t->d_pre, t->d_raw, none, 0, top, n);
            add_last(t, h, t->d_raw, top, n, c->grad_raw, c->n_raw);
        }
        const ptrdiff_t head = t->head + h, width = c->width;
        const real *grad = row_of(t, t->d_raw, h, 0);
        read_rows(&s, grad, c->woven_k + head * woven_items(c->keys, width), width, c->grad_q + (head * c->queries + top) * width);
        accumulate(&s, grad, c->turned_q + head * turned_items(c->queries, width), c->queries, top, width,
                   c->grad_k[t->segment] + head * gradient_size(seen, width), seen);
    }
}

static void add_up(const real *sums, ptrdiff_t n, real *to) {
    for (ptrdiff_t i = 0; i < n; i++) to[i] += sum_of(LOAD(sums + i * LANES));
}

static void backward_task(const Task *t) {
    const Call *c = t->c;
    const Side *pre = &c->pre, *post = &c->post;
    const ptrdiff_t up = pre->halo + post->halo, low = c->bounds[t->segment], high = c->bounds[t->segment + 1];
    const ptrdiff_t number = t->segment * c->batch * c->heads + t->head;
    ptrdiff_t top, bottom = high + up < c->queries ? high + up : c->queries;
    memset(t->sums_pre, 0, (size_t)(c->group * pre->taps * LANES) * sizeof(real));
    memset(t->sums_post, 0, (size_t)(c->group * post->taps * LANES) * sizeof(real));
    if (pre->matrix) memset(t->matrix_pre, 0, (size_t)(c->group * pre->group * LANES) * sizeof(real));
    if (post->matrix) memset(t->matrix_post, 0, (size_t)(c->group * post->group * LANES) * sizeof(real));
    raw_rows(t, 0, bottom - up, bottom);
    soft_rows(t, 0, 0, bottom - post->halo, bottom, SOFTMAX_KNOWN, 1);
    fill_carried(t, t->d_pre, 0, -pre->halo, pre->halo, NULL, pre->halo);
    if (post->kernel) fill_carried(t, t->d_post, 0, -post->halo, post->halo, NULL, post->halo);
    for (; bottom > low; bottom = top) {
        const ptrdiff_t end = bottom > high ? high : low;
        top = bottom - c->strip > end ? bottom - c->strip : end;
        backward_strip(t, top, bottom, bottom <= high);
    }
    for (ptrdiff_t h = 0; low == 0 && h < c->group; h++) { /* what carried rows give */
        if (pre->kernel && c->carried_raw)
            correlate_rows(t, pre, h, t->raw, post->halo, t->d_pre, pre->halo, -pre->halo, pre->halo, t->sums_pre);
        if (post->kernel && c->carried_weights)
            correlate_rows(t, post, h, t->soft, 0, t->d_post, post->halo, -post->halo, post->halo, t->sums_post);
    }
    add_up(t->sums_pre, c->group * pre->taps, pre->kernel_grad + number * pre->taps);
    add_up(t->sums_post, c->group * post->taps, post->kernel_grad + number * post->taps);
    if (pre->matrix) add_up(t->matrix_pre, c->group * pre->group, pre->matrix_grad + number * pre->group);
    if (post->matrix) add_up(t->matrix_post, c->group * post->group, post->matrix_grad + number * post->group);
}

/* Keys or values [n][length][width] as packed panels. */
void pack_all(const item *in, ptrdiff_t n, ptrdiff_t length, ptrdiff_t width, item *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (ptrdiff_t i = 0; i < n; i++)
        pack(in + i * length * items_of(width), length, width, out + i * padded(length) * items_of(width));
}

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

static void do_task(const Call *c, ptrdiff_t number, real *scratch, int backward) {
    const Task t = task_at(c, number, scratch, backward);
    if (backward)
        backward_task(&t);
    else
        forward_task(&t);
}

void run(const Call *c, int backward) {
    const ptrdiff_t tasks = c->batch * c->heads / c->group * c->segments;
    const size_t bytes = (size_t)(c->scratch_size * (c->team > 1 ? 1 : c->threads)) * sizeof(real);
    if (bytes > 1 << 23) large_pages(c->scratch, bytes); /* of less, zeroing whole ones would cost more */
    if (c->team > 1) {
        for (ptrdiff_t number = 0; number < tasks; number++) do_task(c, number, c->scratch, backward);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(c->threads) if (c->threads > 1)
    for (ptrdiff_t number = 0; number < tasks; number++) do_task(c, number, c->scratch + THREAD * c->scratch_size, backward);
}
