/* The transformers of one scale on CPUs with AMX: the base, from a step's embedded input to its logits, and a control
 * branch, to what the base takes in; and their keys and values.
 *
 * AdaLN blocks with attention on unit-length queries and keys (VAR, arXiv 2404.02905, section 3.3), a branch's first
 * convolution, the fusions of any number of branches (CAR, arXiv 2410.04671, section 3.2), the head, and each image's
 * guidance. Matrix products multiply bf16 and add float32; norms, softmax, GELU, the residual stream and the logits are
 * float32.
 *
 * With BF16_TERMS 2 a factor is the sum of two bf16 values, the nearest one and the nearest one to the remainder: 17
 * of float32's 24 bits. A product is then three of bf16, x₁w₁ + x₁w₂ + x₂w₁, and keys and values are kept in
 * float32.
 *
 * Shapes: R rows, B images, N tokens of this scale, P of the past, T = P + N, M = N·R with row m = n·R + r, C width, H
 * heads of width d = 32 or 64, V vocab, h fused blocks.
 *
 * Tiles. AMX multiplies a tile of 16 rows × 32 bf16 values by one of 16 pairs × 16 columns. Both operands lie in memory
 * tile after tile, a kilobyte each, so that a tile is 16 neighbouring cache lines:
 *   left, M × K:    [K/256][M/16][8][BF16_TERMS][16 rows][32]         (made by whatever comes before a product)
 *   right, N × K:   [N/32][K/32][2][BF16_TERMS][16 pairs][16][2]      (a matrix [outputs, inputs], packed once)
 *
 * A product's columns are shared out among the threads, 64 at a time. Weights come from memory once; what is multiplied
 * with them stays in the second cache, a megabyte of it at a time, and 32 columns of 256 inputs in the first.
 */
#include "tiles.h"

#if BF16_TERMS == 1
typedef bf16 kv_type; /* of keys and values */
#else
typedef float kv_type;
#endif

enum {
    PANEL = 64,         /* columns that a product makes at once, */
    K_CHUNK = 256,      /* of so many inputs at a time, */
    M_CHUNK = 512,      /* and rows */
    L2_BYTES = 1 << 20, /* bytes of a left operand that stay in the second cache */
};

struct block {
    struct packed_matrix qkv, proj, fc1, fc2; /* qkv.b: C of q, then C of v */
    const float *temperature;                 /* [H] */
    int64_t modulation, layer;                /* its first row of six; its keys and values */
};

enum fusion_kind { CONCAT, ZERO, CROSS_NORM };

/* 𝓖: Linear(LayerNorm([x, c])), x + Linear(c), or x + weight·(c with the mean and variance of x) */
struct fusion {
    struct packed_matrix linear;
    const float *weight, *bias; /* of the norm [2C]; CROSS_NORM: [C] and none */
};

struct model {
    int64_t width, heads, depth, layers, modulation_rows, fused, threads; /* layers: of keys and values */
    double eps;
    const struct block *blocks;
    /* A branch has `inject`, a 3×3 convolution as a product of nine neighbours; the base has `head`, and a modulation
     * of the head, the last; the other's is all zero. */
    struct packed_matrix inject, head;
};

struct call {
    int64_t rows, images, side, past;
    const float *x, *modulation, *position;       /* [R,N,C], [R,rows,C], [N,C] */
    const kv_type *const *past_k, *const *past_v; /* of each layer, [P,R,C] */
    kv_type *const *new_k, *const *new_v;         /* [N,R,C] */
    char *workspace;
    /* of a branch: */
    const float *control; /* [B,N,C] */
    const int64_t *image; /* [R], whose control it has */
    float *fused_c;       /* [depth,M,C], the last block's first */
    /* of the base: */
    int64_t mixed, kind;                      /* branches that are mixed in, and their fusion_kind */
    const float *c, *mix, *keep;              /* [mixed,h,M,C], [mixed,R], [R] */
    const struct fusion *fusions;             /* [mixed,h] */
    const float *guidance, *control_guidance; /* [B], t and g */
    const int64_t *twin, *plain;              /* [B], rows */
    float *logits;                            /* [B,N,V] */
};

/* ---- keys and values ------------------------------------------------------------------------------------------ */

static inline void store_kv(kv_type *to, __m512 first, __m512 second)
{
#if BF16_TERMS == 1
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + 16, second);
#endif
}

/* 32 entries of keys or values as bf16 terms; zeros from NULL */
static inline void load_kv(const kv_type *from, __m512i terms[BF16_TERMS])
{
#if BF16_TERMS == 1
    terms[0] = from ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
#else
    const __m512 zero = _mm512_setzero_ps();
    split_bf16(from ? _mm512_loadu_ps(from) : zero, from ? _mm512_loadu_ps(from + 16) : zero, terms);
#endif
}

/* ---- products --------------------------------------------------------------------------------------------------- */

/* c [rows][PANEL] += a·b over `steps` tiles; rows is 16 or 32. At every step it fetches `lines` of what is needed next
 * into the second cache. */
static inline __attribute__((always_inline)) void multiply(int rows, const bf16 *a, const bf16 *b, int64_t steps,
                                                           float *c, int first, const char *next, int64_t lines)
{
    if (first) {
        clear_sums(rows / 8);
    } else {
        load_sums(c, PANEL, rows == 32);
    }
    for (int64_t k = 0; k < steps; k++) {
        for (int64_t i = 0; i < lines; i++, next += 64)
            _mm_prefetch(next, _MM_HINT_T1);
        accumulate(a + k * SPAN, a + (K_CHUNK / DEPTH + k) * SPAN, b + 2 * k * SPAN, rows == 32, 64, TILE);
    }
    store_sums(c, PANEL, rows == 32);
}

/* What is done with a product's sums. */
enum epilogue { QKV, RESIDUAL, GELU, MIX, INJECT, LOGITS };

struct run { /* one call, as its threads see it */
    const struct model *model;
    const struct call *call;
    int64_t N, T, M, padded;       /* padded: M up to a multiple of 16 */
    int64_t head_tiles;            /* tiles that a head is wide, d/32 */
    float *x, *mixed, *row_logits; /* two residual streams [M,C]; logits of the rows [M,V] */
    bf16 *left, *hidden;           /* left operands */
    bf16 *q, *k, *v;               /* of each row and head: q left, kᵀ and v right operands */
    char *scratch;                 /* scratch, shared out among the threads */
    size_t scratch_bytes;
};

struct gemm {
    enum epilogue epilogue;
    const struct packed_matrix *matrix;
    const struct block *block;
    float *x;
    const float *gamma;      /* of row 0; the others are a modulation further on */
    const float *mix, *base; /* MIX: x += mix·(base + y), [R] and [M,C] or NULL */
};

/* Row m of a left operand from column k on, 32 of them. */
static inline bf16 *left_row(const struct run *s, bf16 *left, int64_t m, int64_t k)
{
    const int64_t group = k / K_CHUNK * (s->padded / ROWS) + m / ROWS;
    return left + (group * (K_CHUNK / DEPTH) + k % K_CHUNK / DEPTH) * SPAN + m % ROWS * DEPTH;
}

static inline const float *modulation(const struct run *s, int64_t row, int64_t index)
{
    return s->call->modulation + (row * s->model->modulation_rows + index) * s->model->width;
}

/* Where 32 columns from n on of row m go: as left operand, as keys and values, or into a stream of float32. */
static inline void *destination(const struct run *s, const struct gemm *t, int64_t m, int64_t n)
{
    const int64_t C = s->model->width, R = s->call->rows, head_tiles = s->head_tiles;
    if (t->epilogue == GELU)
        return left_row(s, s->hidden, m, n);
    if (t->epilogue == LOGITS)
        return s->row_logits + m * t->matrix->outputs + n;
    if (t->epilogue != QKV)
        return t->x + m * C + n;
    if (n >= C)
        return (n < 2 * C ? s->call->new_k : s->call->new_v)[t->block->layer] + m * C + n % C;
    const int64_t token = m / R, groups = (s->N + 15) / 16, tile = n / DEPTH;
    const int64_t pair = m % R * s->model->heads + tile / head_tiles;
    return s->q + ((pair * groups + token / 16) * head_tiles + tile % head_tiles) * SPAN + token % 16 * DEPTH;
}

/* y of 32 or 64 columns ÷ their length × factor */
static inline void scale_to_length(__m512 *y, int64_t vectors, float factor)
{
    __m512 square = _mm512_mul_ps(y[0], y[0]);
    for (int64_t j = 1; j < vectors; j++)
        square = _mm512_fmadd_ps(y[j], y[j], square);
    const __m512 by = _mm512_set1_ps(factor / fmaxf(sqrtf(_mm512_reduce_add_ps(square)), 1e-12f));
    for (int64_t j = 0; j < vectors; j++)
        y[j] = _mm512_mul_ps(y[j], by);
}

/* 64 sums of each of `rows` rows from m on, columns from n on, are whole. */
static void apply_epilogue(const struct run *s, const struct gemm *t, const float *sums, int64_t m, int64_t rows,
                           int64_t n)
{
    const int64_t C = s->model->width, R = s->call->rows, stop = m + rows < s->M ? m + rows : s->M, third = n / C;
    const int wide = t->epilogue != QKV && t->epilogue != GELU;
    const float *bias = t->epilogue == QKV ? t->matrix->b + (third == 2 ? C : 0) + n % C : t->matrix->b + n;
    for (; m < stop; m++, sums += PANEL) {
        void *to[2];
        __m512 y[4];
        for (int64_t i = 0; i < 2; i++)
            to[i] = destination(s, t, m, n + 32 * i);
        for (int j = 0; j < 4; j++)
            y[j] = _mm512_loadu_ps(sums + 16 * j);
        if (t->epilogue != QKV || third != 1)
            for (int j = 0; j < 4; j++)
                y[j] = _mm512_add_ps(y[j], _mm512_loadu_ps(bias + 16 * j));
        if (t->epilogue == QKV && third < 2)
            for (int64_t j = 0; j < 4; j += 2 * s->head_tiles)
                scale_to_length(y + j, 2 * s->head_tiles,
                                third ? 1.0f : t->block->temperature[(n + 16 * j) / (DEPTH * s->head_tiles)]);
        if (t->epilogue == GELU)
            for (int j = 0; j < 4; j++) { /* ½y(1 + tanh u) = y ÷ (1 + exp(−2u)) */
                const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(y[j], y[j]), y[j]);
                const __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), y[j]);
                const __m512 e = exp2_ps(_mm512_mul_ps(u, _mm512_set1_ps(-2 * 0.79788456f * LOG2E)));
                const __m512 below = _mm512_add_ps(e, _mm512_set1_ps(1.0f));
                y[j] = BF16_TERMS == 1 ? _mm512_mul_ps(y[j], _mm512_rcp14_ps(below)) : _mm512_div_ps(y[j], below);
            }
        if (!wide) {
            for (int i = 0; i < 2; i++)
                if (t->epilogue == QKV && third)
                    store_kv(to[i], y[2 * i], y[2 * i + 1]);
                else
                    store_row(to[i], y[2 * i], y[2 * i + 1]);
            continue;
        }
        for (int j = 0; j < 4; j++) {
            float *at = (float *)to[j / 2] + j % 2 * 16;
            if (t->epilogue == RESIDUAL) {
                const float *gamma = t->gamma + (m % R) * s->model->modulation_rows * C + n + 16 * j;
                y[j] = _mm512_fmadd_ps(y[j], _mm512_loadu_ps(gamma), _mm512_loadu_ps(at));
            } else if (t->epilogue == INJECT) {
                const int64_t token = m / R * C + n + 16 * j, image = s->call->image[m % R] * s->N * C;
                y[j] = _mm512_add_ps(y[j], _mm512_loadu_ps(s->call->control + image + token));
                y[j] = _mm512_add_ps(y[j], _mm512_loadu_ps(s->call->position + token));
            } else if (t->epilogue == MIX) {
                if (t->base)
                    y[j] = _mm512_add_ps(y[j], _mm512_loadu_ps(t->base + m * C + n + 16 * j));
                y[j] = _mm512_fmadd_ps(_mm512_set1_ps(t->mix[m % R]), y[j], _mm512_loadu_ps(at));
            }
            _mm512_storeu_ps(at, y[j]);
        }
    }
}

/* How threads share a product of `panels` times 64 columns: so many side by side, and each share of rows to so many. */
static inline int64_t columns_of(int64_t threads, int64_t panels) { return threads < panels ? threads : panels; }

/* left [M, K]·Wᵀ, this thread's share of it, each sum finished. All of `left` must be there. */
static void gemm(const struct run *s, const struct gemm *t, bf16 *left, float *sums)
{
    const struct packed_matrix *p = t->matrix;
    const int64_t tiles = p->inputs / DEPTH, panels = p->outputs / PANEL, half = tiles * 2 * SPAN;
    const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    const int64_t across = columns_of(threads, panels), down = threads / across;
    const int64_t column = id % across, share = id / across;
    if (share >= down)
        return;
    const int64_t first_panel = panels * column / across, last_panel = panels * (column + 1) / across;
    const int64_t groups = s->padded / ROWS;
    const int64_t begin = groups * share / down * ROWS, end = groups * (share + 1) / down * ROWS;
    for (int64_t m0 = begin; m0 < end; m0 += M_CHUNK) {
        const int64_t rows = end - m0 < M_CHUNK ? end - m0 : M_CHUNK, blocks = (rows + 31) / 32;
        /* A left operand of more than L2_BYTES bytes is multiplied in slices, whose sums wait in that cache too. */
        const int whole = 2 * BF16_TERMS * rows * p->inputs <= L2_BYTES;
        const int64_t slice = whole ? p->inputs : L2_BYTES / 2 / (2 * BF16_TERMS * rows) / K_CHUNK * K_CHUNK;
        for (int64_t k0 = 0; k0 < p->inputs; k0 += slice) {
            const int64_t k1 = k0 + slice < p->inputs ? k0 + slice : p->inputs;
            for (int64_t panel = first_panel; panel < last_panel; panel++) {
                float *c = sums + (whole ? 0 : (panel - first_panel) * rows * PANEL);
                for (int64_t side = 0; side < 2; side++) {
                    const bf16 *right = p->w + (2 * panel + side) * half;
                    for (int64_t k = k0; k < k1; k += K_CHUNK) {
                        const int64_t steps = (k1 - k < K_CHUNK ? k1 - k : K_CHUNK) / DEPTH;
                        const bf16 *b = right + k / DEPTH * 2 * SPAN;
                        /* what comes after it: further down, or the start of the slice 32 columns on */
                        const bf16 *below = b + K_CHUNK / DEPTH * 2 * SPAN,
                                   *next_side = right + half + k0 / DEPTH * 2 * SPAN;
                        const char *next = (const char *)(k + K_CHUNK < k1 ? below : next_side);
                        const int64_t lines = (32 * BF16_TERMS + blocks - 1) / blocks;
                        for (int64_t m = 0; m < rows; m += 32, next += lines * steps * 64) {
                            const bf16 *a = left_row(s, left, m0 + m, k);
                            float *at = c + m * PANEL + 32 * side;
                            if (m + ROWS < rows)
                                multiply(32, a, b, steps, at, k == 0, next, lines);
                            else
                                multiply(16, a, b, steps, at, k == 0, next, lines);
                        }
                    }
                }
                if (k1 == p->inputs)
                    apply_epilogue(s, t, c, m0, rows, panel * PANEL);
            }
        }
    }
}

/* ---- norms ------------------------------------------------------------------------------------------------------- */

/* Mean and 1/σ of the n values at a and, with b, of the n there as well. */
static inline void moments(const float *a, const float *b, int64_t n, double eps, __m512 *mean, __m512 *root)
{
    __m512 sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
    const float *inputs[] = {a, b};
    const int64_t count = b ? 2 * n : n;
    for (int p = 0; p < 2; p++)
        for (int64_t i = 0; inputs[p] && i < n; i += 16)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(inputs[p] + i));
    *mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / count);
    for (int p = 0; p < 2; p++)
        for (int64_t i = 0; inputs[p] && i < n; i += 16) {
            const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(inputs[p] + i), *mean);
            square = _mm512_fmadd_ps(d, d, square);
        }
    *root = _mm512_set1_ps((float)(1 / sqrt(_mm512_reduce_add_ps(square) / count + eps)));
}

/* left = LN(x)·(1 + scale) + shift */
static void adaptive_norm(const struct run *s, const float *x, int64_t scale, int64_t shift)
{
    const int64_t C = s->model->width, R = s->call->rows;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++) {
        const float *from = x + m * C, *a = modulation(s, m % R, scale), *b = modulation(s, m % R, shift);
        __m512 mean, root, y[2];
        moments(from, NULL, C, s->model->eps, &mean, &root);
        for (int64_t i = 0; i < C; i += 32) {
            for (int j = 0; j < 2; j++) {
                const int64_t at = i + 16 * j;
                const __m512 factor = _mm512_add_ps(_mm512_loadu_ps(a + at), _mm512_set1_ps(1.0f));
                y[j] = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from + at), mean), root);
                y[j] = _mm512_fmadd_ps(y[j], factor, _mm512_loadu_ps(b + at));
            }
            store_row(left_row(s, s->left, m, i), y[0], y[1]);
        }
    }
}

/* left = LN([x, c])·weight + bias */
static void concat_norm(const struct run *s, const float *x, const float *c, const struct fusion *fusion)
{
    const int64_t C = s->model->width;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++) {
        const float *inputs[] = {x + m * C, c + m * C};
        __m512 mean, root, y[2];
        moments(inputs[0], inputs[1], C, s->model->eps, &mean, &root);
        for (int64_t i = 0; i < 2 * C; i += 32) {
            const float *from = inputs[i / C] + i % C;
            for (int j = 0; j < 2; j++) {
                y[j] = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from + 16 * j), mean), root);
                y[j] = _mm512_fmadd_ps(y[j], _mm512_loadu_ps(fusion->weight + i + 16 * j),
                                       _mm512_loadu_ps(fusion->bias + i + 16 * j));
            }
            store_row(left_row(s, s->left, m, i), y[0], y[1]);
        }
    }
}

/* left = c */
static void copy_left(const struct run *s, const float *c)
{
    const int64_t C = s->model->width;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++)
        for (int64_t i = 0; i < C; i += 32)
            store_row(left_row(s, s->left, m, i), _mm512_loadu_ps(c + m * C + i), _mm512_loadu_ps(c + m * C + i + 16));
}

/* to += mix·(x + gain·(LN(c)·σ(x) + mean(x))) */
static void cross_norm(const struct run *s, const float *x, const float *c, const float *gain, const float *mix,
                       float *to)
{
    const int64_t C = s->model->width, R = s->call->rows;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++) {
        __m512 x_mean, x_root, c_mean, c_root;
        moments(x + m * C, NULL, C, s->model->eps, &x_mean, &x_root);
        moments(c + m * C, NULL, C, s->model->eps, &c_mean, &c_root);
        const __m512 by = _mm512_div_ps(c_root, x_root), share = _mm512_set1_ps(mix[m % R]);
        for (int64_t i = m * C; i < m * C + C; i += 16) {
            __m512 y = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_loadu_ps(c + i), c_mean), by, x_mean);
            y = _mm512_fmadd_ps(_mm512_loadu_ps(gain + i - m * C), y, _mm512_loadu_ps(x + i));
            _mm512_storeu_ps(to + i, _mm512_fmadd_ps(share, y, _mm512_loadu_ps(to + i)));
        }
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* Keys and values of all tokens so far as right operands, 32 tokens at a time. Beyond the last they are zero. */
static void pack_kv(const struct run *s, const struct block *block)
{
    const int64_t C = s->model->width, R = s->call->rows, H = s->model->heads, P = s->call->past;
    const int64_t groups = (s->T + 31) / 32;
    int64_t task, end;
    for (thread_range(groups * R, &task, &end); task < end; task++) {
        const int64_t group = task / R, row = task % R;
        const kv_type *keys[32], *values[32];
        for (int64_t i = 0; i < 32; i++) {
            const int64_t token = 32 * group + i, at = ((token < P ? token : token - P) * R + row) * C;
            const int old = token < P, none = token >= s->T;
            keys[i] = none ? NULL : (old ? s->call->past_k : (const kv_type *const *)s->call->new_k)[block->layer] + at;
            values[i] =
                none ? NULL : (old ? s->call->past_v : (const kv_type *const *)s->call->new_v)[block->layer] + at;
        }
        for (int64_t head = 0; head < H; head++) {
            bf16 *k = s->k + ((row * H + head) * groups + group) * 2 * s->head_tiles * SPAN;
            bf16 *v = s->v + ((row * H + head) * groups + group) * 2 * s->head_tiles * SPAN;
            const int64_t column = head * s->head_tiles * DEPTH;
            for (int64_t depth = 0; depth < s->head_tiles; depth++)
                for (int64_t half = 0; half < 2; half++) {
                    __m512i r[BF16_TERMS][16], terms[BF16_TERMS];
                    for (int i = 0; i < 16; i++) {
                        const kv_type *from = keys[16 * half + i];
                        load_kv(from ? from + column + depth * DEPTH : NULL, terms);
                        for (int j = 0; j < BF16_TERMS; j++)
                            r[j][i] = terms[j];
                    }
                    for (int j = 0; j < BF16_TERMS; j++) {
                        transpose_16x16(r[j]);
                        for (int i = 0; i < 16; i++)
                            _mm512_store_si512(k + (2 * depth + half) * SPAN + j * TILE + 32 * i, r[j][i]);
                    }
                }
            for (int64_t pair = 0; pair < 16; pair++)
                for (int64_t half = 0; half < s->head_tiles; half++) {
                    __m512i r[2][BF16_TERMS];
                    for (int i = 0; i < 2; i++) {
                        const kv_type *from = values[2 * pair + i];
                        load_kv(from ? from + column + half * 32 : NULL, r[i]);
                    }
                    for (int j = 0; j < BF16_TERMS; j++) {
                        bf16 *to = v + 2 * half * SPAN + j * TILE + 32 * pair;
                        _mm512_store_si512(to, interleave(r[0][j], r[1][j], 0));
                        _mm512_store_si512(to + SPAN, interleave(r[0][j], r[1][j], 1));
                    }
                }
        }
    }
}

/* left = softmax(q·kᵀ)·v, 32 queries of one head at a time */
static void attention(const struct run *s, char *scratch)
{
    const int64_t R = s->call->rows, H = s->model->heads, head_tiles = s->head_tiles;
    const int64_t groups = (s->T + 31) / 32, stride = groups * 32 + 16;
    const int64_t query_groups = (s->N + 15) / 16, blocks = (s->N + 31) / 32;
    float *scores = (float *)scratch, *out = scores + 32 * stride;
    bf16 *weights = (bf16 *)(out + 32 * PANEL);
    int64_t task, end;
    for (thread_range(R * H * blocks, &task, &end); task < end; task++) {
        const int64_t pair = task / blocks, first = task % blocks * 32, row = pair / H, head = pair % H;
        const int64_t queries = s->N - first < 32 ? s->N - first : 32, two = queries > 16;
        const bf16 *q = s->q + (pair * query_groups + first / 16) * head_tiles * SPAN;
        const bf16 *k = s->k + pair * groups * 2 * head_tiles * SPAN, *v = s->v + pair * groups * 2 * head_tiles * SPAN;
        float inverse_sums[32];
        for (int64_t g = 0; g < groups; g++, k += 2 * head_tiles * SPAN) {
            float *to = scores + 32 * g;
            clear_sums(4);
            for (int64_t depth = 0; depth < head_tiles; depth++)
                accumulate(q + depth * SPAN, q + (head_tiles + depth) * SPAN, k + 2 * depth * SPAN, two, 64, TILE);
            store_sums(to, stride, two);
        }
        for (int64_t i = 0; i < queries; i++)
            inverse_sums[i] = softmax_row(scores + i * stride, s->T, weights + i / 16 * groups * SPAN + i % 16 * DEPTH);
        for (int64_t half = 0; half < head_tiles; half++) {
            clear_sums(4);
            for (int64_t g = 0; g < groups; g++)
                accumulate(weights + g * SPAN, weights + (groups + g) * SPAN, v + 2 * (head_tiles * g + half) * SPAN,
                           two, 64, TILE);
            float *to = out + 32 * half;
            store_sums(to, PANEL, two);
        }
        for (int64_t i = 0; i < queries; i++) {
            const float *from = out + i * PANEL;
            const __m512 factor = _mm512_set1_ps(inverse_sums[i]);
            for (int64_t half = 0; half < head_tiles; half++, from += 32)
                store_row(left_row(s, s->left, (first + i) * R + row, (head * head_tiles + half) * DEPTH),
                          _mm512_mul_ps(_mm512_loadu_ps(from), factor),
                          _mm512_mul_ps(_mm512_loadu_ps(from + 16), factor));
        }
    }
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

#define BARRIER _Pragma("omp barrier")

/* x += γ1·attention(…), x += γ2·mlp(…); γ1, γ2, scale1, scale2, shift1, shift2 are a block's rows of modulation */
static void transformer_block(const struct run *s, const struct block *block, float *x, char *scratch)
{
    const int64_t row = block->modulation;
    const struct gemm qkv = {QKV, &block->qkv, block, NULL, NULL, NULL, NULL};
    const struct gemm proj = {RESIDUAL, &block->proj, block, x, modulation(s, 0, row), NULL, NULL};
    const struct gemm fc1 = {GELU, &block->fc1, block, NULL, NULL, NULL, NULL};
    const struct gemm fc2 = {RESIDUAL, &block->fc2, block, x, modulation(s, 0, row + 1), NULL, NULL};
    adaptive_norm(s, x, row + 2, row + 4);
    BARRIER
    gemm(s, &qkv, s->left, (float *)scratch);
    BARRIER
    pack_kv(s, block);
    BARRIER
    attention(s, scratch);
    BARRIER
    gemm(s, &proj, s->left, (float *)scratch);
    BARRIER
    adaptive_norm(s, x, row + 3, row + 5);
    BARRIER
    gemm(s, &fc1, s->left, (float *)scratch);
    BARRIER
    gemm(s, &fc2, s->hidden, (float *)scratch);
    BARRIER
}

/* left = the 3 × 3 neighbours of every token of every row, zero outside; x of rows [R,N,C] */
static void im2col(const struct run *s)
{
    const int64_t C = s->model->width, R = s->call->rows, S = s->call->side;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++) {
        const int64_t token = m / R, row = m % R;
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t y = token / S + tap / 3 - 1, x = token % S + tap % 3 - 1;
            const int inside = y >= 0 && y < S && x >= 0 && x < S;
            const float *from = s->call->x + (row * s->N + y * S + x) * C;
            for (int64_t i = 0; i < C; i += 32) {
                bf16 *to = left_row(s, s->left, m, tap * C + i);
                if (inside)
                    store_row(to, _mm512_loadu_ps(from + i), _mm512_loadu_ps(from + i + 16));
                else
                    store_row(to, _mm512_setzero_ps(), _mm512_setzero_ps());
            }
        }
    }
}

/* mixed = keep·x + Σ mixᵢ·𝓖ᵢ(x, cᵢ) before fused block j */
static void fuse(const struct run *s, int64_t j, const float *x, float *mixed, float *sums)
{
    const struct model *model = s->model;
    const struct call *call = s->call;
    const int64_t C = model->width, R = call->rows;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++)
        for (int64_t i = m * C; i < m * C + C; i += 16)
            _mm512_storeu_ps(mixed + i, _mm512_mul_ps(_mm512_set1_ps(call->keep[m % R]), _mm512_loadu_ps(x + i)));
    for (int64_t i = 0; i < call->mixed; i++) {
        const struct fusion *fusion = call->fusions + i * model->fused + j;
        const float *c = call->c + (i * model->fused + j) * s->M * C, *mix = call->mix + i * R;
        int used = 0;
        for (int64_t r = 0; r < R; r++)
            used |= mix[r] != 0;
        if (!used)
            continue;
        if (call->kind == CROSS_NORM) {
            cross_norm(s, x, c, fusion->weight, mix, mixed);
            continue;
        }
        const struct gemm linear = {MIX, &fusion->linear, NULL, mixed, NULL, mix, call->kind == ZERO ? x : NULL};
        if (call->kind == ZERO)
            copy_left(s, c);
        else
            concat_norm(s, x, c, fusion);
        BARRIER
        gemm(s, &linear, s->left, sums);
        BARRIER
    }
    BARRIER
}

/* logits = (1 + t)·conditional − t·unconditional + g·(conditional − plain) of each image */
static void apply_guidance(const struct run *s)
{
    const struct call *call = s->call;
    const int64_t V = s->model->head.outputs, R = call->rows, N = s->N;
    int64_t task, end;
    for (thread_range(call->images * N, &task, &end); task < end; task++) {
        const int64_t image = task / N, token = task % N;
        const __m512 t = _mm512_set1_ps(call->guidance[image]), more = _mm512_add_ps(t, _mm512_set1_ps(1.0f));
        const __m512 g = _mm512_set1_ps(call->control_guidance[image]);
        const int steered = call->control_guidance[image] != 0;
        const float *rows = s->row_logits + token * R * V, *with = rows + image * V,
                    *without = rows + call->twin[image] * V, *plain = rows + call->plain[image] * V;
        float *to = call->logits + task * V;
        for (int64_t i = 0; i < V; i += 16) {
            const __m512 own = _mm512_loadu_ps(with + i);
            __m512 y = _mm512_fmsub_ps(more, own, _mm512_mul_ps(t, _mm512_loadu_ps(without + i)));
            if (steered)
                y = _mm512_fmadd_ps(g, _mm512_sub_ps(own, _mm512_loadu_ps(plain + i)), y);
            _mm512_storeu_ps(to + i, y);
        }
    }
}

/* A branch: each block goes on from what the one before gave, which the base takes in later. */
static void run_branch(const struct run *s, char *scratch)
{
    const struct model *model = s->model;
    const int64_t size = s->M * model->width;
    float *c = s->call->fused_c + (model->depth - 1) * size;
    const struct gemm inject = {INJECT, &model->inject, NULL, c, NULL, NULL, NULL};
    int64_t m, end;
    im2col(s);
    BARRIER
    gemm(s, &inject, s->left, (float *)scratch);
    BARRIER
    for (int64_t i = 0; i < model->depth; i++) {
        if (i) {
            c -= size;
            thread_range(s->M, &m, &end);
            memcpy(c + m * model->width, c + size + m * model->width, (end - m) * model->width * sizeof(float));
            BARRIER
        }
        transformer_block(s, &model->blocks[i], c, scratch);
    }
}

/* The base. */
static void run_step(const struct run *s, char *scratch)
{
    const struct model *model = s->model;
    const int64_t C = model->width, R = s->call->rows;
    float *x = s->x, *other = s->mixed;
    int64_t m, end;
    for (thread_range(s->M, &m, &end); m < end; m++) {
        const float *from = s->call->x + (m % R * s->N + m / R) * C, *position = s->call->position + m / R * C;
        for (int64_t i = 0; i < C; i += 16)
            _mm512_storeu_ps(x + m * C + i, _mm512_add_ps(_mm512_loadu_ps(from + i), _mm512_loadu_ps(position + i)));
    }
    for (int64_t i = 0; i < model->depth; i++) {
        const int64_t j = i - (model->depth - model->fused);
        if (j >= 0) {
            fuse(s, j, x, other, (float *)scratch);
            float *const fused = other;
            other = x, x = fused;
        }
        transformer_block(s, &model->blocks[i], x, scratch);
    }
    const struct gemm head = {LOGITS, &model->head, NULL, NULL, NULL, NULL, NULL};
    adaptive_norm(s, x, model->modulation_rows - 2, model->modulation_rows - 1);
    BARRIER
    gemm(s, &head, s->left, (float *)scratch);
    BARRIER
    apply_guidance(s);
}

static void run_scale(const struct run *s)
{
    /* The system may have given fewer threads than were wanted. */
    char *scratch = s->scratch + s->scratch_bytes / 64 / omp_get_num_threads() * 64 * omp_get_thread_num();
    configure_tiles();
    if (s->model->head.outputs)
        run_step(s, scratch);
    else
        run_branch(s, scratch);
    _tile_release();
}

/* ---- the workspace ----------------------------------------------------------------------------------------------- */

#define LARGEST ((int64_t)1 << 46) /* bytes of a workspace: no sum or product below it overflows */

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t round_up(int64_t inputs) { return (inputs + K_CHUNK - 1) / K_CHUNK * K_CHUNK; }

/* a · b; −1 if one is negative, or it is more than LARGEST */
static int64_t product(int64_t a, int64_t b)
{
    int64_t c;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &c) || c > LARGEST ? -1 : c;
}

/* `bytes` more of a workspace that has *end: where they lie. From one that doesn't fit on, *end is −1. */
static int64_t take(int64_t *end, int64_t bytes)
{
    const int64_t start = *end;
    *end = start < 0 || bytes < 0 || bytes > LARGEST - start ? -1 : start + aligned(bytes);
    return start;
}

/* Lay out the workspace from `at` on. Returns how many bytes it has; −1: more than LARGEST. */
static int64_t lay_out(struct run *s, char *at)
{
    const struct model *model = s->model;
    const int64_t C = model->width, groups = (s->T + 31) / 32, hidden = model->blocks[0].fc1.outputs;
    const int64_t inputs = max_i64(model->inject.inputs, 2 * C); /* the most that a left operand has */
    const int64_t left = product(s->padded, BF16_TERMS * sizeof(bf16)), heads = product(s->call->rows, model->heads);
    const int64_t stream = product(s->M, C * sizeof(float)), tiles = s->head_tiles * SPAN * sizeof(bf16);
    int64_t end = 0;
#define TAKE(field, bytes) s->field = (void *)((uintptr_t)at + (uintptr_t)take(&end, bytes))
    TAKE(x, stream);
    TAKE(mixed, model->fused ? stream : 0);
    TAKE(row_logits, product(s->M, model->head.outputs * sizeof(float)));
    TAKE(left, product(left, round_up(inputs)));
    TAKE(hidden, product(left, round_up(hidden)));
    TAKE(q, product(product(heads, (s->N + 15) / 16), tiles));
    TAKE(k, product(product(heads, groups), 2 * tiles));
    TAKE(v, product(product(heads, groups), 2 * tiles));
    const int64_t widest = max_i64(max_i64(3 * C, hidden), model->head.outputs) / PANEL;
    const int64_t rows = s->padded < M_CHUNK ? s->padded : M_CHUNK;
    /* Shared out among fewer threads, each has the more columns. */
    const int64_t sums = product(widest + model->threads, (rows + 16) * PANEL * sizeof(float));
    const int64_t attention = 32 * (groups * 32 + 16 + PANEL) * sizeof(float) + 2 * groups * SPAN * sizeof(bf16);
    const int64_t shares = product(model->threads, aligned(attention) + 64);
    s->scratch_bytes = sums < 0 || shares < 0 ? 0 : sums + shares;
    TAKE(scratch, sums < 0 || shares < 0 ? -1 : sums + shares);
#undef TAKE
    return end;
}

static int linear_fits(const struct packed_matrix *p, int64_t inputs, int64_t outputs)
{
    return p->inputs == inputs && p->outputs == outputs && inputs % DEPTH == 0 && outputs % PANEL == 0;
}

static int blocks_fit(const struct model *model)
{
    const int64_t C = model->width, hidden = model->blocks[0].fc1.outputs;
    for (const struct block *b = model->blocks; b < model->blocks + model->depth; b++)
        if (!linear_fits(&b->qkv, C, 3 * C) || !linear_fits(&b->proj, C, C) || !linear_fits(&b->fc1, C, hidden) ||
            !linear_fits(&b->fc2, hidden, C) || b->modulation < 0 || b->modulation > model->modulation_rows - 6 ||
            b->layer < 0 || b->layer >= model->layers)
            return 0;
    return 1;
}

/* Whether `count` numbers are 0 … below */
static int all_below(const int64_t *numbers, int64_t count, int64_t below)
{
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= below)
            return 0;
    return 1;
}

/* Whether what a branch, or the base, has of its own fits. */
static int own_fits(const struct model *model, const struct call *call)
{
    const int64_t C = model->width, V = model->head.outputs, size = 1 << 24;
    if (!V)
        return !model->fused && linear_fits(&model->inject, 9 * C, C) &&
               all_below(call->image, call->rows, call->images);
    if (V < PANEL || V > size || model->inject.inputs || model->modulation_rows < 2 || model->fused > model->depth)
        return 0;
    if (!linear_fits(&model->head, C, V) || call->mixed < 0 || call->mixed > size || (call->mixed && !model->fused))
        return 0;
    if (call->kind != CONCAT && call->kind != ZERO && call->kind != CROSS_NORM)
        return 0;
    for (int64_t i = 0; call->kind != CROSS_NORM && i < call->mixed * model->fused; i++)
        if (!linear_fits(&call->fusions[i].linear, call->kind == CONCAT ? 2 * C : C, C))
            return 0;
    return all_below(call->twin, call->images, call->rows) && all_below(call->plain, call->images, call->rows);
}

/* Whether a call's and a model's numbers fit each other, and can be multiplied with each other. */
static int fits(const struct model *model, const struct call *call)
{
    const int64_t C = model->width, size = 1 << 24;
    if (C < PANEL || C % PANEL || C > size || model->heads < 1 || C % model->heads)
        return 0;
    if ((C != model->heads * DEPTH && C != 2 * model->heads * DEPTH) || model->threads < 1 || model->threads > size)
        return 0;
    if (model->depth < 1 || model->depth > size || model->fused < 0 || model->modulation_rows > size)
        return 0;
    if (model->blocks[0].fc1.outputs < PANEL || model->blocks[0].fc1.outputs > size)
        return 0;
    if (call->rows < 1 || call->rows > size || call->images < 1 || call->images > call->rows)
        return 0;
    if (call->side < 1 || call->side > 1 << 15 || call->past < 0 || call->past > (int64_t)1 << 32)
        return 0;
    return blocks_fit(model) && own_fits(model, call);
}

static struct run make_run(const struct model *model, const struct call *call)
{
    const int64_t N = call->side * call->side, M = N * call->rows;
    return (struct run){.model = model,
                        .call = call,
                        .N = N,
                        .T = call->past + N,
                        .M = M,
                        .padded = (M + ROWS - 1) / ROWS * ROWS,
                        .head_tiles = model->width / model->heads / DEPTH};
}

/* Bytes of workspace that a call needs; −1 if its numbers don't fit the model's or each other, or are too large. */
int64_t car_workspace(const struct model *model, const struct call *call)
{
    if (!fits(model, call))
        return -1;
    struct run s = make_run(model, call);
    return lay_out(&s, NULL);
}

/* For a call that `car_workspace` knows the size of. */
void car_scale(const struct model *model, const struct call *call)
{
    struct run s = make_run(model, call);
    lay_out(&s, call->workspace);
#pragma omp parallel num_threads(model->threads)
    run_scale(&s);
}
