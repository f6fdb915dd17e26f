/* The tile instructions of AMX in AVX-512: for tests of the kernels on CPUs without AMX, and under sanitizers.
 *
 * tiles.h includes this with CAR_EMULATED_TILES. A thread's eight tiles are arrays; a load or a store touches the 16 rows
 * of 64 bytes that the instruction does, so that AddressSanitizer sees every one. Products and sums are rounded in the
 * instruction's order; values too small to be normal are kept, where it takes them as zero.
 */
#ifndef CAR_TEST_EMULATED_TILES
#define CAR_TEST_EMULATED_TILES

typedef struct {
    uint32_t rows[16][16];
} test_tile;

static _Thread_local test_tile test_tiles[8];

static inline void test_load(test_tile *tile, const void *from, int64_t stride)
{
    const char *row = from;
    for (int i = 0; i < 16; i++)
        memcpy(tile->rows[i], row + i * stride, sizeof(tile->rows[i]));
}

static inline void test_store(const test_tile *tile, void *to, int64_t stride)
{
    char *row = to;
    for (int i = 0; i < 16; i++)
        memcpy(row + i * stride, tile->rows[i], sizeof(tile->rows[i]));
}

/* The first or the second of each pair of bf16 values, as float32 */
static inline __m512 test_half(__m512i pairs, int second)
{
    return (__m512)(second ? _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u))
                           : _mm512_slli_epi32(pairs, 16));
}

/* As the instruction adds: first terms and second terms of a row each by themselves, then both, then the sums so far */
static inline void test_multiply(test_tile *sums, const test_tile *left, const test_tile *right)
{
    for (int i = 0; i < 16; i++) {
        __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
        for (int pair = 0; pair < 16; pair++) {
            const __m512i a = _mm512_set1_epi32((int)left->rows[i][pair]), b = _mm512_loadu_si512(right->rows[pair]);
            first = _mm512_fmadd_ps(test_half(a, 0), test_half(b, 0), first);
            second = _mm512_fmadd_ps(test_half(a, 1), test_half(b, 1), second);
        }
        const __m512 before = _mm512_loadu_ps(sums->rows[i]);
        _mm512_storeu_ps(sums->rows[i], _mm512_add_ps(before, _mm512_add_ps(first, second)));
    }
}

static inline __m256i test_round(__m512 values)
{
    const __m512i bits = (__m512i)values, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

static inline __m512i test_round_both(__m512 high, __m512 low)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(test_round(low)), test_round(high), 1);
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _mm512_cvtne2ps_pbh
#define _tile_loadconfig(config)          ((void)(config))
#define _tile_release()                   ((void)0)
#define _tile_zero(tile)                  memset(test_tiles + (tile), 0, sizeof(test_tile))
#define _tile_loadd(tile, from, stride)   test_load(test_tiles + (tile), from, stride)
#define _tile_stored(tile, to, stride)    test_store(test_tiles + (tile), to, stride)
#define _tile_dpbf16ps(sums, left, right) test_multiply(test_tiles + (sums), test_tiles + (left), test_tiles + (right))
#define _mm512_cvtne2ps_pbh(high, low)    test_round_both(high, low)

#endif
