/* What the transformer (step.c) and the convolutions (convnet.c) are made of: tiles of bf16, vectors of float32.
 *
 * With BF16_TERMS 2 a factor is the sum of two bf16 values, the nearest one and the nearest one to the remainder: 17
 * of float32's 24 bits. A product is then three of bf16, x₁w₁ + x₁w₂ + x₂w₁.
 *
 * Tiles. AMX multiplies a tile of 16 rows × 32 bf16 values by one of 16 pairs × 16 columns. A right operand, N × K, lies in
 * memory tile after tile, a kilobyte each, so that a tile is 16 neighbouring cache lines:
 *   [N/32][K/32][2][BF16_TERMS][16 pairs][16][2]      (a matrix [outputs, inputs], packed once)
 */
#ifndef CAR_TILES
#define CAR_TILES

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef CAR_EMULATED_TILES /* the tests' own, for CPUs without AMX */
#include "emulated_tiles.h"
#endif

#ifndef BF16_TERMS
#define BF16_TERMS 1
#endif

typedef uint16_t bf16;

#define LOG2E 1.44269504f

enum {
    ROWS = 16,                /* of a tile, */
    DEPTH = 32,               /* its columns */
    TILE = 512,               /* and its values, */
    SPAN = BF16_TERMS * TILE, /* in all their terms */
};

struct packed_matrix { /* y = x·Wᵀ + b */
    const bf16 *w;
    const float *b;
    int64_t inputs, outputs;
};

/* ---- vectors ---------------------------------------------------------------------------------------------------- */

/* 2^x; relative error 3e-6 where the result is rounded to bf16, and 1e-7 otherwise */
static inline __m512 exp2_ps(__m512 x)
{
    static const float rough[] = {0.01353417f, 0.05201146f, 0.24144276f, 0.69300383f, 1.00000259f};
    static const float fine[] = {
        0.000217022552f, 0.00124396879f, 0.00967884099f, 0.055483342f, 0.240229836f, 0.693146984f, 1.0f};
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x − ⌊x⌋ */
    const float *c = BF16_TERMS == 1 ? rough : fine;
    __m512 y = _mm512_set1_ps(c[0]);
    for (int i = 1; i < (BF16_TERMS == 1 ? 5 : 7); i++)
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(y, x); /* times 2^⌊x⌋ */
}

static inline __m512 bf16_to_f32(__m256i numbers)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

/* 32 values as sums of bf16 terms */
static inline void split_bf16(__m512 first, __m512 second, __m512i terms[BF16_TERMS])
{
    terms[0] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    if (BF16_TERMS == 2) {
        first = _mm512_sub_ps(first, bf16_to_f32(_mm512_castsi512_si256(terms[0])));
        second = _mm512_sub_ps(second, bf16_to_f32(_mm512_extracti64x4_epi64(terms[0], 1)));
        terms[BF16_TERMS - 1] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    }
}

/* A row of a tile, its terms `apart` values from each other */
static inline void store_terms(bf16 *to, int apart, __m512 first, __m512 second)
{
    __m512i terms[BF16_TERMS];
    split_bf16(first, second, terms);
    for (int i = 0; i < BF16_TERMS; i++)
        _mm512_storeu_si512(to + i * apart, terms[i]);
}

static inline void store_row(bf16 *to, __m512 first, __m512 second) { store_terms(to, TILE, first, second); }

/* The first or the second half of two rows of 32, in pairs */
static inline __m512i interleave(__m512i first, __m512i second, int half)
{
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(first, half ? _mm512_add_epi16(low, _mm512_set1_epi16(16)) : low, second);
}

/* 16 × 16 values of 32 bits, rows to columns. */
static inline void transpose_16x16(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------------------ */

static inline void configure_tiles(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) all = {.palette = 1};
    for (int i = 0; i < 8; i++)
        all.bytes[i] = 64, all.rows[i] = ROWS;
    _tile_loadconfig(&all);
}

static inline void clear_sums(int tiles)
{
    _tile_zero(0);
    _tile_zero(1);
    if (tiles > 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

/* Tiles 0 and 1, and with `two` 2 and 3 below them, from and to rows of so many values */
static inline __attribute__((always_inline)) void load_sums(const float *c, int64_t numbers, int two)
{
    const int64_t stride = numbers * sizeof(float);
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    if (two) {
        _tile_loadd(2, c + ROWS * numbers, stride);
        _tile_loadd(3, c + ROWS * numbers + 16, stride);
    }
}

static inline __attribute__((always_inline)) void store_sums(float *c, int64_t numbers, int two)
{
    const int64_t stride = numbers * sizeof(float);
    _tile_stored(0, c, stride);
    _tile_stored(1, c + 16, stride);
    if (two) {
        _tile_stored(2, c + ROWS * numbers, stride);
        _tile_stored(3, c + ROWS * numbers + 16, stride);
    }
}

/* Tiles 0 to 3 += a·b: one or two tiles of rows, a and `below`, and two of columns. Rows are `stride` bytes apart,
 * their terms `apart` values. */
static inline __attribute__((always_inline)) void accumulate(const bf16 *a, const bf16 *below, const bf16 *b, int two,
                                                             int stride, int apart)
{
    if (BF16_TERMS == 2) { /* a₁b₂ first */
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + SPAN + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, below, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + SPAN, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            _tile_loadd(5, below + apart, stride);
        }
        _tile_loadd(4, a + apart, stride);
    } else {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + SPAN, 64);
        if (two)
            _tile_loadd(5, below, stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

static inline void thread_range(int64_t all, int64_t *begin, int64_t *end)
{
    const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    *begin = all * id / threads, *end = all * (id + 1) / threads;
}

/* ---- softmax ---------------------------------------------------------------------------------------------------- */

/* The weights of one query from its T scores: exp(score − maximum), a row of a left operand; returns 1 ÷ their sum. */
static inline float softmax_row(float *scores, int64_t T, bf16 *to)
{
    const int64_t padded = (T + 31) / 32 * 32;
    const __mmask16 tail = T % 16 ? (__mmask16)((1u << T % 16) - 1) : 0xffff;
    const __m512 least = _mm512_set1_ps(-INFINITY), log2e = _mm512_set1_ps(LOG2E);
    const int64_t last = (T - 1) / 16 * 16;
    _mm512_storeu_ps(scores + last, _mm512_mask_blend_ps(tail, least, _mm512_loadu_ps(scores + last)));
    if (last + 16 < padded)
        _mm512_storeu_ps(scores + last + 16, least);
    __m512 top = least, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded; i += 16)
        top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top) * LOG2E);
    for (int64_t i = 0; i < padded; i += 32, to += SPAN) {
        const __m512 a = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), log2e, top));
        const __m512 b = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i + 16), log2e, top));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        store_row(to, a, b);
    }
    return 1 / _mm512_reduce_add_ps(sum);
}

#endif
