/* What the kernels share: vectors of the machine's width. REAL64: double instead of float. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef REAL64
typedef double real;
typedef uint64_t word;
#else
typedef float real;
typedef uint32_t word;
#endif

/* Register blocking: ROWS x VECS accumulators, VECS inputs and a broadcast weight have to fit the register file. */
#if defined(__AVX512F__)
#define BYTES 64
#define ROWS 6
#define VECS 4
#elif defined(__AVX2__)
#define BYTES 32
#define ROWS 3
#define VECS 3
#else
#define BYTES 16
#define ROWS 4
#define VECS 4
#endif
#define LANES ((int)(BYTES / sizeof(real)))
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(BYTES)));
typedef word uvec __attribute__((vector_size(BYTES)));
#ifndef REAL64
typedef int32_t ivec __attribute__((vector_size(BYTES)));
#endif
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
#define LOAD(p) ((vec)(*(const loose *)(p)))
#define STORE(p, v) (*(loose *)(p) = (loose)(v))

/* Keep a vector in a register: compilers load one that is used often again and again, as an operand. */
#if defined(__AVX512F__)
#define HOLD(x) __asm__("" : "+v"(x))
#elif defined(__x86_64__)
#define HOLD(x) __asm__("" : "+x"(x))
#else
#define HOLD(x) ((void)(x))
#endif

INLINE vec splat(real x) { return x - (vec){0}; } /* not 0 + x, which is no broadcast: -0 would become 0 */

/* exp for x <= 0 up to rounding of the input; exactly 0 where float would be subnormal. */
INLINE vec exp_of(vec x) {
#ifdef REAL64
    vec y;
    for (int i = 0; i < LANES; i++) y[i] = exp(x[i]);
    return y;
#else
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits */
    vec t = x * 1.44269504088896341f + magic;
    vec n = t - magic;
    vec r = x - n * 0.693145751953125f;
    r = r - n * 1.42860682030941723e-6f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uvec power = ((uvec)t - (uvec)magic + 127) << 23; /* unsigned: far below -87 it wraps */
    return (vec)((uvec)(p * (vec)power) & ~(uvec)(x <= -87.0f)); /* a NaN stays one */
#endif
}

/* x^e for x >= 0, within |e log x| roundings; 0^e is 0. */
INLINE vec power_of(vec x, real e) {
    vec y;
#ifdef REAL64
    for (int i = 0; i < LANES; i++) y[i] = pow(x[i], e);
#else
    /* log x = n log 2 + 2 atanh(s), s = (m - 1) / (m + 1), the mantissa m within a factor sqrt(2) of 1 */
    const uvec bits = (uvec)x - 0x3f3504f3u, n = (uvec)((ivec)bits >> 23);
    const vec m = (vec)((bits & 0x7fffffu) + 0x3f3504f3u), s = (m - 1) / (m + 1), ss = s * s;
    vec log = ss * 0.22222222222222f + 0.28571428571429f;
    log = log * ss + 0.4f;
    log = log * ss + 0.66666666666667f;
    log = (log * ss + 2) * s + __builtin_convertvector((ivec)n, vec) * 0.693147180559945f;
    const vec z = e * log;
    const uvec grows = (uvec)(z > 0);
    y = exp_of((vec)((uvec)z ^ (grows & 0x80000000u)));
    y = (vec)(((uvec)(1 / y) & grows) | ((uvec)y & ~grows));
    y = (vec)((uvec)y & ~(uvec)(x <= 0)) + (x - x); /* what is no number, or infinite, stays no number */
#endif
    return y;
}

INLINE real sum_of(vec x) {
    real total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
