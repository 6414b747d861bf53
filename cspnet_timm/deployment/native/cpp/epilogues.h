// From a block's sums to the map: activation, residual, rounding.
#pragma once
#include "memory.h"
#include "numbers.h"

struct Pending { const float* acc; const int32_t* pos; const Block* block; };

template <int ACT, int RES>
static inline void finish_rows(char* arena, const Pending& e, int r0, int r1, __m512 slope, bool is_f32) {
    const Block& k = *e.block;
    const i64 out_ps = k.out_ps, res_ps = k.res_ps;
    char* const out_base = arena + k.out_off;
    const char* const res_base = arena + k.res_off;
    const __mmask32 mask = k.nstore >= 32 ? ~0u : (1u << k.nstore) - 1;
    const float* acc = e.acc + r0 * 32;
    const int32_t* at = e.pos + r0;
    const int32_t* const stop = e.pos + r1;
    auto row = [&](i64 pos) __attribute__((always_inline)) {
        __m512 a = _mm512_load_ps(acc), b = _mm512_load_ps(acc + 16);
        __m512 ra, rb;
        if (RES) {
            const __m512i res = _mm512_maskz_loadu_epi16(mask, res_base + pos * res_ps);
            ra = lo_half(res); rb = hi_half(res);
        }
        if (RES == 1) { a = _mm512_add_ps(a, ra); b = _mm512_add_ps(b, rb); }
        a = activate<ACT>(a, slope); b = activate<ACT>(b, slope);
        if (RES == 2) { a = _mm512_add_ps(a, ra); b = _mm512_add_ps(b, rb); }
        char* out = out_base + pos * out_ps;
        if (__builtin_expect(is_f32, 0)) {
            _mm512_mask_storeu_ps(out, (__mmask16)mask, a);
            _mm512_mask_storeu_ps(out + 64, (__mmask16)(mask >> 16), b);
        } else _mm512_mask_storeu_epi16(out, mask, narrow2(a, b));
    };
    if (at[0] >= 0 && stop[-1] - at[0] == r1 - r0 - 1) {  // neighbours in memory, as nearly all are
        const i64 first = at[0];
        for (i64 i = 0; i < r1 - r0; i++, acc += 32) row(first + i);
    } else {
        for (; at < stop; at++, acc += 32) if (*at >= 0) row(*at);
    }
}

#if TILES
// Two rows at a time, whose bytes fill a register together.
template <int ACT, int RES>
static inline void finish_bytes(char* arena, const Pending& e, int r0, int r1, __m512h slope) {
    const Block& k = *e.block;
    const EpilogueTiles& q = *(const EpilogueTiles*)k.epilogue;
    const i64 out_ps = k.out_ps, res_ps = k.res_ps;
    char* const out_base = arena + k.out_off;
    const char* const res_base = arena + k.res_off;
    const __mmask32 mask = k.nstore >= 32 ? ~0u : (1u << k.nstore) - 1;
    const __m512i shift_a = _mm512_loadu_si512(q.shift), shift_b = _mm512_loadu_si512(q.shift + 16);
    const __m512h mul = _mm512_loadu_ph(q.mul), res_mul = _mm512_loadu_ph(q.res_mul);
    const __m512h inv = _mm512_loadu_ph(q.inv), add = _mm512_loadu_ph(q.add);
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i back = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const char* acc = (const char*)(e.acc + r0 * 32);
    auto words = [&](i64 pos) __attribute__((always_inline)) {
        const __m512i a = _mm512_srav_epi32(_mm512_load_si512(acc), shift_a);
        const __m512i b = _mm512_srav_epi32(_mm512_load_si512(acc + 64), shift_b);
        acc += 128;
        __m512h x = _mm512_cvtepi16_ph(_mm512_packs_epi32(a, b)), res;
        if (RES) {
            const __m256i r = _mm256_maskz_loadu_epi8(mask, res_base + pos * res_ps);
            res = _mm512_cvtepi16_ph(_mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(r, lanes)));
        }
        if (RES == 1) x = _mm512_fmadd_ph(x, mul, _mm512_mul_ph(res, res_mul)); else x = _mm512_mul_ph(x, mul);
        x = activate_ph<ACT>(x, slope);
        x = _mm512_fmadd_ph(x, inv, RES == 2 ? _mm512_fmadd_ph(res, res_mul, add) : add);
        return _mm512_cvtph_epi16(x);
    };
    const int32_t* const at = e.pos;
    const bool neighbours = at[r0] >= 0 && at[r1 - 1] - at[r0] == r1 - r0 - 1;
    for (int r = r0; r < r1; r += 2) {
        const i64 p = at[r], s = at[r + 1];
        if (!neighbours && p < 0 && s < 0) { acc += 256; continue; }
        const __m512i first = words(p < 0 ? s : p), second = words(s < 0 ? p : s);
        const __m512i both = _mm512_permutexvar_epi32(back, _mm512_packus_epi16(first, second));
        if (neighbours || p >= 0) _mm256_mask_storeu_epi8(out_base + p * out_ps, mask, _mm512_castsi512_si256(both));
        if (neighbours || s >= 0) _mm256_mask_storeu_epi8(out_base + s * out_ps, mask, _mm512_extracti64x4_epi64(both, 1));
    }
}
#else
// A smooth activation in pieces of parabolas. Piece k is for what is next to k / GRAIN, those at the ends for all that is
// beyond; a lane takes its own by the lowest five bits of k.
static const float GRAIN = 1.6f;
struct Curve {
    alignas(64) float c[3][32];
    Curve(double (*f)(double), float above, float slope_above) {
        for (int k = -16; k < 16; k++) {
            double x[3], y[3];
            for (int i = 0; i < 3; i++) { x[i] = (k + (i - 1) * 0.4330127) / GRAIN; y[i] = f(x[i]); }
            const double d = (y[1] - y[0]) / (x[1] - x[0]), dd = ((y[2] - y[1]) / (x[2] - x[1]) - d) / (x[2] - x[0]);
            const double inner[3] = {y[0] - d * x[0] + dd * x[0] * x[1], d - dd * (x[0] + x[1]), dd};
            const double outer[3] = {k > 0 ? above : 0, k > 0 ? slope_above : 0, 0};
            for (int i = 0; i < 3; i++) c[i][k & 31] = (float)(k > -15 && k < 15 ? inner[i] : outer[i]);
        }
    }
};
static const Curve CURVES[3] = {
    {[](double x) { return x / (1 + std::exp(-x)); }, 0, 1},
    {[](double x) { return 1 / (1 + std::exp(-x)); }, 1, 0},
    {[](double x) { return x * std::tanh(std::log1p(std::exp(x))); }, 0, 1}};

// From sums to bytes: four registers of sums become one of bytes.
template <int ACT, int RES>
static inline void finish_bytes(char* arena, const Pending& e, int r0, int r1, __m512 slope) {
    constexpr bool LINEAR = ACT == NONE || ACT == RELU || ACT == LEAKY_RELU;  // in steps of the result throughout
    constexpr bool SMOOTH = ACT == SILU || ACT == SIGMOID || ACT == MISH;
    const Block& k = *e.block;
    const Epilogue& q = *(const Epilogue*)k.epilogue;
    const int32_t* const at = e.pos;
    char* const out = arena + k.out_off;
    const char* const residual = arena + k.res_off;
    const __mmask32 mask = k.nstore >= 32 ? ~0u : (1u << k.nstore) - 1;
    const __m512i back = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 mul[2], add[2], inv[2], res_mul[2], curve[3][2];
    for (int i = 0; i < 2; i++) {
        mul[i] = _mm512_loadu_ps(q.mul + 16 * i);
        add[i] = _mm512_loadu_ps(q.add + 16 * i);
        inv[i] = _mm512_loadu_ps(q.inv + 16 * i);
        res_mul[i] = _mm512_loadu_ps(q.res_mul + 16 * i);
    }
    if (SMOOTH) {
        const Curve& of = CURVES[ACT == SILU ? 0 : ACT == SIGMOID ? 1 : 2];
        for (int i = 0; i < 3; i++)
            for (int h = 0; h < 2; h++) curve[i][h] = _mm512_load_ps(of.c[i] + 16 * h);
    }
    auto numbers = [&](int row, int i, i64 pos) __attribute__((always_inline)) {  // of 16 channels
        __m512 x = _mm512_cvtepi32_ps(_mm512_load_si512((const char*)e.acc + row * 128 + 64 * i)), res;
        if (RES) {
            const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)(mask >> (16 * i)), residual + pos * k.res_ps + 16 * i);
            res = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        }
        if (RES == 0 && ACT == NONE) return _mm512_cvtps_epi32(_mm512_fmadd_ps(x, mul[i], add[i]));
        if (RES == 1) x = _mm512_fmadd_ps(x, mul[i], _mm512_mul_ps(res, res_mul[i])); else x = _mm512_mul_ps(x, mul[i]);
        const __m512 rest = RES == 2 ? _mm512_fmadd_ps(res, res_mul[i], add[i]) : add[i];
        if (SMOOTH) {
            const __m512 inside = _mm512_range_ps(x, _mm512_set1_ps(15.49f / GRAIN), 2);
            const __m512i piece = _mm512_castps_si512(_mm512_fmadd_ps(inside, _mm512_set1_ps(GRAIN), _mm512_set1_ps(12582912.f)));
            __m512 y = _mm512_permutex2var_ps(curve[2][0], piece, curve[2][1]);
            y = _mm512_fmadd_ps(y, x, _mm512_permutex2var_ps(curve[1][0], piece, curve[1][1]));
            x = _mm512_fmadd_ps(y, x, _mm512_permutex2var_ps(curve[0][0], piece, curve[0][1]));
        } else x = activate<ACT>(x, slope);
        return _mm512_cvtps_epi32(LINEAR ? _mm512_add_ps(x, rest) : _mm512_fmadd_ps(x, inv[i], rest));
    };
    if (k.nstore > 16) {
        for (int r = r0; r < r1; r += 2) {
            const i64 p = at[r], s = at[r + 1];
            if (p < 0 && s < 0) continue;
            const i64 p_ = p < 0 ? s : p, s_ = s < 0 ? p : s;
            const __m512i both = _mm512_permutexvar_epi32(back, _mm512_packus_epi16(
                _mm512_packs_epi32(numbers(r, 0, p_), numbers(r, 1, p_)),
                _mm512_packs_epi32(numbers(r + 1, 0, s_), numbers(r + 1, 1, s_))));
            if (p >= 0) _mm256_mask_storeu_epi8(out + p * k.out_ps, mask, _mm512_castsi512_si256(both));
            if (s >= 0) _mm256_mask_storeu_epi8(out + s * k.out_ps, mask, _mm512_extracti64x4_epi64(both, 1));
        }
        return;
    }
    for (int r = r0; r < r1; r += 4) {
        i64 p[4];
        for (int i = 0; i < 4; i++) p[i] = at[r + i] < 0 ? 0 : at[r + i];
        const __m512i four = _mm512_permutexvar_epi32(back, _mm512_packus_epi16(
            _mm512_packs_epi32(numbers(r, 0, p[0]), numbers(r + 1, 0, p[1])),
            _mm512_packs_epi32(numbers(r + 2, 0, p[2]), numbers(r + 3, 0, p[3]))));
        const __mmask16 m = (__mmask16)mask;
        if (at[r] >= 0) _mm_mask_storeu_epi8(out + p[0] * k.out_ps, m, _mm512_castsi512_si128(four));
        if (at[r + 1] >= 0) _mm_mask_storeu_epi8(out + p[1] * k.out_ps, m, _mm512_extracti32x4_epi32(four, 1));
        if (at[r + 2] >= 0) _mm_mask_storeu_epi8(out + p[2] * k.out_ps, m, _mm512_extracti32x4_epi32(four, 2));
        if (at[r + 3] >= 0) _mm_mask_storeu_epi8(out + p[3] * k.out_ps, m, _mm512_extracti32x4_epi32(four, 3));
    }
}
#endif

template <int ACT, bool FROM8>
static inline void finish_mixed(char* arena, const Layer& l, const Pending& e, int r0, int r1, __m512 slope) {
    const Block& k = *e.block;
    const Epilogue& q = *(const Epilogue*)k.epilogue;
    const float* acc = e.acc + r0 * 32;
    for (int r = r0; r < r1; r++, acc += 32) {
        const i64 pos = e.pos[r];
        if (pos < 0) continue;
        __m512 v[2], res[2];
        if (l.res_mode) {
            const char* from = arena + k.res_off + pos * k.res_ps;
            load_numbers(from, l.in2_8, k.nstore, res[0], res[1]);
        }
        for (int i = 0; i < 2; i++) {
            v[i] = FROM8 ? _mm512_cvtepi32_ps(_mm512_load_si512(acc + 16 * i)) : _mm512_load_ps(acc + 16 * i);
            if (FROM8) v[i] = _mm512_mul_ps(v[i], _mm512_loadu_ps(q.mul + 16 * i));
            if (l.res_mode) res[i] = _mm512_fmadd_ps(res[i], _mm512_loadu_ps(q.res_mul + 16 * i), _mm512_loadu_ps(q.res_add + 16 * i));
            if (l.res_mode == 1) v[i] = _mm512_add_ps(v[i], res[i]);
            v[i] = activate<ACT>(v[i], slope);
            if (l.res_mode == 2) v[i] = _mm512_add_ps(v[i], res[i]);
            if (l.out8) v[i] = _mm512_fmadd_ps(v[i], _mm512_loadu_ps(q.inv + 16 * i), _mm512_loadu_ps(q.add + 16 * i));
        }
        char* out = arena + k.out_off + pos * k.out_ps;
        if (l.out8) store_bytes(out, v[0], v[1], k.nstore);
        else if (!l.is_f32) store_bf16(out, narrow2(v[0], v[1]), k.nstore);
        else {
            const __mmask32 mask = k.nstore >= 32 ? ~0u : (1u << k.nstore) - 1;
            _mm512_mask_storeu_ps(out, (__mmask16)mask, v[0]);
            _mm512_mask_storeu_ps(out + 64, (__mmask16)(mask >> 16), v[1]);
        }
    }
}
