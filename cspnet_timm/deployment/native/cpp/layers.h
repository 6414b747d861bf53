// All layers but dense convolutions.
#pragma once
#include "memory.h"
#include "numbers.h"

// What follows the sums of a depthwise convolution's 32 channels from c on, n of them there.
static inline void finish_pixel(const Layer& l, char* arena, __m512 slope, i64 pos, i64 c, i64 n, __m512 a, __m512 b) {
    __m512 ra = _mm512_setzero_ps(), rb = ra;
    if (l.res_mode) load_map(arena + l.in2_off + pos * l.in2_ps, l.in2_8, l.in2_scale, l.in2_zero, c, n, ra, rb);
    if (l.res_mode == 1) { a = _mm512_add_ps(a, ra); b = _mm512_add_ps(b, rb); }
    a = activate_any(l.act, a, slope); b = activate_any(l.act, b, slope);
    if (l.res_mode == 2) { a = _mm512_add_ps(a, ra); b = _mm512_add_ps(b, rb); }
    store_map(arena + l.out_off + pos * l.out_ps, l, c, n, a, b);
}
// Of bytes by words: two rows of the kernel at a time, whose pixels and weights lie side by side. What lies outside the
// map are pixels of zeros. Weights are [pair of rows][column][32 channels][two registers of pairs], as unpacking leaves
// the channels; behind the bias lies what a sum's unit stands for.
static void run_depthwise_words(const Layer& l, const Step& s, char* arena) {
    const __m512 slope = _mm512_set1_ps(as_float(l.act_param));
    const i64 cp = l.nblocks * 32, pairs = (l.kh + 1) / 2;
    const float* const bias = (const float*)l.bias;
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (i64 b = s.b0; b < s.b1; b++) {
        const char* const in = arena + l.in_off + b * l.in_h * l.in_w * l.in_ps;
        for (i64 y = s.y0; y < s.y1; y++)
            for (i64 c = 0; c < l.in_c; c += 32) {
                const i64 n = std::min<i64>(32, l.in_c - c);
                const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1;
                const char* const outside = (const char*)l.fill + c;
                auto row = [&](i64 iy) { return iy >= 0 && iy < l.in_h ? in + iy % l.in_rows * l.in_w * l.in_ps + c : nullptr; };
                auto words = [&](const char* row, i64 ix) __attribute__((always_inline)) {
                    const char* const at = row && (size_t)ix < (size_t)l.in_w ? row + ix * l.in_ps : outside;
                    return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, at));
                };
                for (i64 x = 0; x < l.out_w; x += 4) {
                    const i64 wide = std::min<i64>(4, l.out_w - x), ix0 = x * l.stride - l.pad_w;
                    __m512i sums[4][2];
                    for (int i = 0; i < 4; i++) sums[i][0] = sums[i][1] = _mm512_setzero_si512();
                    for (i64 p = 0; p < pairs; p++) {
                        const i64 iy = y * l.stride - l.pad_h + 2 * p;
                        const char* const above = row(iy);
                        const char* const below = 2 * p + 1 < l.kh ? row(iy + 1) : above;
                        const char* const w = (const char*)l.weights + (p * l.kw * cp + c) * 4;
                        for (i64 j = 0; j < (wide - 1) * l.stride + l.kw; j++) {
                            const __m512i first = words(above, ix0 + j), second = words(below, ix0 + j);
                            const __m512i lo = _mm512_unpacklo_epi16(first, second), hi = _mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 4
                            for (int i = 0; i < 4; i++) {
                                const i64 k = j - i * l.stride;
                                if (k < 0 || k >= l.kw) continue;
                                const char* const at = w + k * cp * 4;
                                sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], lo, _mm512_loadu_si512(at));
                                sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], hi, _mm512_loadu_si512(at + 64));
                            }
                        }
                    }
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        if (i >= wide) break;
                        const __m512 lo = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(sums[i][0], lower, sums[i][1]));
                        const __m512 hi = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(sums[i][0], upper, sums[i][1]));
                        finish_pixel(l, arena, slope, (b * l.out_h + y) * l.out_w + x + i, c, n,
                                     _mm512_fmadd_ps(lo, _mm512_loadu_ps(bias + cp + c), _mm512_loadu_ps(bias + c)),
                                     _mm512_fmadd_ps(hi, _mm512_loadu_ps(bias + cp + c + 16), _mm512_loadu_ps(bias + c + 16)));
                    }
                }
            }
    }
}
static void run_depthwise(const Layer& l, const Step& s, char* arena) {
    if (l.flow == BYTES) return run_depthwise_words(l, s, arena);
    const __m512 slope = _mm512_set1_ps(as_float(l.act_param));
    const float* weights = (const float*)l.weights;  // [tap][channels padded to 32]
    const float* bias = (const float*)l.bias;
    const i64 cp = l.nblocks * 32, d = l.dil;
    // Of bytes the weights hold the scales and the bias the zeros, but for the taps outside the map: they are zeros too.
    for (i64 b = s.b0; b < s.b1; b++) {
        const char* in = arena + l.in_off + b * l.in_h * l.in_w * l.in_ps;
        for (i64 y = s.y0; y < s.y1; y++) {
            const i64 pos0 = (b * l.out_h + y) * l.out_w;
            const i64 iy0 = y * l.stride - l.pad_h;
            // Columns whose taps all lie inside the map are done four at a time.
            const i64 x_lo = std::min(l.out_w, (l.pad_w + l.stride - 1) / l.stride);
            i64 x_hi = (l.in_w - 1 - (l.kw - 1) * d + l.pad_w);
            x_hi = x_hi < 0 ? 0 : x_hi / l.stride + 1;
            x_hi = std::min(std::max(x_hi, x_lo), l.out_w);
            for (i64 c = 0; c < l.in_c; c += 32) {
                const i64 n = std::min<i64>(32, l.in_c - c);
                for (i64 x = 0; x < l.out_w;) {
                    const int wide = x >= x_lo && x + 4 <= x_hi ? 4 : 1;
                    __m512 lo[4], hi[4];
                    for (int i = 0; i < 4; i++) { lo[i] = _mm512_loadu_ps(bias + c); hi[i] = _mm512_loadu_ps(bias + c + 16); }
                    for (i64 ky = 0; ky < l.kh; ky++) {
                        const i64 iy = iy0 + ky * d;
                        const bool row = iy >= 0 && iy < l.in_h;
                        if (!row && !l.in8) continue;
                        for (i64 kx = 0; kx < l.kw; kx++) {
                            const i64 ix = x * l.stride - l.pad_w + kx * d;
                            const float* wt = weights + (ky * l.kw + kx) * cp + c;
                            if (!row || ix < 0 || ix >= l.in_w) {
                                if (l.in8)
                                    for (int i = 0; i < wide; i++) {
                                        lo[i] = _mm512_fmadd_ps(floats(l.in_zero, c), _mm512_loadu_ps(wt), lo[i]);
                                        hi[i] = _mm512_fmadd_ps(floats(l.in_zero, c + 16), _mm512_loadu_ps(wt + 16), hi[i]);
                                    }
                                continue;
                            }
                            const char* at = in + (iy % l.in_rows * l.in_w + ix) * l.in_ps + c * item(l.in8);
                            __m512 va, vb;
                            if (wide == 4) {
                                const __m512 w0 = _mm512_loadu_ps(wt), w1 = _mm512_loadu_ps(wt + 16);
                                for (int i = 0; i < 4; i++) {
                                    load_numbers(at + i * l.stride * l.in_ps, l.in8, n, va, vb);
                                    lo[i] = _mm512_fmadd_ps(va, w0, lo[i]);
                                    hi[i] = _mm512_fmadd_ps(vb, w1, hi[i]);
                                }
                            } else {
                                load_numbers(at, l.in8, n, va, vb);
                                lo[0] = _mm512_fmadd_ps(va, _mm512_loadu_ps(wt), lo[0]);
                                hi[0] = _mm512_fmadd_ps(vb, _mm512_loadu_ps(wt + 16), hi[0]);
                            }
                        }
                    }
                    for (int i = 0; i < wide; i++) finish_pixel(l, arena, slope, pos0 + x + i, c, n, lo[i], hi[i]);
                    x += wide;
                }
            }
        }
    }
}

// The maximum, the mean of what lies inside the map, or with the padding's zeros counted. A 1x1 window is a
// copy, or with a stride a sampling. Windows may hang over the right and lower edge (ceil_mode), which counts as outside
// the padding too: PyTorch divides by the part that lies inside the padded map.
static void run_pool(const Layer& l, const Step& s, char* arena) {
    for (i64 b = s.b0; b < s.b1; b++) {
        const char* in = arena + l.in_off + b * l.in_h * l.in_w * l.in_ps;
        for (i64 y = s.y0; y < s.y1; y++) {
            const i64 sy = y * l.stride - l.pad_h;
            const i64 y0 = std::max<i64>(0, sy), y1 = std::min(l.in_h, sy + l.kh);
            const i64 full_h = std::min(sy + l.kh, l.in_h + l.pad_h) - sy;
            for (i64 x = 0; x < l.out_w; x++) {
                const i64 sx = x * l.stride - l.pad_w;
                const i64 x0 = std::max<i64>(0, sx), x1 = std::min(l.in_w, sx + l.kw);
                const i64 full_w = std::min(sx + l.kw, l.in_w + l.pad_w) - sx;
                char* out = arena + l.out_off + ((b * l.out_h + y) * l.out_w + x) * l.out_ps;
                if (l.kh == 1 && l.kw == 1) {
                    copy_bytes(out, in + (sy % l.in_rows * l.in_w + sx) * l.in_ps, l.in_c * item(l.in8));
                    continue;
                }
                if (l.in8 && l.flavour == MAXIMUM) {
                    for (i64 c = 0; c < l.in_c; c += 64) {
                        const __mmask64 m = l.in_c - c >= 64 ? ~0ull : (1ull << (l.in_c - c)) - 1;
                        __m512i most = _mm512_setzero_si512();
                        for (i64 iy = y0; iy < y1; iy++)
                            for (i64 ix = x0; ix < x1; ix++)
                                most = _mm512_max_epu8(most, _mm512_maskz_loadu_epi8(
                                    m, in + (iy % l.in_rows * l.in_w + ix) * l.in_ps + c));
                        _mm512_mask_storeu_epi8(out + c, m, most);
                    }
                    continue;
                }
                const i64 count = l.flavour == AVERAGE_PADDED ? full_h * full_w : (y1 - y0) * (x1 - x0);
                const __m512 scale = _mm512_set1_ps(1.f / std::max<i64>(1, count));
                for (i64 c = 0; c < l.in_c; c += 32) {
                    const i64 n = std::min<i64>(32, l.in_c - c);
                    const float start = l.flavour != MAXIMUM ? 0.f : -__builtin_inff();
                    __m512 lo = _mm512_set1_ps(start), hi = lo;
                    __mmask32 nan = 0;  // a maximum with what is no number is none either
                    if (l.in8) {  // the mean of numbers of steps, which has its input's scale; padding is the zero's number
                        const __m512 outside = _mm512_set1_ps((float)(count - (y1 - y0) * (x1 - x0)));
                        lo = _mm512_mul_ps(floats(l.in_zero, c), outside);
                        hi = _mm512_mul_ps(floats(l.in_zero, c + 16), outside);
                    }
                    for (i64 iy = y0; iy < y1; iy++)
                        for (i64 ix = x0; ix < x1; ix++) {
                            __m512 a, b;
                            load_numbers(in + (iy % l.in_rows * l.in_w + ix) * l.in_ps + c * item(l.in8), l.in8, n, a, b);
                            if (l.flavour != MAXIMUM) { lo = _mm512_add_ps(lo, a); hi = _mm512_add_ps(hi, b); }
                            else {
                                lo = _mm512_max_ps(lo, a); hi = _mm512_max_ps(hi, b);
                                nan |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) | (__mmask32)_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q) << 16;
                            }
                        }
                    if (nan) {
                        const __m512 none = _mm512_set1_ps(__builtin_nanf(""));
                        lo = _mm512_mask_mov_ps(lo, (__mmask16)nan, none); hi = _mm512_mask_mov_ps(hi, (__mmask16)(nan >> 16), none);
                    }
                    if (l.flavour != MAXIMUM) { lo = _mm512_mul_ps(lo, scale); hi = _mm512_mul_ps(hi, scale); }
                    if (l.in8) store_bytes(out + c, lo, hi, n); else store_bf16(out + c * 2, narrow2(lo, hi), n);
                }
            }
        }
    }
}

static void run_mean(const Layer& l, const Step& s, char* arena) {
    const i64 count = l.in_h * l.in_w;
    for (i64 b = s.b0; b < s.b1; b++) {
        const char* in = arena + l.in_off + b * count * l.in_ps;
        for (i64 c = 0; c < l.in_c; c += 32) {
            const i64 n = std::min<i64>(32, l.in_c - c);
            __m512 lo = _mm512_setzero_ps(), hi = lo;
            for (i64 i = 0; i < count; i++) {
                __m512 a, b;
                load_map(in + i * l.in_ps, l.in8, l.in_scale, l.in_zero, c, n, a, b);
                lo = _mm512_add_ps(lo, a); hi = _mm512_add_ps(hi, b);
            }
            const __m512 scale = _mm512_set1_ps(1.f / count);
            store_bf16(arena + l.out_off + b * l.out_ps + c * 2, narrow2(_mm512_mul_ps(lo, scale), _mm512_mul_ps(hi, scale)), n);
        }
    }
}

// An activation of one map, the sum or product of two; the second may be one pixel for the whole map.
static void run_binary(const Layer& l, const Step& s, char* arena) {
    const __m512 slope = _mm512_set1_ps(as_float(l.act_param));
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 i = s.y0 * l.out_w; i < s.y1 * l.out_w; i++) {
            const i64 pos = b * l.out_h * l.out_w + i;
            const char* x = arena + l.in_off + pos * l.in_ps;
            const char* y = arena + l.in2_off + (l.in2_small ? b : pos) * l.in2_ps;
            char* out = arena + l.out_off + pos * l.out_ps;
            for (i64 c = 0; c < l.in_c; c += 32) {
                const i64 n = std::min<i64>(32, l.in_c - c);
                __m512 lo, hi, a, b;
                load_map(x, l.in8, l.in_scale, l.in_zero, c, n, lo, hi);
                if (l.flavour != ACTIVATION) {
                    load_map(y, l.in2_8, l.in2_scale, l.in2_zero, c, n, a, b);
                    if (l.flavour == SUM) { lo = _mm512_add_ps(lo, a); hi = _mm512_add_ps(hi, b); }
                    else { lo = _mm512_mul_ps(lo, a); hi = _mm512_mul_ps(hi, b); }
                }
                lo = activate_any(l.act, lo, slope); hi = activate_any(l.act, hi, slope);
                store_map(out, l, c, n, lo, hi);
            }
        }
}

static void run_upsample(const Layer& l, const Step& s, char* arena) {
    const int32_t* const rows = (const int32_t*)l.row_table;
    const int32_t* const columns = (const int32_t*)l.column_table;
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 y = s.y0; y < s.y1; y++)
            for (i64 x = 0; x < l.out_w; x++)
                copy_bytes(arena + l.out_off + ((b * l.out_h + y) * l.out_w + x) * l.out_ps,
                           arena + l.in_off + ((b * l.in_h + rows[y] % l.in_rows) * l.in_w + columns[x]) * l.in_ps,
                           l.in_c * item(l.in8));
}

static void run_zeros(const Layer& l, const Step& s, char* arena) {
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 i = s.y0 * l.out_w; i < s.y1 * l.out_w; i++)
            zero_bytes(arena + l.out_off + (b * l.out_h * l.out_w + i) * l.out_ps, l.out_c * item(l.out8));
}

// A row of images as bytes, which are [column][channel].
static void input_bytes(const Layer& l, const float* in, const Job& job, char* out) {
    alignas(16) static const struct Order {  // of 48 bytes in three registers those of each channel
        int8_t from[3][3][16];
        constexpr Order() : from() {
            for (int i = 0; i < 48; i++)
                for (int c = 0; c < 3; c++) from[i / 16][c][i % 16] = (int8_t)(i % 3 == c ? i / 3 : -1);
        }
    } order;
    for (i64 x = 0; x < l.out_w; x += 16) {
        const i64 n = std::min<i64>(16, l.out_w - x);
        const bool whole = n == 16 && job.stride_w == 1;
        auto bytes = [&](i64 c) __attribute__((always_inline)) {
            const float* const at = in + c * job.stride_c + x * job.stride_w;
            alignas(64) float row[16] = {};
            if (!whole) for (i64 i = 0; i < n; i++) row[i] = at[i * job.stride_w];
            const __m512 inv = _mm512_set1_ps(((const float*)l.out_inv)[c]), zero = _mm512_set1_ps(((const float*)l.out_zero)[c]);
            return to_bytes(_mm512_fmadd_ps(whole ? _mm512_loadu_ps(at) : _mm512_load_ps(row), inv, zero));
        };
        if (n == 16 && l.out_c == 3 && l.out_ps == 3) {
            const __m128i colors[3] = {bytes(0), bytes(1), bytes(2)};
            for (int i = 0; i < 3; i++) {
                __m128i v = _mm_setzero_si128();
                for (int c = 0; c < 3; c++)
                    v = _mm_or_si128(v, _mm_shuffle_epi8(colors[c], _mm_load_si128((const __m128i*)order.from[i][c])));
                _mm_storeu_si128((__m128i*)(out + 3 * x + 16 * i), v);
            }
            continue;
        }
        for (i64 c = 0; c < l.out_c; c++) {
            alignas(16) char v[16];
            _mm_store_si128((__m128i*)v, bytes(c));
            for (i64 i = 0; i < n; i++) out[(x + i) * l.out_ps + c] = v[i];
        }
    }
}

static void run_input(const Layer& l, const Step& s, char* arena, const Job& job) {
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 y = s.y0; y < s.y1; y++) {
            const float* in = (const float*)job.input + b * job.stride_n + y * job.stride_h;
            if (l.out8) {
                input_bytes(l, in, job, arena + l.out_off + (b * l.out_h + y) * l.out_w * l.out_ps);
                continue;
            }
            bf16* out = (bf16*)(arena + l.out_off + (b * l.out_h + y) * l.out_w * l.out_ps);
            const i64 ps = l.out_ps / 2;
            i64 done = 0;
            if (l.out_c == 3 && ps == 3 && job.stride_w == 1) {
                alignas(64) static const struct Order {  // lanes 0-15 first channel, 16-31 second, 32-47 third
                    uint16_t a[32], b[32];
                    constexpr Order() : a(), b() {
                        for (int i = 0; i < 48; i++) (i < 32 ? a[i] : b[i - 32]) = (uint16_t)(i % 3 * 16 + i / 3);
                    }
                } order;
                const __m512i first = _mm512_load_si512(order.a), second = _mm512_load_si512(order.b);
                for (; done + 16 <= l.out_w; done += 16) {
                    const __m512 r = _mm512_loadu_ps(in + done), g = _mm512_loadu_ps(in + job.stride_c + done);
                    const __m512i rg = narrow2(r, g);
                    const __m512i bb = _mm512_castsi256_si512(narrow(_mm512_loadu_ps(in + 2 * job.stride_c + done)));
                    _mm512_storeu_si512(out + done * 3, _mm512_permutex2var_epi16(rg, first, bb));
                    _mm256_storeu_si256((__m256i*)(out + done * 3 + 32), _mm512_castsi512_si256(_mm512_permutex2var_epi16(rg, second, bb)));
                }
            }
            for (i64 c = 0; c < l.out_c; c++) {
                i64 x = done;
                if (job.stride_w == 1)
                    for (; x + 16 <= l.out_w; x += 16) {
                        alignas(32) bf16 t[16];
                        _mm256_store_si256((__m256i*)t, narrow(_mm512_loadu_ps(in + c * job.stride_c + x)));
                        for (int i = 0; i < 16; i++) out[(x + i) * ps + c] = t[i];
                    }
                for (; x < l.out_w; x++) out[x * ps + c] = round_bf16(in[c * job.stride_c + x * job.stride_w]);
            }
        }
}

static void run_output(const Layer& l, const Step& s, char* arena, const Job& job) {
    float* base = ((float**)job.outputs)[l.index];
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 i = s.y0 * l.in_w; i < s.y1 * l.in_w; i++) {
            const i64 pos = b * l.in_h * l.in_w + i;
            const char* in = arena + l.in_off + pos * l.in_ps;
            float* out = base + pos * l.in_c;
            if (l.is_f32) { memcpy(out, in, l.in_c * 4); continue; }
            for (i64 c = 0; c < l.in_c; c += 16) {
                const __mmask16 m = l.in_c - c >= 16 ? 0xffff : (1u << (l.in_c - c)) - 1;
                if (l.in8) {
                    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, in + c)));
                    const __m512 zero = _mm512_maskz_loadu_ps(m, (const float*)l.in_zero + c);
                    _mm512_mask_storeu_ps(out + c, m, _mm512_mul_ps(_mm512_sub_ps(v, zero), _mm512_maskz_loadu_ps(m, (const float*)l.in_scale + c)));
                    continue;
                }
                _mm512_mask_storeu_ps(out + c, m, widen(_mm256_maskz_loadu_epi16(m, in + c * 2)));
            }
        }
}
