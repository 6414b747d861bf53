// Numbers in registers: between bfloat16, bytes and float32, and the activations.
#pragma once
#include "structs.h"

static inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
#ifdef __AVX512BF16__
static inline __m512i narrow2(__m512 lo, __m512 hi) { return (__m512i)_mm512_cvtne2ps_pbh(hi, lo); }
static inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
static inline bf16 round_bf16(float f) { return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(f)), 0); }
#else
static inline __m256i narrow(__m512 v) {  // to the nearest, of two the even one
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}
static inline __m512i narrow2(__m512 lo, __m512 hi) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(lo)), narrow(hi), 1);
}
static inline bf16 round_bf16(float f) { return (bf16)_mm256_extract_epi16(narrow(_mm512_set1_ps(f)), 0); }
#endif
static inline __m512i load_bf16(const void* p, i64 n) {  // n channels, at most 32
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}
static inline void store_bf16(void* p, __m512i v, i64 n) {
    if (n >= 32) _mm512_storeu_si512(p, v); else _mm512_mask_storeu_epi16(p, (1u << n) - 1, v);
}
static inline __m512 lo_half(__m512i v) { return widen(_mm512_castsi512_si256(v)); }
static inline __m512 hi_half(__m512i v) { return widen(_mm512_extracti64x4_epi64(v, 1)); }

// 2^z: by the exponent's bits and a cubic for the fraction; relative error 7.5e-5.
static inline __m512 exp2_fast(__m512 z) {
    const __m512 t = _mm512_reduce_ps(z, 9);  // z - floor(z)
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802446f), t, _mm512_set1_ps(0.22606727f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.69583348f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.99992522f));
    return _mm512_scalef_ps(p, z);
}
static inline __m512 sigmoid(__m512 x) {
    const __m512 e = exp2_fast(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.f)));
}
// Of two operands of which one is no number, the CPU's maximum and minimum give the second.
template <int ACT> static inline __m512 activate(__m512 x, __m512 slope) {
    const __m512 zero = _mm512_setzero_ps();
    switch (ACT) {
        case RELU: return _mm512_max_ps(zero, x);
        case RELU6: return _mm512_min_ps(_mm512_set1_ps(6.f), _mm512_max_ps(zero, x));
        case LEAKY_RELU: return _mm512_fmadd_ps(_mm512_min_ps(zero, x), slope, _mm512_max_ps(zero, x));
        case SILU: return _mm512_mul_ps(x, sigmoid(x));
        case SIGMOID: return sigmoid(x);
        case HARDSIGMOID: case HARDSWISH: {
            __m512 s = _mm512_fmadd_ps(x, _mm512_set1_ps(1.f / 6), _mm512_set1_ps(0.5f));
            s = _mm512_min_ps(_mm512_set1_ps(1.f), _mm512_max_ps(zero, s));
            return ACT == HARDSIGMOID ? s : _mm512_mul_ps(x, s);
        }
        case MISH: {  // x tanh(log(1 + e)) with e = exp(x) is x (e^2 + 2e) / (e^2 + 2e + 2)
            const __m512 e = exp2_fast(_mm512_mul_ps(_mm512_min_ps(_mm512_set1_ps(25.f), x), _mm512_set1_ps(1.44269504f)));
            const __m512 n = _mm512_fmadd_ps(e, e, _mm512_add_ps(e, e));
            return _mm512_mul_ps(x, _mm512_mul_ps(n, _mm512_rcp14_ps(_mm512_add_ps(n, _mm512_set1_ps(2.f)))));
        }
        default: return x;
    }
}
static inline __m512 activate_any(i64 act, __m512 x, __m512 slope) {
    switch (act) {
        case RELU: return activate<RELU>(x, slope);
        case LEAKY_RELU: return activate<LEAKY_RELU>(x, slope);
        case SILU: return activate<SILU>(x, slope);
        case HARDSWISH: return activate<HARDSWISH>(x, slope);
        case HARDSIGMOID: return activate<HARDSIGMOID>(x, slope);
        case SIGMOID: return activate<SIGMOID>(x, slope);
        case MISH: return activate<MISH>(x, slope);
        case RELU6: return activate<RELU6>(x, slope);
        default: return x;
    }
}

#if TILES
// The same in float16, for results of eight bits; the exponential has a relative error of 1.7e-3.
static inline __m512h set_ph(float v) { return _mm512_set1_ph((_Float16)v); }
static inline __m512h exp2_ph(__m512h z) {
    const __m512h t = _mm512_reduce_ph(z, 9);
    __m512h p = _mm512_fmadd_ph(set_ph(0.33718972f), t, set_ph(0.65763656f));
    p = _mm512_fmadd_ph(p, t, set_ph(1.00172457f));
    return _mm512_scalef_ph(p, z);
}
static inline __m512h sigmoid_ph(__m512h x) {
    return _mm512_rcp_ph(_mm512_add_ph(exp2_ph(_mm512_mul_ph(x, set_ph(-1.44269504f))), set_ph(1.f)));
}
template <int ACT> static inline __m512h activate_ph(__m512h x, __m512h slope) {
    const __m512h zero = _mm512_setzero_ph();
    switch (ACT) {
        case RELU: return _mm512_max_ph(x, zero);
        case RELU6: return _mm512_min_ph(_mm512_max_ph(x, zero), set_ph(6.f));
        case LEAKY_RELU: return _mm512_fmadd_ph(_mm512_min_ph(x, zero), slope, _mm512_max_ph(x, zero));
        case SILU: return _mm512_mul_ph(x, sigmoid_ph(x));
        case SIGMOID: return sigmoid_ph(x);
        case HARDSIGMOID: case HARDSWISH: {
            __m512h s = _mm512_fmadd_ph(x, set_ph(1.f / 6), set_ph(0.5f));
            s = _mm512_min_ph(_mm512_max_ph(s, zero), set_ph(1.f));
            return ACT == HARDSIGMOID ? s : _mm512_mul_ph(x, s);
        }
        case MISH: {
            const __m512h e = exp2_ph(_mm512_mul_ph(_mm512_min_ph(x, set_ph(5.f)), set_ph(1.44269504f)));
            const __m512h n = _mm512_fmadd_ph(e, e, _mm512_add_ph(e, e));
            return _mm512_mul_ph(x, _mm512_mul_ph(n, _mm512_rcp_ph(_mm512_add_ph(n, set_ph(2.f)))));
        }
        default: return x;
    }
}
#endif
static inline float as_float(i64 bits) { uint32_t u = (uint32_t)bits; float f; memcpy(&f, &u, 4); return f; }

static inline i64 item(i64 is8) { return is8 ? 1 : 2; }  // bytes of a channel
// 32 channels, n of them there, as float32; of bytes their numbers and not what they stand for.
static inline void load_numbers(const char* p, i64 is8, i64 n, __m512& lo, __m512& hi) {
    if (!is8) {
        const __m512i h = load_bf16(p, n);
        lo = lo_half(h); hi = hi_half(h);
        return;
    }
    const __m256i v = n >= 32 ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi8((1u << n) - 1, p);
    lo = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(v)));
    hi = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(v, 1)));
}
static inline __m128i to_bytes(__m512 v) {
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(v), _mm512_setzero_si512()));
}
static inline void store_bytes(void* p, __m512 lo, __m512 hi, i64 n) {
    const __m256i v = _mm256_set_m128i(to_bytes(hi), to_bytes(lo));
    if (n >= 32) _mm256_storeu_si256((__m256i*)p, v); else _mm256_mask_storeu_epi8(p, (1u << n) - 1, v);
}
static inline __m512 floats(i64 array, i64 c) { return _mm512_loadu_ps((const float*)array + c); }
// A map's 32 channels from c on at its pixel p, as the numbers that they stand for.
static inline void load_map(const char* p, i64 is8, i64 scale, i64 zero, i64 c, i64 n, __m512& lo, __m512& hi) {
    load_numbers(p + c * item(is8), is8, n, lo, hi);
    if (!is8) return;
    lo = _mm512_mul_ps(_mm512_sub_ps(lo, floats(zero, c)), floats(scale, c));
    hi = _mm512_mul_ps(_mm512_sub_ps(hi, floats(zero, c + 16)), floats(scale, c + 16));
}
static inline void store_map(char* p, const Layer& l, i64 c, i64 n, __m512 lo, __m512 hi) {
    if (!l.out8) { store_bf16(p + c * 2, narrow2(lo, hi), n); return; }
    store_bytes(p + c, _mm512_fmadd_ps(lo, floats(l.out_inv, c), floats(l.out_zero, c)),
                _mm512_fmadd_ps(hi, floats(l.out_inv, c + 16), floats(l.out_zero, c + 16)), n);
}
