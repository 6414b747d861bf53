// The product without tiles: 8 positions times 32 output channels, or 16 times 16, in sixteen registers.
#pragma once
#include "epilogues.h"

// A step's part for 16 channels: of four bytes, or of two numbers in bfloat16.
template <bool FROM8> static inline __m512i add_products(__m512i sums, __m512i a, __m512i b) {
    if constexpr (FROM8) return _mm512_dpbusd_epi32(sums, a, b);
#ifdef __AVX512BF16__
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), (__m512bh)a, (__m512bh)b));
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    const __m512 first = _mm512_fmadd_ps(
        _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), _mm512_castsi512_ps(sums));
    return _mm512_castps_si512(_mm512_fmadd_ps(
        _mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), first));
#endif
}
// Some steps of the sums of 8 positions for 32 channels, or of 16 positions for 16 of them, which stay in 16 registers.
// They go on from what lies at `from`, a position's `next` bytes behind the other's (0 for a bias).
template <bool FROM8, int COLS>
static __attribute__((noinline)) void product(const char* a, i64 lda, const Run* run, const Run* stop, const char* b,
                                              const char* from, i64 next, char* to) {
    constexpr int ROWS = 16 / COLS;
    __m512i sums[ROWS][COLS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int i = 0; i < COLS; i++) sums[r][i] = _mm512_loadu_si512(from + next * r + 64 * i);
    for (; run < stop; run++) {
        const char* pixels = a + run->from;
        const char* at = b + run->weights;
        for (const char* const end = at + 128 * run->count; at < end; at += 128, pixels += 4) {
            __m512i weights[COLS];
#pragma GCC unroll 2
            for (int i = 0; i < COLS; i++) weights[i] = _mm512_load_si512(at + 64 * i);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, pixels + r * lda, 4);
                const __m512i all = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                for (int i = 0; i < COLS; i++) sums[r][i] = add_products<FROM8>(sums[r][i], all, weights[i]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int i = 0; i < COLS; i++) _mm512_store_si512(to + 128 * r + 64 * i, sums[r][i]);
}
template <int ACT, int RES, int FLOW>
static void multiply(const Layer& l, const i64* koff, const Block* blocks, char* arena, Worker& w, size_t ntiles,
                     i64 lda, i64 n0, i64 n1) {
    const __m512 slope = _mm512_set1_ps(as_float(l.act_param));
    const Run* const runs = (const Run*)koff;
    // Before the last step the sums go to memory and come back.
    auto tile = [&](i64 n, size_t t, i64 k0, i64 k1) __attribute__((always_inline)) {
        const char* const a = w.tile_a[t] + blocks[n].a_off;
        const char* const b = (const char*)l.weights + n * (runs[l.ksteps - 1].weights + runs[l.ksteps - 1].count * 128);
        const int32_t* const pos = &w.tile_pos[t * 16];
        const int there = ~_mm512_movepi32_mask(_mm512_loadu_si512(pos)) & 0xffff;
        if (!there) return;
        char* const partial = w.partial + t * 2048;
        char* const to = k1 < l.ksteps ? partial : (char*)w.acc[0];
        const char* const from = k0 ? partial : (const char*)l.bias + n * 128;
        const i64 next = k0 ? 128 : 0;
        if (blocks[n].nstore <= 16) product<FLOW & 1, 1>(a, lda, runs + k0, runs + k1, b, from, next, to);
        else for (int r = 0; r < 16; r += 8)
            if (there >> r & 0xff)
                product<FLOW & 1, 2>(a + r * lda, lda, runs + k0, runs + k1, b, from + r * next, next, to + r * 128);
        if (k1 < l.ksteps) return;
        const int r0 = there & 0xff ? 0 : 8, r1 = there >> 8 ? 16 : 8;
        const Pending e = {w.acc[0], pos, &blocks[n]};
        if constexpr (FLOW == HALF) finish_rows<ACT, RES>(arena, e, r0, r1, slope, l.is_f32);
        else if constexpr (FLOW == BYTES) finish_bytes<ACT, RES>(arena, e, r0, r1, slope);
        else finish_mixed<ACT, FLOW == FROM_BYTES>(arena, l, e, r0, r1, slope);
    };
    if (l.by_position) {
        for (size_t t = 0; t < ntiles; t++) for (i64 n = n0; n < n1; n++) tile(n, t, 0, l.ksteps);
    } else {  // a part of the weights stays in the first-level cache
        for (i64 n = n0; n < n1; n++)
            for (i64 k = 0; k < l.ksteps; k += l.steps_at_once)
                for (size_t t = 0; t < ntiles; t++) tile(n, t, k, std::min(l.ksteps, k + l.steps_at_once));
    }
}
