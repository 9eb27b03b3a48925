/* The rule with momentum: S_t = mu_t S_{t-1} - eta_t g_t, Z_t = alpha_t Z_{t-1} + S_t, every gate one number per token.
 *
 * In a piece both are linear in what it starts from and in its gradients:
 *   Z_t = keep_t Z + boost_t S - sum over i <= t of weight[t][i] g_i,   S_t = slow_t S - sum over i <= t of pulled[t][i] g_i
 * so a read has three parts. f_in and f_out are k and gu here, eta being in the weights. A state is Z and, behind it, S.
 */

/* Rows at and behind the piece's last token stay 0. */
typedef struct {
    real alpha[TOKENS], mu[TOKENS], keep[TOKENS], boost[TOKENS], slow[TOKENS];
    square weight, pulled;
    square kq, act;   /* k_i . q_t [t][i] and act_i . act_t [i][t] */
} Mixture;

/* Gradients of a Mixture; of slow and pulled only at the last token. */
typedef struct {
    real keep[TOKENS], boost[TOKENS], slow, pulled[TOKENS];
    square weight;
} MixtureBack;

static real exp_real(real x) { return sizeof(real) == 4 ? expf((float)x) : exp(x); }

static void mixture_of(const Place *p, Mixture *m) {
    real kept = 0, slowed = 0; /* logs: products' roundings, mostly the same at every token, would grow with the length */
    memset(m, 0, sizeof *m);
    for (int t = 0; t < p->entry->count; t++) {
        const ptrdiff_t at = row_of(p, t);
        const real alpha = exp_real(p->call->log_alpha[at]), mu = exp_real(p->call->log_momentum[at]);
        m->alpha[t] = alpha;
        m->mu[t] = mu;
        m->slow[t] = exp_real(slowed += p->call->log_momentum[at]);
        m->keep[t] = exp_real(kept += p->call->log_alpha[at]);
        m->boost[t] = (t ? m->boost[t - 1] * alpha : 0) + m->slow[t];
        for (int i = 0; i < t; i++) {
            m->pulled[t][i] = m->pulled[t - 1][i] * mu;
            m->weight[t][i] = m->weight[t - 1][i] * alpha + m->pulled[t][i];
        }
        m->weight[t][t] = m->pulled[t][t] = p->call->eta[at];
    }
}

/* Gradients of the gates from those of what they make; d is used up. */
static void mixture_back(const Place *p, const Gradients *out, const Mixture *m, MixtureBack *d) {
    real pulled[TOKENS], slow = d->slow;
    memcpy(pulled, d->pulled, sizeof pulled);
    for (int t = p->entry->count - 1; t >= 0; t--) {
        const ptrdiff_t at = row_of(p, t);
        real alpha = d->keep[t] * (t ? m->keep[t - 1] : 1), mu = 0;
        slow += d->boost[t];
        if (t) {
            alpha += d->boost[t] * m->boost[t - 1];
            d->keep[t - 1] += d->keep[t] * m->alpha[t];
            d->boost[t - 1] += d->boost[t] * m->alpha[t];
        }
        for (int i = 0; i < t; i++) {
            alpha += d->weight[t][i] * m->weight[t - 1][i];
            d->weight[t - 1][i] += d->weight[t][i] * m->alpha[t];
            pulled[i] += d->weight[t][i];
            mu += pulled[i] * m->pulled[t - 1][i];
            pulled[i] *= m->mu[t];
        }
        mu += slow * (t ? m->slow[t - 1] : 1);
        slow *= m->mu[t];
        out->eta[at] = d->weight[t][t] + pulled[t];
        out->log_alpha[at] = alpha * m->alpha[t];
        out->log_momentum[at] = mu * m->mu[t];
    }
}

/* out[t] = x[t] * by[t] */
INLINE void scale_rows(wide out, const wide x, const real *by) {
    for (int t = 0; t < TOKENS; t++) EACH(c) STORE(out[t] + c, LOAD(x[t] + c) * by[t]);
}

/* Reads of a piece that starts at `state`: everything up to the normalised output. */
static void read_mixed(const Place *p, const Writes *w, Mixture *m, const real *state, Reads *r, const int again) {
    hidden moved;
    wide u;
    turned x;
    load(p, p->call->q, KEY, r->q);
    memset(r->s, 0, sizeof r->s);
    memset(r->s_turned, 0, sizeof r->s_turned);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i <= t; i++) {
            m->kq[t][i] = dot(r->q[t], w->k[i]);
            r->s[t][i] = r->s_turned[i][t] = m->kq[t][i] * m->weight[t][i];
        }
    turn(x, r->q);
    through(r->pre, state, x, SET, 1);
    through(moved, state + STATE, x, SET, 1);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES)
            STORE(r->pre[o] + t, LOAD(r->pre[o] + t) * LOAD(m->keep + t) + LOAD(moved[o] + t) * LOAD(m->boost + t));
    mix(r->pre, w->gp, r->s_turned, ADD, -1);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) {
            vec value, slope;
            gelu(LOAD(r->pre[o] + t), &value, &slope, NULL);
            STORE(r->act[o] + t, value);
            STORE(r->slope[o] + t, slope);
        }
    scores(m->act, w->act, r->act, SET, 1);
    if (again) load(p, p->call->read, KEY, r->u);
    else {
        gather(r->u, r->act, state + AREA, SET, 1);
        gather(u, r->act, state + STATE + AREA, SET, 1);
        for (int t = 0; t < TOKENS; t++)
            EACH(c) {
                vec sum = LOAD(r->u[t] + c) * m->keep[t] + LOAD(u[t] + c) * m->boost[t];
                for (int i = 0; i <= t; i++) sum -= LOAD(w->gu[i] + c) * (m->weight[t][i] * m->act[i][t]);
                STORE(r->u[t] + c, sum);
            }
        if (p->call->saved) store(p, r->u, p->call->read, KEY);
    }
    for (int t = 0; t < TOKENS; t++) r->rate[t] = normalise(r->u[t], 1, r->unit[t]);
}

/* The state after a piece. */
static void carry_mixed(const Place *p, const Writes *w, const Mixture *m, real *state) {
    const int last = p->entry->count - 1;
    wide f;
    for (ptrdiff_t n = 0; n < STATE; n += LANES) {
        const vec s = LOAD(state + STATE + n);
        STORE(state + n, LOAD(state + n) * m->keep[last] + s * m->boost[last]);
        STORE(state + STATE + n, s * m->slow[last]);
    }
    for (int half = 0; half < 2; half++) {
        const real(*factor)[KEY] = half ? w->gu : w->k;
        real *z = state + half * AREA;
        scale_rows(f, factor, m->weight[last]);
        update(z, half ? w->act : w->gp, f, ADD, -1, NULL);
        scale_rows(f, factor, m->pulled[last]);
        update(z + STATE, half ? w->act : w->gp, f, ADD, -1, NULL);
    }
}

/* Gradient through a piece's carry; d_state, of the state after it, becomes that of the state before it (less what reads add). */
static void carry_mixed_back(const Place *p, const Writes *w, const Mixture *m, const real *state, real *d_state, MixtureBack *d, Back *b) {
    const int last = p->entry->count - 1;
    for (int half = 0; half < 2; half++) {
        const real(*factor)[KEY] = half ? w->gu : w->k;
        real(*d_factor)[KEY] = half ? b->f_out : b->f_in;
        real(*d_x)[TOKENS] = half ? b->act : b->gp;
        const real(*x)[TOKENS] = half ? w->act : w->gp;
        real *of_z = d_state + half * AREA, *of_s = of_z + STATE;
        wide f, moved;
        turned across;
        scale_rows(f, factor, m->weight[last]);
        turn(across, f);
        through(d_x, of_z, across, SET, -1);
        scale_rows(f, factor, m->pulled[last]);
        turn(across, f);
        through(d_x, of_s, across, ADD, -1);
        gather(f, x, of_z, SET, -1);
        gather(moved, x, of_s, SET, -1);
        for (int i = 0; i < TOKENS; i++) {
            d->weight[last][i] += dot(f[i], factor[i]);
            d->pulled[i] += dot(moved[i], factor[i]);
            EACH(c) STORE(d_factor[i] + c, LOAD(f[i] + c) * m->weight[last][i] + LOAD(moved[i] + c) * m->pulled[last][i]);
        }
    }
    vec keep = splat(0), boost = splat(0), slow = splat(0);
    for (ptrdiff_t n = 0; n < STATE; n += LANES) {
        const vec z = LOAD(d_state + n), s = LOAD(d_state + STATE + n);
        keep += z * LOAD(state + n);
        boost += z * LOAD(state + STATE + n);
        slow += s * LOAD(state + STATE + n);
        STORE(d_state + STATE + n, s * m->slow[last] + z * m->boost[last]);
        STORE(d_state + n, z * m->keep[last]);
    }
    d->keep[last] += sum_of(keep);
    d->boost[last] += sum_of(boost);
    d->slow += sum_of(slow);
}

/* Gradient through a piece's reads: to q, the state, what the piece writes with, and the mixture. */
static void read_mixed_back(const Place *p, const Gradients *out, const Writes *w, const Mixture *m, const real *state, const Reads *r,
                            real *d_state, Totals *sums, MixtureBack *d, Back *b) {
    wide d_y, d_u, f, moved;
    hidden d_act, d_late;
    square d_a, d_a_turned;
    turned x;
    load(p, out->y, KEY, d_y);
    memset(d_a, 0, sizeof d_a);
    memset(d_a_turned, 0, sizeof d_a_turned);
    for (int t = 0; t < TOKENS; t++) {
        output_back(p, d_y[t], r, t, sums, d_u[t]);
        for (int i = 0; i <= t; i++) {
            const real along = dot(d_u[t], w->gu[i]), both = m->weight[t][i] * m->act[i][t];
            d->weight[t][i] -= along * m->act[i][t];
            d_a[t][i] = d_a_turned[i][t] = -along * m->weight[t][i];
            EACH(c) STORE(b->f_out[i] + c, LOAD(b->f_out[i] + c) - LOAD(d_u[t] + c) * both);
        }
    }
    turn(x, d_u);
    through(d_act, state + AREA, x, SET, 1);
    through(d_late, state + STATE + AREA, x, SET, 1);
    for (int t = 0; t < TOKENS; t += LANES) {
        vec keep = LOAD(d->keep + t), boost = LOAD(d->boost + t);
        for (int o = 0; o < HIDDEN; o++) {
            const vec act = LOAD(r->act[o] + t), z = LOAD(d_act[o] + t), s = LOAD(d_late[o] + t);
            keep += act * z;
            boost += act * s;
            STORE(d_act[o] + t, z * LOAD(m->keep + t) + s * LOAD(m->boost + t));
        }
        STORE(d->keep + t, keep);
        STORE(d->boost + t, boost);
    }
    scale_rows(f, d_u, m->keep);
    update(d_state + AREA, r->act, f, ADD, 1, NULL);
    scale_rows(f, d_u, m->boost);
    update(d_state + STATE + AREA, r->act, f, ADD, 1, NULL);
    mix(d_act, w->act, d_a_turned, ADD, 1);
    mix(b->act, r->act, d_a, ADD, 1);
    for (int o = 0; o < HIDDEN; o++)
        for (int t = 0; t < TOKENS; t += LANES) STORE(d_act[o] + t, LOAD(d_act[o] + t) * LOAD(r->slope[o] + t)); /* of pre */
    gather(f, d_act, state, SET, 1);
    gather(moved, d_act, state + STATE, SET, 1);
    for (int t = 0; t < TOKENS; t++) {
        d->keep[t] += dot(r->q[t], f[t]);
        d->boost[t] += dot(r->q[t], moved[t]);
        EACH(c) STORE(b->q[t] + c, LOAD(d_y[t] + c) + LOAD(f[t] + c) * m->keep[t] + LOAD(moved[t] + c) * m->boost[t]);
    }
    scale_rows(f, r->q, m->keep);
    update(d_state, d_act, f, ADD, 1, NULL);
    scale_rows(f, r->q, m->boost);
    update(d_state + STATE, d_act, f, ADD, 1, NULL);
    mix(b->gp, d_act, r->s, ADD, -1);
    scores(d_a_turned, w->gp, d_act, SET, -1);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i <= t; i++) {
            const real of_kq = d_a_turned[i][t] * m->weight[t][i];
            d->weight[t][i] += d_a_turned[i][t] * m->kq[t][i];
            EACH(c) {
                STORE(b->q[t] + c, LOAD(b->q[t] + c) + LOAD(w->k[i] + c) * of_kq);
                STORE(b->f_in[i] + c, LOAD(b->f_in[i] + c) + LOAD(r->q[t] + c) * of_kq);
            }
        }
}
