/* Memory in huge pages, the system's permission to use tiles, and packing: see tiles.h. */
#define _GNU_SOURCE
#include "tiles.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

const int car_bf16_terms = BF16_TERMS;

#ifdef CAR_EMULATED_TILES

/* Memory of the C library: where it ends is known to the byte, and so to AddressSanitizer. */
void *car_allocate(size_t bytes)
{
    void *p = NULL;
    return posix_memalign(&p, 64, bytes) ? NULL : memset(p, 0, bytes);
}

void car_free(void *p, size_t bytes) { (void)bytes, free(p); }

int car_start(void) { return 0; }

#else

enum { PAGE = 2 << 20 }; /* bytes of a huge page */

/* Zeroed memory in huge pages, where the system has them: products run at twice the speed in it. NULL if none is left. */
void *car_allocate(size_t bytes)
{
    size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
    char *p = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    char *start = (char *)(((uintptr_t)p + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    if (start > p)
        munmap(p, start - p);
    munmap(start + size, p + PAGE - start);
    madvise(start, size, MADV_HUGEPAGE);
    return start;
}

void car_free(void *p, size_t bytes) { munmap(p, (bytes + PAGE - 1) / PAGE * PAGE); }

/* Ask the system for the tiles, once a process. 0, or what it answers instead. */
int car_start(void)
{
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) ? errno : 0;
}

#endif

/* A matrix f32 [outputs, inputs] as the right operand. outputs is a multiple of 32, inputs of 32. */
void car_pack(const float *matrix, int64_t outputs, int64_t inputs, bf16 *packed, int64_t threads)
{
    const int64_t tiles = inputs / DEPTH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < outputs; n += ROWS)
        for (int64_t k = 0; k < tiles; k++) {
            __m512i r[BF16_TERMS][16], terms[BF16_TERMS];
            for (int i = 0; i < 16; i++) {
                const float *from = matrix + (n + i) * inputs + k * DEPTH;
                split_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), terms);
                for (int j = 0; j < BF16_TERMS; j++)
                    r[j][i] = terms[j];
            }
            bf16 *to = packed + ((n / 32 * tiles + k) * 2 + n / 16 % 2) * SPAN;
            for (int j = 0; j < BF16_TERMS; j++, to += TILE) {
                transpose_16x16(r[j]);
                for (int i = 0; i < 16; i++)
                    _mm512_store_si512(to + 32 * i, r[j][i]);
            }
        }
}
