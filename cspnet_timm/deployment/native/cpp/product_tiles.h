// The product in AMX's tiles: 32 positions times 32 output channels in four of them.
#pragma once
#include "epilogues.h"

#define PRODUCT(t, a, b) \
    do { if constexpr (FLOW & 1) _tile_dpbusd(t, a, b); else _tile_dpbf16ps(t, a, b); } while (0)
template <int ACT, int RES, int FLOW>
static void multiply(const Layer& l, const i64* koff, const Block* blocks, char* arena, Worker& w, size_t ntiles,
                     i64 lda, i64 n0, i64 n1) {
    const __m512 slope = _mm512_set1_ps(as_float(l.act_param));
    const __m512h slope_ph = set_ph(as_float(l.act_param));
    const bool is_f32 = l.is_f32;
    const i64 ksteps = l.ksteps;
    // Rows of the epilogue per step of the product, of bytes in pairs.
    const i64 last = (ksteps - 1) % l.steps_at_once + 1;
    const int rows = FLOW == BYTES ? 2 * (int)((16 + last - 1) / last) : (int)((32 + last - 1) / last);
    auto finish = [&](const Pending& e, int r0, int r1) __attribute__((always_inline)) {
        if constexpr (FLOW == HALF) finish_rows<ACT, RES>(arena, e, r0, r1, slope, is_f32);
        else if constexpr (FLOW == BYTES) finish_bytes<ACT, RES>(arena, e, r0, r1, slope_ph);
        else finish_mixed<ACT, FLOW == FROM_BYTES>(arena, l, e, r0, r1, slope);
    };
    Pending pending = {nullptr, nullptr, nullptr};
    int turn = 0;
    const i64 pairs = (i64)ntiles / 2;
    // Steps k0 to k1 of the product for one pair of tiles; before the last of them the sums go to memory and come back.
    auto tiles = [&](i64 n, i64 pair, i64 k0, i64 k1, const char* ahead, i64 lines) __attribute__((always_inline)) {
        const size_t t = 2 * pair;
        const char* a0 = w.tile_a[t] + blocks[n].a_off;
        const char* a1 = w.tile_a[t + 1] + blocks[n].a_off;
        const char* b = (const char*)l.weights + (n * ksteps + k0) * 2048;
        char* partial = w.partial + pair * 4096;
        if (!k0) {
            const float* bias = (const float*)l.bias + n * 32;
            _tile_loadd(0, bias, 0); _tile_loadd(1, bias + 16, 0);
            _tile_loadd(2, bias, 0); _tile_loadd(3, bias + 16, 0);
        } else {
            _tile_loadd(0, partial, 64); _tile_loadd(1, partial + 1024, 64);
            _tile_loadd(2, partial + 2048, 64); _tile_loadd(3, partial + 3072, 64);
        }
        const bool last = k1 == ksteps;
        int row = pending.acc && last ? 0 : 32;
        for (i64 k = k0; k < k1; k++, b += 2048) {
            const i64 o = koff[k];
            for (i64 i = 0; i < lines; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            _tile_loadd(4, a0 + o, lda);
            _tile_loadd(6, b, 64);
            PRODUCT(0, 4, 6);
            _tile_loadd(7, b + 1024, 64);
            PRODUCT(1, 4, 7);
            _tile_loadd(5, a1 + o, lda);
            PRODUCT(2, 5, 6);
            PRODUCT(3, 5, 7);
            if (row < 32) {
                const int end = std::min(32, row + rows);
                finish(pending, row, end);
                row = end;
            }
        }
        if (!last) {
            _tile_stored(0, partial, 64); _tile_stored(1, partial + 1024, 64);
            _tile_stored(2, partial + 2048, 64); _tile_stored(3, partial + 3072, 64);
            return;
        }
        float* acc = w.acc[turn];
        turn ^= 1;
        _tile_stored(0, acc, 128); _tile_stored(1, acc + 16, 128);
        _tile_stored(2, acc + 512, 128); _tile_stored(3, acc + 528, 128);
        pending = {acc, &w.tile_pos[t * 16], &blocks[n]};
    };
    if (l.by_position) {  // their pixels stay in the first-level cache and the weights stream through it
        for (i64 i = 0; i < pairs; i++)
            for (i64 n = n0; n < n1; n++) tiles(n, i, 0, ksteps, nullptr, 0);
    } else {  // a part of the weights stays there, and the next block's are fetched meanwhile
        for (i64 n = n0; n < n1; n++) {
            const char* ahead = (const char*)l.weights + (n + 1) * ksteps * 2048;
            const i64 lines = l.fetch && n + 1 < n1 ? (31 + pairs) / pairs : 0;  // of 32 that each step of the product has
            const char* const end = ahead + ksteps * 2048;
            for (i64 k0 = 0; k0 < ksteps; k0 += l.steps_at_once) {
                const i64 k1 = std::min(ksteps, k0 + l.steps_at_once);
                for (i64 i = 0; i < pairs; i++) {
                    const i64 now = ahead < end ? lines : 0;
                    tiles(n, i, k0, k1, ahead, now);
                    ahead += now * (k1 - k0) * 64;
                }
            }
        }
    }
    if (pending.acc) finish(pending, 0, 32);
}
#undef PRODUCT
