/* Networks of convolutions on CPUs with AMX: CAR's control encoder and the tokenizer's decoder.
 *
 * What they are is what a plan's graphs say (car_runtime.backends.amx.convolutions makes sure of that): convolutions of 1 to 3 taps
 * each way, group norms and SiLU before them, sums after them, and attention of one head.
 *
 * Several feature maps go through a network at once: the images of a batch, or the control image at the size of every scale.
 * Channels are padded to a multiple of 32. One after the other lie
 *   maps, float32:           [channels/32][height][width][32]
 *   what is multiplied:      [channels/32][1 + height + 1][1 + width + 1][BF16_TERMS][32], zeros outside
 * so that 16 neighbours of a row are a tile, with whichever tap. A convolution is then a product whose left operand is
 * never written. Its right one (see tiles.h) has its inputs in the order
 *   [channels/32/chunk][tap down][chunk][tap across][32], chunks of `blocks_per_chunk` times 32 channels
 *
 * No array on the stack has a size of the caller's: what depends on one lies in `scratch`, which each thread has so much of.
 *
 * What is computed is cut into blocks of 32 tiles, the same ones for any number of threads; a channel's mean and
 * squared deviations are taken of each block and joined in their order.
 */
#include "tiles.h"

enum {
    POSITION = BF16_TERMS * DEPTH,
    TILES = 32, /* of a block */
};

struct norm { /* with groups 0: none */
    const float *weight, *bias;
    int64_t groups, channels; /* without those that pad */
    double eps;
};

struct moments { /* of maps, block after block */
    int64_t *map, *count;
    float *values; /* means and squared deviations, [blocks][2][channels] */
};

struct convolution {
    struct packed_matrix matrix;
    int64_t channels, down, across, blocks_per_chunk;
    int64_t top, left;               /* where the first tap is, from the border on */
    int64_t stride;                  /* of its positions */
    int64_t out_stride, row, column; /* its outputs are every out_stride-th of a map, from this one on */
};

struct pass {
    int64_t maps, threads;
    const int64_t *heights, *widths; /* of the input */
    const float *x;                  /* NULL: `left` is made already, or of */
    const uint8_t *pixels;           /* [height, width, 3] of each map: 3 × 3 of them are a position's channels */
    const struct norm *norm;
    int64_t silu;
    struct moments before; /* of x, as many blocks as */
    int64_t blocks_before;
    bf16 *left;
    const struct convolution *convolution;
    const float *residual; /* added, or NULL */
    float *out;
    uint8_t *image;  /* instead of `out`: three channels from −1 to 1 as [height, width, 3] */
    bf16 *next_left; /* instead of `out`: y or silu(y) as the `left` of the next convolution */
    int64_t silu_after;
    struct moments after; /* values NULL: not wanted */
    int64_t first_block;  /* of what this convolution adds to them, */
    int64_t blocks_after; /* and how many they have room for */
    char *scratch;
    int64_t scratch_bytes; /* of each thread */
};

struct attention {
    int64_t maps, threads;
    const int64_t *heights, *widths;
    int64_t channels;
    double scale;
    const float *qkv; /* [3·channels] */
    float *out;
    bf16 *right; /* keys, then values, of all maps */
    char *scratch;
    int64_t scratch_bytes; /* of each thread */
};

struct block {
    int64_t map, first, tiles; /* the first tile of its map that is in it */
};

struct tile {
    const bf16 *in;
    int64_t pitch, plane; /* from one row, from 32 channels to the next */
    int64_t out, out_plane, valid;
};

/* Positions of the maps before one, with and without border. */
static int64_t positions_before(const int64_t *heights, const int64_t *widths, int64_t map, int64_t border)
{
    int64_t positions = 0;
    for (int64_t i = 0; i < map; i++)
        positions += (heights[i] + border) * (widths[i] + border);
    return positions;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t output_size(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

/* ---- norms ------------------------------------------------------------------------------------------------------- */

/* x·a + b is the normalised x, channel by channel. */
static void norm_coefficients(const struct pass *p, int64_t map, int64_t channels, float *a, float *b)
{
    const struct norm *norm = p->norm;
    const int64_t width = norm->channels / norm->groups;
    memset(a, 0, channels * sizeof(float));
    memset(b, 0, channels * sizeof(float));
    for (int64_t first = 0; first < norm->channels; first += width) {
        double mean = 0, square = 0, count = 0;
        for (int64_t i = 0; i < p->blocks_before; i++)
            if (p->before.map[i] == map) {
                const float *values = p->before.values + i * 2 * channels + first;
                for (int64_t j = 0; j < width; j++) { /* sets of values merged, one after the other */
                    const double n = p->before.count[i], off = values[j] - mean;
                    square += values[channels + j] + off * off * count * n / (count + n);
                    mean += off * n / (count + n);
                    count += n;
                }
            }
        const double root = 1 / sqrt(square / count + norm->eps);
        for (int64_t c = first; c < first + width; c++) {
            a[c] = (float)(root * norm->weight[c]);
            b[c] = (float)(norm->bias[c] - mean * root * norm->weight[c]);
        }
    }
}

static inline __m512 silu(__m512 y)
{
    const __m512 below = _mm512_add_ps(exp2_ps(_mm512_mul_ps(y, _mm512_set1_ps(-LOG2E))), _mm512_set1_ps(1.0f));
    return BF16_TERMS == 1 ? _mm512_mul_ps(y, _mm512_rcp14_ps(below)) : _mm512_div_ps(y, below);
}

/* left = x, or silu(x·a + b), rows shared out among the threads; scratch: 2 · channels values */
static void normalize_input(const struct pass *p, float *scratch)
{
    const int64_t channels = p->convolution->channels, blocks = channels / DEPTH;
    float *a = scratch, *b = scratch + channels;
    int64_t all = 0, at = 0, begin, end, known = -1;
    for (int64_t map = 0; map < p->maps; map++)
        all += blocks * (p->heights[map] + 2);
    thread_range(all, &begin, &end);
    for (int64_t map = 0; map < p->maps; map++) {
        const int64_t H = p->heights[map], W = p->widths[map];
        const float *x = p->x + positions_before(p->heights, p->widths, map, 0) * channels;
        bf16 *left = p->left + positions_before(p->heights, p->widths, map, 2) * channels * BF16_TERMS;
        for (int64_t row = 0; row < blocks * (H + 2); row++, at++) {
            if (at < begin || at >= end)
                continue;
            const int64_t block = row / (H + 2), y = row % (H + 2) - 1;
            bf16 *to = left + row * (W + 2) * POSITION;
            if (y < 0 || y >= H) {
                memset(to, 0, (W + 2) * POSITION * sizeof(bf16));
                continue;
            }
            if (p->norm->groups && known != map)
                norm_coefficients(p, known = map, channels, a, b);
            const float *from = x + (block * H + y) * W * DEPTH, *by = a + block * DEPTH, *plus = b + block * DEPTH;
            memset(to, 0, POSITION * sizeof(bf16));
            memset(to + (W + 1) * POSITION, 0, POSITION * sizeof(bf16));
            for (int64_t i = 0; i < W; i++, from += DEPTH) {
                __m512 v[2];
                to += POSITION;
                for (int j = 0; j < 2; j++) {
                    v[j] = _mm512_loadu_ps(from + 16 * j);
                    if (p->norm->groups)
                        v[j] = _mm512_fmadd_ps(v[j], _mm512_loadu_ps(by + 16 * j), _mm512_loadu_ps(plus + 16 * j));
                    if (p->silu)
                        v[j] = silu(v[j]);
                }
                store_terms(to, DEPTH, v[0], v[1]);
            }
        }
    }
}

/* Three rows of a map with its border, and beyond them what a vector reads */
static int64_t unfolded_row(int64_t width) { return (width + 2) * 3 + ROWS; }

/* left = the 3 × 3 neighbours of each pixel, from −1 to 1, row after row: 27 values of 32; scratch: three rows */
static void unfold(const struct pass *p, float *rows)
{
    int64_t at = 0, all = 0, begin, end;
    for (int64_t map = 0; map < p->maps; map++)
        all += p->heights[map];
    thread_range(all, &begin, &end);
    for (int64_t map = 0; map < p->maps; map++) {
        const int64_t H = p->heights[map], W = p->widths[map], pitch = unfolded_row(W);
        const uint8_t *pixels = p->pixels + positions_before(p->heights, p->widths, map, 0) * 3;
        bf16 *left = p->left + positions_before(p->heights, p->widths, map, 2) * POSITION;
        float neighbours[2 * DEPTH];
        for (int64_t y = 0; y < H; y++, at++) {
            if (at < begin || at >= end)
                continue;
            memset(rows, 0, 3 * pitch * sizeof(float));
            for (int dy = 0; dy < 3; dy++)
                if (y + dy - 1 >= 0 && y + dy - 1 < H)
                    for (int64_t i = 0; i < 3 * W; i++)
                        rows[dy * pitch + 3 + i] = pixels[(y + dy - 1) * 3 * W + i] * (2 / 255.0f) - 1;
            bf16 *to = left + ((y + 1) * (W + 2) + 1) * POSITION;
            for (int64_t x = 0; x < W; x++, to += POSITION) {
                for (int dy = 0; dy < 3; dy++)
                    _mm512_storeu_ps(neighbours + 9 * dy, _mm512_loadu_ps(rows + dy * pitch + 3 * x));
                store_terms(to, DEPTH, _mm512_loadu_ps(neighbours),
                            _mm512_maskz_loadu_ps((1 << 11) - 1, neighbours + 16));
            }
        }
    }
}

/* Zeros around the maps that are the next convolution's input */
static void clear_border(const struct pass *p)
{
    const struct convolution *c = p->convolution;
    const int64_t blocks = c->matrix.outputs / DEPTH, size = POSITION * sizeof(bf16);
    bf16 *to = p->next_left;
    int64_t begin, end;
    thread_range(blocks, &begin, &end);
    for (int64_t map = 0; map < p->maps; map++) {
        const int64_t H = output_size(p->heights[map], c->stride) + 2, W = output_size(p->widths[map], c->stride) + 2;
        for (int64_t block = begin; block < end; block++) {
            bf16 *plane = to + block * H * W * POSITION;
            memset(plane, 0, W * size);
            memset(plane + (H - 1) * W * POSITION, 0, W * size);
            for (int64_t y = 1; y < H - 1; y++) {
                memset(plane + y * W * POSITION, 0, size);
                memset(plane + ((y + 1) * W - 1) * POSITION, 0, size);
            }
        }
        to += blocks * H * W * POSITION;
    }
}

/* ---- convolutions ------------------------------------------------------------------------------------------------ */

/* c [16 or 32][32] += a·b, over `blocks` times 32 channels and `across` taps; at each it fetches `lines` of `next`. */
static inline __attribute__((always_inline)) void accumulate_taps(int two, const struct tile *t, int64_t offset,
                                                                  int64_t dy, int64_t blocks, int64_t across,
                                                                  int stride, const bf16 *b, float *c, int first,
                                                                  const char *next, int64_t lines)
{
    const bf16 *a = t->in + offset * t->plane + dy * t->pitch, *below = a;
    int64_t plane_below = 0;
    if (two)
        below = t[1].in + offset * t[1].plane + dy * t[1].pitch, plane_below = t[1].plane;
    if (first)
        clear_sums(two ? 4 : 2);
    else
        load_sums(c, DEPTH, two);
    for (int64_t i = 0; i < blocks; i++, a += t->plane, below += plane_below)
        for (int64_t j = 0; j < across; j++, b += 2 * SPAN) {
            for (int64_t line = 0; line < lines; line++, next += 64)
                _mm_prefetch(next, _MM_HINT_T1);
            accumulate(a + j * POSITION, below + j * POSITION, b, two, stride, DEPTH);
        }
    store_sums(c, DEPTH, two);
}

static int64_t tiles_of(const struct pass *p, int64_t map)
{
    const int64_t stride = p->convolution->stride;
    return output_size(p->heights[map], stride) * ((output_size(p->widths[map], stride) + ROWS - 1) / ROWS);
}

/* The tiles of a block: where they come from, where they go */
static void lay_out(const struct pass *p, const struct block *block, struct tile *tiles)
{
    const struct convolution *c = p->convolution;
    int64_t map = block->map, at = block->first;
    for (int64_t i = 0; i < block->tiles; i++, at++) {
        while (at == tiles_of(p, map))
            map++, at = 0;
        const int64_t H = p->heights[map], W = p->widths[map];
        const int64_t height = output_size(H, c->stride), width = output_size(W, c->stride);
        const int64_t across = (width + ROWS - 1) / ROWS, y = at / across, x = at % across * ROWS;
        const int64_t border = p->next_left ? 2 : 0, all = width * c->out_stride + border;
        const int64_t row = y * c->out_stride + c->row + border / 2,
                      column = x * c->out_stride + c->column + border / 2;
        int64_t out = 0; /* positions of the maps before */
        for (int64_t j = 0; j < map; j++)
            out += (output_size(p->heights[j], c->stride) * c->out_stride + border) *
                   (output_size(p->widths[j], c->stride) * c->out_stride + border);
        const int64_t numbers = p->next_left ? POSITION : DEPTH; /* of 32 channels of a position */
        out = p->image ? 3 * (out + row * all + column)
                       : out * c->matrix.outputs / DEPTH * numbers + (row * all + column) * numbers;
        const bf16 *left = p->left + positions_before(p->heights, p->widths, map, 2) * c->channels * BF16_TERMS;
        tiles[i] = (struct tile){
            .in = left + ((y * c->stride + c->top) * (W + 2) + x * c->stride + c->left) * POSITION,
            .pitch = (W + 2) * POSITION,
            .plane = (H + 2) * (W + 2) * POSITION,
            .out = out,
            .out_plane = (height * c->out_stride + border) * all * numbers,
            .valid = width - x < ROWS ? width - x : ROWS,
        };
    }
}

static void write_pixels(uint8_t *to, __m512 y)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(-1.0f)), one);
    const __m512i levels = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_add_ps(y, one), _mm512_set1_ps(127.5f)));
    _mm_mask_storeu_epi8(to, 7, _mm512_cvtepi32_epi8(levels));
}

/* The sums of 32 channels from `panel` · 32 on are whole. */
static void write_panel(const struct pass *p, const struct tile *tiles, const struct block *block, int64_t id,
                        float *sums, int64_t panel)
{
    const struct convolution *c = p->convolution;
    const float *bias = c->matrix.b + panel * DEPTH;
    __m512 mean[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, square[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t count = 0;
    for (int64_t i = 0; i < block->tiles; i++) {
        float *y = sums + i * TILE;
        const int64_t step = c->out_stride * (p->next_left ? POSITION : DEPTH);
        int64_t at = tiles[i].out + panel * tiles[i].out_plane;
        for (int64_t row = 0; row < tiles[i].valid; row++, y += DEPTH, at += step) {
            __m512 v[2];
            for (int j = 0; j < 2; j++) {
                v[j] = _mm512_add_ps(_mm512_loadu_ps(y + 16 * j), _mm512_loadu_ps(bias + 16 * j));
                if (p->residual)
                    v[j] = _mm512_add_ps(v[j], _mm512_loadu_ps(p->residual + at + 16 * j));
                mean[j] = _mm512_add_ps(mean[j], v[j]);
                if (p->silu_after)
                    v[j] = silu(v[j]);
                if (!p->next_left && !p->image)
                    _mm512_storeu_ps(p->out + at + 16 * j, v[j]);
                if (p->after.values)
                    _mm512_storeu_ps(y + 16 * j, v[j]);
            }
            if (p->next_left)
                store_terms(p->next_left + at, DEPTH, v[0], v[1]);
            if (p->image)
                write_pixels(p->image + tiles[i].out + row * 3, v[0]);
        }
        count += tiles[i].valid;
    }
    if (!p->after.values)
        return;
    for (int j = 0; j < 2; j++)
        mean[j] = _mm512_div_ps(mean[j], _mm512_set1_ps((float)count));
    for (int64_t i = 0; i < block->tiles; i++)
        for (int64_t row = 0; row < tiles[i].valid; row++)
            for (int j = 0; j < 2; j++) {
                const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(sums + i * TILE + row * DEPTH + 16 * j), mean[j]);
                square[j] = _mm512_fmadd_ps(d, d, square[j]);
            }
    float *values = p->after.values + (p->first_block + id) * 2 * c->matrix.outputs + panel * DEPTH;
    for (int j = 0; j < 2; j++) {
        _mm512_storeu_ps(values + 16 * j, mean[j]);
        _mm512_storeu_ps(values + c->matrix.outputs + 16 * j, square[j]);
    }
    p->after.map[p->first_block + id] = block->map;
    p->after.count[p->first_block + id] = count;
}

/* Some panels of 32 outputs of a block */
static void convolve(const struct pass *p, const struct block *block, int64_t id, int64_t panel, int64_t last)
{
    const struct convolution *c = p->convolution;
    const int64_t blocks = c->channels / DEPTH, stride = c->stride * POSITION * sizeof(bf16);
    const int64_t inputs = c->matrix.inputs / DEPTH * 2 * SPAN, pairs = (block->tiles + 1) / 2;
    const int64_t lines = (32 * BF16_TERMS + pairs - 1) / pairs;
    struct tile tiles[TILES];
    float sums[TILES * TILE] __attribute__((aligned(64)));
    lay_out(p, block, tiles);
    for (; panel < last; panel++) {
        const bf16 *b = c->matrix.w + panel * inputs;
        for (int64_t first = 0; first < blocks; first += c->blocks_per_chunk) {
            const int64_t in_chunk = blocks - first < c->blocks_per_chunk ? blocks - first : c->blocks_per_chunk,
                          steps = in_chunk * c->across;
            for (int64_t dy = 0; dy < c->down; dy++, b += steps * 2 * SPAN) {
                const char *next = (const char *)(b + steps * 2 * SPAN);
                const int whole = first == 0 && dy == 0;
                for (int64_t i = 0; i < block->tiles; i += 2, next += lines * steps * 64)
                    if (i + 1 < block->tiles)
                        accumulate_taps(1, tiles + i, first, dy, in_chunk, c->across, stride, b, sums + i * TILE, whole,
                                        next, lines);
                    else
                        accumulate_taps(0, tiles + i, first, dy, in_chunk, c->across, stride, b, sums + i * TILE, whole,
                                        next, lines);
            }
        }
        write_panel(p, tiles, block, id, sums, panel);
    }
}

/* Blocks of all maps; of a map each where moments are wanted. How many there are; `blocks` may be NULL. */
static int64_t make_blocks(const struct pass *p, struct block *blocks)
{
    int64_t found = 0, space = 0;
    for (int64_t map = 0; map < p->maps; map++) {
        if (p->after.values)
            space = 0;
        for (int64_t at = 0, tiles = tiles_of(p, map); at < tiles;) {
            if (space == 0) {
                if (blocks)
                    blocks[found] = (struct block){map, at, 0};
                found++, space = TILES;
            }
            const int64_t more = tiles - at < space ? tiles - at : space;
            if (blocks)
                blocks[found - 1].tiles += more;
            at += more, space -= more;
        }
    }
    return found;
}

/* Bytes of scratch that a thread needs: the blocks, then what the input is prepared with. */
static int64_t scratch_of(const struct pass *p, int64_t count)
{
    int64_t values = 2 * p->convolution->channels;
    for (int64_t map = 0; p->pixels && map < p->maps; map++)
        values = max_i64(values, 3 * unfolded_row(p->widths[map]));
    return aligned(count * sizeof(struct block)) + aligned(values * sizeof(float));
}

static int positive_sizes(const int64_t *heights, const int64_t *widths, int64_t maps)
{
    for (int64_t map = 0; map < maps; map++)
        if (heights[map] < 1 || widths[map] < 1)
            return 0;
    return maps > 0;
}

/* Whether a convolution's numbers fit each other. */
static int fits(const struct pass *p)
{
    const struct convolution *c = p->convolution;
    const struct packed_matrix *m = &c->matrix;
    const struct norm *norm = p->norm;
    if (p->threads < 1 || !positive_sizes(p->heights, p->widths, p->maps))
        return 0;
    if (c->channels < DEPTH || c->channels % DEPTH || m->outputs < DEPTH || m->outputs % DEPTH)
        return 0;
    if (c->down < 1 || c->down > 3 || c->across < 1 || c->across > 3 || c->blocks_per_chunk < 1)
        return 0;
    if (m->inputs != c->channels * c->down * c->across || c->stride < 1 || c->stride > 2)
        return 0;
    if (c->top < 0 || c->top > 1 || c->left < 0 || c->left > 1 || (p->image && (m->outputs != DEPTH || p->residual)))
        return 0;
    if (c->out_stride < 1 || c->row < 0 || c->row >= c->out_stride || c->column < 0 || c->column >= c->out_stride)
        return 0;
    return !norm->groups || (norm->groups > 0 && norm->channels > 0 && norm->channels <= c->channels &&
                             norm->channels % norm->groups == 0 && p->before.values);
}

/* Prepare the input, unless it is, and convolve it. Returns how many blocks there were; −1, and nothing is written, if
 * numbers don't fit each other, or the memory. */
int64_t car_convolve(const struct pass *p)
{
    if (!fits(p))
        return -1;
    const int64_t count = make_blocks(p, NULL), panels = p->convolution->matrix.outputs / DEPTH;
    if (scratch_of(p, count) > p->scratch_bytes || (p->after.values && p->first_block + count > p->blocks_after))
        return -1;
#pragma omp parallel num_threads(p->threads)
    {
        char *scratch = p->scratch + omp_get_thread_num() * p->scratch_bytes;
        struct block *blocks = (struct block *)scratch;
        float *values = (float *)(scratch + aligned(count * sizeof(struct block)));
        const int64_t threads = omp_get_num_threads();
        /* so many shares of a block's outputs, that there is work for all */
        const int64_t wanted = (8 * threads + count - 1) / count, shares = wanted < panels ? wanted : panels;
        /* neighbouring blocks to one thread, since they read the same rows, but so few that nobody waits long */
        const int64_t chunk = count * shares / (8 * threads) + 1;
        make_blocks(p, blocks);
        configure_tiles();
        if (p->pixels)
            unfold(p, values);
        else if (p->x)
            normalize_input(p, values);
        if (p->next_left)
            clear_border(p);
#pragma omp barrier
#pragma omp for schedule(dynamic, chunk)
        for (int64_t task = 0; task < count * shares; task++) {
            const int64_t share = task / count, id = task % count;
            convolve(p, blocks + id, id, panels * share / shares, panels * (share + 1) / shares);
        }
        _tile_release();
    }
    return count;
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* Keys and values of 32 tokens as right operands */
static void pack_tokens(const struct attention *p, const float *qkv, int64_t tokens, int64_t group, bf16 *k, bf16 *v)
{
    const int64_t blocks = p->channels / DEPTH;
    for (int64_t block = 0; block < blocks; block++, k += 2 * SPAN, v += 2 * SPAN) {
        const float *keys = qkv + (blocks + block) * tokens * DEPTH, *values = keys + blocks * tokens * DEPTH;
        __m512i r[BF16_TERMS][32], rows[BF16_TERMS][32], terms[BF16_TERMS];
        for (int64_t i = 0; i < 32; i++) {
            const int64_t token = 32 * group + i;
            const __m512 zero = _mm512_setzero_ps();
            const float *key = keys + token * DEPTH, *value = values + token * DEPTH;
            const int none = token >= tokens;
            split_bf16(none ? zero : _mm512_loadu_ps(key), none ? zero : _mm512_loadu_ps(key + 16), terms);
            for (int j = 0; j < BF16_TERMS; j++)
                r[j][i] = terms[j];
            split_bf16(none ? zero : _mm512_loadu_ps(value), none ? zero : _mm512_loadu_ps(value + 16), terms);
            for (int j = 0; j < BF16_TERMS; j++)
                rows[j][i] = terms[j];
        }
        for (int j = 0; j < BF16_TERMS; j++)
            for (int half = 0; half < 2; half++) {
                transpose_16x16(r[j] + 16 * half);
                for (int i = 0; i < 16; i++) {
                    _mm512_store_si512(k + half * SPAN + j * TILE + 32 * i, r[j][16 * half + i]);
                    _mm512_store_si512(v + half * SPAN + j * TILE + 32 * i,
                                       interleave(rows[j][2 * i], rows[j][2 * i + 1], half));
                }
            }
    }
}

/* Values of a row of scores, and beyond them what a tile stores */
static int64_t scores_row(int64_t groups) { return groups * 32 + 16; }

/* Bytes of scratch that a thread needs for a map of so many tokens: queries, weights, scores. */
static int64_t attention_scratch(const struct attention *p, int64_t tokens)
{
    const int64_t groups = (tokens + 31) / 32;
    const int64_t operands = 2 * (p->channels / DEPTH + groups) * SPAN * sizeof(bf16);
    return operands + 32 * scores_row(groups) * sizeof(float);
}

/* out = softmax(scale·q·kᵀ)·v, 32 queries */
static void attend(const struct attention *p, const float *qkv, const bf16 *k, const bf16 *v, int64_t tokens,
                   int64_t first, float *out, char *scratch)
{
    const int64_t blocks = p->channels / DEPTH, groups = (tokens + 31) / 32, stride = scores_row(groups);
    const int64_t queries = tokens - first < 32 ? tokens - first : 32;
    const __m512 scale = _mm512_set1_ps((float)p->scale);
    bf16 *q = (bf16 *)scratch, *weights = q + 2 * blocks * SPAN;
    float *scores = (float *)(weights + 2 * groups * SPAN), inverse_sums[32];
    float sums[2 * TILE] __attribute__((aligned(64)));
    for (int64_t i = 0; i < queries; i++)
        for (int64_t block = 0; block < blocks; block++) {
            const float *from = qkv + (block * tokens + first + i) * DEPTH;
            bf16 *to = q + (i / 16 * blocks + block) * SPAN + i % 16 * DEPTH;
            store_row(to, _mm512_mul_ps(scale, _mm512_loadu_ps(from)),
                      _mm512_mul_ps(scale, _mm512_loadu_ps(from + 16)));
        }
    for (int64_t group = 0; group < groups; group++) {
        clear_sums(4);
        for (int64_t block = 0; block < blocks; block++, k += 2 * SPAN)
            accumulate(q + block * SPAN, q + (blocks + block) * SPAN, k, 1, 64, TILE);
        store_sums(scores + 32 * group, stride, 1);
    }
    for (int64_t i = 0; i < queries; i++)
        inverse_sums[i] = softmax_row(scores + i * stride, tokens, weights + i / 16 * groups * SPAN + i % 16 * DEPTH);
    for (int64_t block = 0; block < blocks; block++) {
        clear_sums(4);
        for (int64_t group = 0; group < groups; group++)
            accumulate(weights + group * SPAN, weights + (groups + group) * SPAN,
                       v + (group * blocks + block) * 2 * SPAN, 1, 64, TILE);
        store_sums(sums, DEPTH, 1);
        for (int64_t i = 0; i < queries; i++)
            for (int j = 0; j < 2; j++) {
                const __m512 y = _mm512_loadu_ps(sums + i * DEPTH + 16 * j);
                _mm512_storeu_ps(out + (block * tokens + first + i) * DEPTH + 16 * j,
                                 _mm512_mul_ps(y, _mm512_set1_ps(inverse_sums[i])));
            }
    }
}

/* 0; −1, and nothing is written, if numbers don't fit each other, or the memory. */
int64_t car_attend(const struct attention *p)
{
    if (p->threads < 1 || p->channels < DEPTH || p->channels % DEPTH)
        return -1;
    if (!positive_sizes(p->heights, p->widths, p->maps))
        return -1;
    for (int64_t map = 0; map < p->maps; map++)
        if (attention_scratch(p, p->heights[map] * p->widths[map]) > p->scratch_bytes)
            return -1;
#pragma omp parallel num_threads(p->threads)
    {
        char *scratch = p->scratch + omp_get_thread_num() * p->scratch_bytes;
        int64_t all = 0, begin, end;
        configure_tiles();
        for (int64_t map = 0; map < p->maps; map++)
            all += (p->heights[map] * p->widths[map] + 31) / 32;
        thread_range(all, &begin, &end);
        for (int attending = 0; attending < 2; attending++) {
            int64_t at = 0;
            for (int64_t map = 0; map < p->maps; map++) {
                const int64_t tokens = p->heights[map] * p->widths[map], groups = (tokens + 31) / 32;
                const int64_t earlier = positions_before(p->heights, p->widths, map, 0) * p->channels;
                const float *qkv = p->qkv + 3 * earlier;
                const int64_t size = groups * 32 * p->channels * BF16_TERMS;
                bf16 *k = p->right + 2 * at * 32 * p->channels * BF16_TERMS, *v = k + size;
                for (int64_t group = 0; group < groups; group++, at++)
                    if (at >= begin && at < end) {
                        if (attending)
                            attend(p, qkv, k, v, tokens, 32 * group, p->out + earlier, scratch);
                        else
                            pack_tokens(p, qkv, tokens, group, k + group * 32 * p->channels * BF16_TERMS,
                                        v + group * 32 * p->channels * BF16_TERMS);
                    }
            }
#pragma omp barrier
        }
        _tile_release();
    }
    return 0;
}
