// An interpreter of convolutional networks for CPUs with AVX-512: maps in bfloat16 and sums in float32, or maps in bytes
// and sums in int32. The products are AMX's where the compiler is allowed its tiles (and float16 with them), else VNNI's.
//
// The caller (engine.py beside this file) has laid out every map in one arena, packed the weights, and written the
// order of work; nothing here is specific to a network. Maps are [image][row][column][channel] without borders;
// a layer reads and writes a range of channels of such a map, so that concatenations and slices are no work.
// Every dense convolution is one micro-kernel: 32 positions times 32 output channels in four accumulator tiles, or 8
// times 32 in sixteen registers. The rows of its A tiles are pixels: of the map itself for a 1x1 convolution, else of a
// copy of some rows with zeros around them ("band") or of the patches of each position ("patch"), made in the thread's
// scratch memory.
#include <immintrin.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __AMX_INT8__
#define TILES 1
#else
#define TILES 0
#endif

typedef int64_t i64;
typedef uint16_t bf16;

enum Kind { CONV, DEPTHWISE, POOL, MEAN, BINARY, UPSAMPLE, ZERO, INPUT, OUTPUT };
enum Act { NONE, RELU, LEAKY, SILU, HARDSWISH, HARDSIGMOID, SIGMOID, MISH, RELU6, N_ACTS };
enum Mode { DIRECT, BAND, PATCH };

// One layer as engine.py writes it: RECORD 64-bit integers in this order. Offsets are bytes from the arena's start.
struct Layer {
    i64 kind, in_off, in_ps, in_h, in_w, in_c, out_h, out_w, kh, kw, stride, pad_h, pad_w, dil, act, act_param;
    i64 res_mode, nblocks, table, weights, bias, mode, tap_c, ksteps, flavour, in2_off, in2_ps, in2_small;
    i64 out_off, out_ps, out_c, index, is_f32, flat, rows_at_once, koff;
    i64 planes, plane, width, band_ps;  // of a band: planes each way, their rows and columns, bytes of a pixel
    i64 by_position;  // order of work: positions outside, output channels inside
    i64 in_mod;  // rows that the input has room for; row y lies at y % in_mod
    // Maps in bytes: a byte q of channel c stands for (q - zero[c]) * scale[c]; what is written is y * out_inv + out_zero.
    i64 in8, out8, in2_8, flow, fill, in_scale, in_zero, in2_scale, in2_zero, out_inv, out_zero;
    // Where the blocks of output channels are outside: steps of the product for which the weights of one stay in the
    // first-level cache, and whether the next one's have to be fetched from afar.
    i64 steps_at_once, fetch;
    i64 dense;  // a band's pixels lie side by side, and a step of the product takes bytes of several
};
// What a block of 32 output channels of a convolution reads and writes.
struct Block { i64 out_off, out_ps, nstore, res_off, res_ps, a_off, epilogue; };
#if TILES
// How the sums of a block become bytes; in the order of lanes that _mm512_packs_epi32 leaves.
struct Epilogue8 { int32_t shift[32]; _Float16 mul[32], res_mul[32], inv[32], add[32]; };
#endif
// The same where only one of the two maps is in bytes, or there is no float16.
struct EpilogueMixed { float mul[32], res_mul[32], res_add[32], inv[32], add[32]; };
enum Flow { HALF, BYTES, FROM_HALF, FROM_BYTES };  // HALF and FROM_HALF multiply bfloat16
struct Step { i64 layer, b0, b1, y0, y1, n0, n1, barrier; };
struct Job {
    i64 program, arena, input, stride_n, stride_c, stride_h, stride_w, outputs;
};

static const int RECORD = sizeof(Layer) / sizeof(i64);

struct Program {
    std::vector<Layer> layers;
    std::vector<std::vector<i64>> koffs;
    std::vector<std::vector<Block>> blocks;
    std::vector<std::vector<Step>> steps;  // of each thread of the team
    size_t scratch = 0, tiles = 0;
#ifdef CSP_PROFILE  // compile with CXX='g++ -DCSP_PROFILE' for the time of every step
    mutable std::vector<std::vector<i64>> ticks;
#endif
};
#ifdef CSP_PROFILE
struct Clock {
    i64* to; i64 start;
    explicit Clock(i64* t) : to(t), start(__builtin_ia32_rdtsc()) {}
    ~Clock() { *to += __builtin_ia32_rdtsc() - start; }
};
#endif

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
        case LEAKY: return _mm512_fmadd_ps(_mm512_min_ps(zero, x), slope, _mm512_max_ps(zero, x));
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
        case LEAKY: return activate<LEAKY>(x, slope);
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
        case LEAKY: return _mm512_fmadd_ph(_mm512_min_ph(x, zero), slope, _mm512_max_ph(x, zero));
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
    const __m512 inv = _mm512_set1_ps(as_float(l.out_inv)), zero = _mm512_set1_ps(as_float(l.out_zero));
    store_bytes(p + c, _mm512_fmadd_ps(lo, inv, zero), _mm512_fmadd_ps(hi, inv, zero), n);
}

struct Worker {  // memory of one thread
    char* scratch = nullptr; size_t scratch_size = 0;
    char* partial = nullptr; size_t partial_size = 0;  // sums of four tiles for each pair
    std::vector<const char*> tile_a; std::vector<int32_t> tile_pos;  // 16 output positions per tile, -1: none
    alignas(64) float acc[2][32 * 32];
};

static void* big_alloc(size_t size) {
    size = (size + (2u << 20) - 1) >> 21 << 21;
    void* p = nullptr;
    if (posix_memalign(&p, 2u << 20, size)) return nullptr;
    madvise(p, size, MADV_HUGEPAGE);
    memset(p, 0, size);
    return p;
}

// ---------------------------------------------------------------------------------------------- dense convolution
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
    const Epilogue8& q = *(const Epilogue8*)k.epilogue;
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
    constexpr bool LINEAR = ACT == NONE || ACT == RELU || ACT == LEAKY;  // in steps of the result throughout
    constexpr bool SMOOTH = ACT == SILU || ACT == SIGMOID || ACT == MISH;
    const Block& k = *e.block;
    const EpilogueMixed& q = *(const EpilogueMixed*)k.epilogue;
    const int32_t* const at = e.pos;
    char* const out = arena + k.out_off;
    const char* const residual = arena + k.res_off;
    const __mmask32 mask = k.nstore >= 32 ? ~0u : (1u << k.nstore) - 1;
    const __m512i back = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 mul[2], add[2], res_mul[2], curve[3][2];
    for (int i = 0; i < 2; i++) {
        mul[i] = _mm512_loadu_ps(q.mul + 16 * i);
        add[i] = _mm512_loadu_ps(q.add + 16 * i);
        res_mul[i] = _mm512_loadu_ps(q.res_mul + 16 * i);
    }
    const __m512 inv = _mm512_set1_ps(q.inv[0]);  // a map has one scale
    if (SMOOTH) {
        const Curve& of = CURVES[ACT == SILU ? 0 : ACT == SIGMOID ? 1 : 2];
        for (int i = 0; i < 3; i++)
            for (int h = 0; h < 2; h++) curve[i][h] = _mm512_mul_ps(_mm512_load_ps(of.c[i] + 16 * h), inv);
        if (RES != 2) for (int h = 0; h < 2; h++) curve[0][h] = _mm512_add_ps(curve[0][h], _mm512_set1_ps(q.add[0]));
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
            if (RES == 2) x = _mm512_add_ps(x, rest);
        } else {
            x = activate<ACT>(x, slope);
            x = LINEAR ? _mm512_add_ps(x, rest) : _mm512_fmadd_ps(x, inv, rest);
        }
        return _mm512_cvtps_epi32(x);
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
    const EpilogueMixed& q = *(const EpilogueMixed*)k.epilogue;
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

#if TILES
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
#else
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
// A step: from where on how many times 4 bytes of a position are multiplied, and where in a block its weights begin.
struct Run { i64 from, count, weights; };
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
#endif

typedef void (*Multiply)(const Layer&, const i64*, const Block*, char*, Worker&, size_t, i64, i64, i64);
template <int ACT, int FLOW> static Multiply pick_res(i64 res) {
    return res == 0 ? multiply<ACT, 0, FLOW> : res == 1 ? multiply<ACT, 1, FLOW> : multiply<ACT, 2, FLOW>;
}
template <int ACT> static Multiply pick_flow(i64 res, i64 flow) {
    switch (flow) {
        case BYTES: return pick_res<ACT, BYTES>(res);
        case FROM_HALF: return multiply<ACT, 0, FROM_HALF>;  // these look at the residual as they go
        case FROM_BYTES: return multiply<ACT, 0, FROM_BYTES>;
        default: return pick_res<ACT, HALF>(res);
    }
}
static Multiply pick(i64 act, i64 res, i64 flow) {
    switch (act) {
        case RELU: return pick_flow<RELU>(res, flow);
        case LEAKY: return pick_flow<LEAKY>(res, flow);
        case SILU: return pick_flow<SILU>(res, flow);
        case HARDSWISH: return pick_flow<HARDSWISH>(res, flow);
        case HARDSIGMOID: return pick_flow<HARDSIGMOID>(res, flow);
        case SIGMOID: return pick_flow<SIGMOID>(res, flow);
        case MISH: return pick_flow<MISH>(res, flow);
        case RELU6: return pick_flow<RELU6>(res, flow);
        default: return pick_flow<NONE>(res, flow);
    }
}

static void copy_bytes(char* to, const char* from, i64 bytes) {
    i64 i = 0;
    for (; i + 64 <= bytes; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < bytes) {
        const __mmask64 m = (~0ull) >> (64 - (bytes - i));
        _mm512_mask_storeu_epi8(to + i, m, _mm512_maskz_loadu_epi8(m, from + i));
    }
}
// Copies to a place whose room is a multiple of 64 bytes, zeros behind.
static inline void copy_padded(char* to, const char* from, i64 bytes) {
    i64 i = 0;
    for (; i + 64 <= bytes; i += 64) _mm512_store_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < bytes) _mm512_store_si512(to + i, _mm512_maskz_loadu_epi8((~0ull) >> (64 - (bytes - i)), from + i));
}
static inline void zero_bytes(char* to, i64 bytes) { memset(to, 0, bytes); }
// Pixels of zeros: of a map in bytes what stands for zero.
static inline void zero_pixels(const Layer& l, char* to, i64 px, i64 n) {
    if (!l.in8) { zero_bytes(to, n * px); return; }
    for (i64 i = 0; i < n; i++) copy_bytes(to + i * px, (const char*)l.fill, px);
}

// Rows of one image for the output rows y0 to y1, with zeros around them and channels padded to tap_c. Where tiles go
// on from row to row, a convolution with a stride finds rows and columns sorted by their remainder, so that neighbours of
// the output are neighbours here: [row % planes][column % planes][row / planes][column / planes], with planes = stride
// and room for l.plane rows. Returns the end.
static char* pack_band(const Layer& l, const char* image, char* to, i64 y0, i64 y1) {
    const i64 px = l.band_ps, s = l.planes, width = l.width;
    const i64 rows = (y1 - y0 - 1) * (l.stride / s) + (l.kh - 1) * l.dil / s + 1, top = y0 * l.stride - l.pad_h;
    const i64 bytes = l.in_c * item(l.in8);
    for (i64 py = 0; py < s; py++)
        for (i64 j = 0; j < rows; j++) {
            const i64 y = top + j * s + py;
            for (i64 p = 0; p < s; p++) {
                char* at = to + (((py * s + p) * l.plane + j) * width) * px;
                if (y < 0 || y >= l.in_h) { zero_pixels(l, at, px, width); continue; }
                // column i of the plane is column i * s + p - pad_w of the map
                const i64 left = std::min(width, std::max<i64>(0, (l.pad_w - p + s - 1) / s));
                const i64 right = std::max(left, std::min(width, (l.in_w - 1 + l.pad_w - p + s) / s));
                if (left) zero_pixels(l, at, px, left);
                if (right < width) zero_pixels(l, at + right * px, px, width - right);
                const char* from = image + (y % l.in_mod * l.in_w + left * s + p - l.pad_w) * l.in_ps;
                at += left * px;
                // What lies behind a byte map's channels is multiplied by zero, whatever it is.
                if (s == 1 && l.in_ps == px && (bytes == px || l.in8)) copy_bytes(at, from, (right - left) * px);
                else if (l.dense)
                    for (i64 x = left; x < right; x++, at += px, from += s * l.in_ps) copy_bytes(at, from, bytes);
                else if (bytes == 64 && px == 64)
                    for (i64 x = left; x < right; x++, at += 64, from += s * l.in_ps)
                        _mm512_store_si512(at, _mm512_loadu_si512(from));
                else for (i64 x = left; x < right; x++, at += px, from += s * l.in_ps) copy_padded(at, from, bytes);
            }
        }
    return to + s * s * l.plane * width * px;
}
// Patches of few channels (a network's first layer): each 64 bytes of a patch are put together in a register by loads
// that fill the lanes of one row of the kernel each.
template <bool IN8>
static void pack_small_patches(const Layer& l, const char* image, char* to, i64 y, i64 row_bytes, i64 x0, i64 x1) {
    typedef std::conditional_t<IN8, __mmask64, __mmask32> Mask;
    constexpr int LANES = IN8 ? 64 : 32;
    const int per = (int)(l.kw * l.in_c), lines = (int)(row_bytes / 64);
    const char* rows[16]; bool inside[16];
    for (i64 ky = 0; ky < l.kh; ky++) {
        const i64 iy = y * l.stride - l.pad_h + ky;
        inside[ky] = iy >= 0 && iy < l.in_h;
        rows[ky] = image + (inside[ky] ? iy % l.in_mod * l.in_w * l.in_ps : 0) - l.pad_w * l.in_ps;
    }
    for (int line = 0; line < lines; line++) {
        const char* from[32]; Mask mask[32];
        int n = 0;
        for (int ky = line * LANES / per; ky < l.kh && ky * per < line * LANES + LANES; ky++) {
            if (!inside[ky]) continue;
            const int a = std::max(ky * per - line * LANES, 0), b = std::min((ky + 1) * per - line * LANES, LANES);
            mask[n] = (b >= LANES ? ~(Mask)0 : ((Mask)1 << b) - 1) & ~(((Mask)1 << a) - 1);
            from[n++] = rows[ky] + item(IN8) * (line * LANES - ky * per);
        }
        const i64 step = l.stride * l.in_ps;
        char* at = to + x0 * row_bytes + line * 64;
        for (i64 x = x0; x < x1; x++, at += row_bytes) {
            __m512i v = _mm512_setzero_si512();
            for (int i = 0; i < n; i++) {
                if constexpr (IN8) v = _mm512_mask_loadu_epi8(v, mask[i], from[i] + x * step);
                else v = _mm512_mask_loadu_epi16(v, mask[i], from[i] + x * step);
            }
            _mm512_store_si512(at, v);
        }
    }
}
// The patches of positions of row y of one image, each ksteps * 64 bytes or more (row_bytes).
static void pack_patches(const Layer& l, const char* image, char* to, i64 y, i64 row_bytes) {
    const i64 tap = l.tap_c * item(l.in8), bytes = l.in_c * item(l.in8);
    const i64 run = l.kw * tap;
    const __mmask64 run_mask = run >= 64 ? ~0ull : (1ull << run) - 1;
    const bool runs = l.in_ps == tap && l.dil == 1 && bytes == tap;  // neighbours in a row are neighbours in the patch
    i64 lo = l.out_w, hi = l.out_w;  // columns whose patches lie inside the map
    const i64 top = y * l.stride - l.pad_h;  // rows outside are not zeros where maps lie in bytes
    if (runs && (!l.in8 || (top >= 0 && top + l.kh <= l.in_h)) && l.kh <= 16 && l.kw * l.in_c >= 2) {
        lo = std::min(l.out_w, (l.pad_w + l.stride - 1) / l.stride);
        hi = l.in_w + l.pad_w < l.kw ? lo : std::max(lo, std::min(l.out_w, (l.in_w + l.pad_w - l.kw) / l.stride + 1));
        if (l.in8) pack_small_patches<true>(l, image, to, y, row_bytes, lo, hi);
        else pack_small_patches<false>(l, image, to, y, row_bytes, lo, hi);
    }
    for (i64 x = 0; x < l.out_w; x++, to += row_bytes) {
        if (x == lo && hi > lo) { x += hi - lo - 1; to += (hi - lo - 1) * row_bytes; continue; }
        char* at = to;
        const i64 ix = x * l.stride - l.pad_w;
        for (i64 ky = 0; ky < l.kh; ky++) {
            const i64 iy = y * l.stride - l.pad_h + ky * l.dil;
            if (iy < 0 || iy >= l.in_h) { zero_pixels(l, at, tap, l.kw); at += l.kw * tap; continue; }
            const char* row = image + iy % l.in_mod * l.in_w * l.in_ps;
            if (runs && ix >= 0 && ix + l.kw <= l.in_w) {
                const char* from = row + ix * l.in_ps;
                if (run <= 64 && at + 64 <= to + row_bytes) _mm512_storeu_si512(at, _mm512_maskz_loadu_epi8(run_mask, from));
                else copy_bytes(at, from, run);
                at += run;
                continue;
            }
            for (i64 kx = 0; kx < l.kw; kx++, at += tap) {
                const i64 jx = ix + kx * l.dil;
                if (jx < 0 || jx >= l.in_w) { zero_pixels(l, at, tap, 1); continue; }
                copy_bytes(at, row + jx * l.in_ps, bytes);
                if (bytes < tap) zero_bytes(at + bytes, tap - bytes);
            }
        }
        const i64 rest = to + row_bytes - at;  // less than 64
        _mm512_mask_storeu_epi8(at, (1ull << rest) - 1, _mm512_setzero_si512());
    }
}

static void run_conv(const Program& p, const Step& s, char* arena, Worker& w) {
    const Layer& l = p.layers[s.layer];
    const i64* koff = p.koffs[s.layer].data();
    const Block* blocks = p.blocks[s.layer].data();
    const Multiply multiply_ = pick(l.act, l.res_mode, l.flow);
    const i64 rows_total = (s.b1 - s.b0) * (s.y1 - s.y0), height = s.y1 - s.y0;
    const i64 patch_bytes = (l.kh * l.kw * l.tap_c * item(l.in8) + 63) / 64 * 64;
    const i64 width = l.width, px = l.band_ps, step = l.mode == BAND ? l.stride / l.planes : 1;
    const char* in = arena + l.in_off;
    const i64 image = l.in_h * l.in_w * l.in_ps;
    for (i64 r = 0; r < rows_total;) {
        const i64 r_end = std::min(rows_total, r + l.rows_at_once);
        size_t nt = 0;
        i64 lda = l.in_ps;
        auto add_tile = [&](const char* a, i64 pos, i64 count) {
            w.tile_a[nt] = a;
            int32_t* at = &w.tile_pos[nt * 16];
            for (i64 i = 0; i < 16; i++) at[i] = i < count ? (int32_t)(pos + i) : -1;
            nt++;
        };
        char* to = w.scratch;
        if (l.mode == DIRECT) {
            while (r < r_end) {  // rows that follow one another in memory
                const i64 b = s.b0 + r / height, y = s.y0 + r % height;
                i64 n = (height == l.out_h) ? r_end - r : std::min(r_end - r, height - r % height);
                const i64 pos = (b * l.out_h + y) * l.out_w;
                for (i64 i = 0; i < n * l.out_w; i += 16)
                    add_tile(in + (pos + i) * l.in_ps, pos + i, n * l.out_w - i);
                r += n;
            }
        } else if (l.mode == PATCH) {
            lda = patch_bytes;
            i64 first = r, start = 0;
            for (; r < r_end; r++, to += l.out_w * patch_bytes)
                pack_patches(l, in + (s.b0 + r / height) * image, to, s.y0 + r % height, patch_bytes);
            to = w.scratch;
            for (r = first; r < r_end; ) {
                const i64 b = s.b0 + r / height, y = s.y0 + r % height;
                i64 n = (height == l.out_h) ? r_end - r : std::min(r_end - r, height - r % height);
                const i64 pos = (b * l.out_h + y) * l.out_w;
                for (i64 i = 0; i < n * l.out_w; i += 16)
                    add_tile(to + (start + i) * patch_bytes, pos + i, n * l.out_w - i);
                start += n * l.out_w;
                r += n;
            }
        } else {
            lda = px * step;
            while (r < r_end) {  // one image at a time
                const i64 b = s.b0 + r / height, y = s.y0 + r % height, n = std::min(r_end - r, height - r % height);
                char* band = to;
                to = pack_band(l, in + b * image, to, y, y + n);
                const i64 pos = (b * l.out_h + y) * l.out_w;
                if (l.flat) {
                    const i64 all = n * width - (width - l.out_w);
                    for (i64 q = 0; q < all; q += 16) {
                        w.tile_a[nt] = band + q * px;
                        int32_t* at = &w.tile_pos[nt++ * 16];
                        i64 row = q / width, col = q % width;
                        for (i64 i = 0; i < 16; i++) {
                            at[i] = row < n && col < l.out_w ? (int32_t)(pos + row * l.out_w + col) : -1;
                            if (++col == width) { col = 0; row++; }
                        }
                    }
                } else {
                    for (i64 i = 0; i < n; i++)
                        for (i64 x = 0; x < l.out_w; x += 16)
                            add_tile(band + (i * width + x) * step * px, pos + i * l.out_w + x, l.out_w - x);
                }
                r += n;
            }
        }
        if (nt & 1) add_tile(w.tile_a[nt - 1], 0, 0);
        multiply_(l, koff, blocks, arena, w, nt, lda, s.n0, s.n1);
    }
}

// ---------------------------------------------------------------------------------------------- the other layers
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
                auto row = [&](i64 iy) { return iy >= 0 && iy < l.in_h ? in + iy % l.in_mod * l.in_w * l.in_ps + c : nullptr; };
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
                            const char* at = in + (iy % l.in_mod * l.in_w + ix) * l.in_ps + c * item(l.in8);
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

// flavour 0: maximum, 1: mean of what lies inside the map, 2: mean with the padding's zeros counted. A 1x1 window is a
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
                    copy_bytes(out, in + (sy % l.in_mod * l.in_w + sx) * l.in_ps, l.in_c * item(l.in8));
                    continue;
                }
                if (l.in8 && !l.flavour) {
                    for (i64 c = 0; c < l.in_c; c += 64) {
                        const __mmask64 m = l.in_c - c >= 64 ? ~0ull : (1ull << (l.in_c - c)) - 1;
                        __m512i most = _mm512_setzero_si512();
                        for (i64 iy = y0; iy < y1; iy++)
                            for (i64 ix = x0; ix < x1; ix++)
                                most = _mm512_max_epu8(most, _mm512_maskz_loadu_epi8(
                                    m, in + (iy % l.in_mod * l.in_w + ix) * l.in_ps + c));
                        _mm512_mask_storeu_epi8(out + c, m, most);
                    }
                    continue;
                }
                const i64 count = l.flavour == 2 ? full_h * full_w : (y1 - y0) * (x1 - x0);
                const __m512 scale = _mm512_set1_ps(1.f / std::max<i64>(1, count));
                for (i64 c = 0; c < l.in_c; c += 32) {
                    const i64 n = std::min<i64>(32, l.in_c - c);
                    const float start = l.flavour ? 0.f : -__builtin_inff();
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
                            load_numbers(in + (iy % l.in_mod * l.in_w + ix) * l.in_ps + c * item(l.in8), l.in8, n, a, b);
                            if (l.flavour) { lo = _mm512_add_ps(lo, a); hi = _mm512_add_ps(hi, b); }
                            else {
                                lo = _mm512_max_ps(lo, a); hi = _mm512_max_ps(hi, b);
                                nan |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) | (__mmask32)_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q) << 16;
                            }
                        }
                    if (nan) {
                        const __m512 none = _mm512_set1_ps(__builtin_nanf(""));
                        lo = _mm512_mask_mov_ps(lo, (__mmask16)nan, none); hi = _mm512_mask_mov_ps(hi, (__mmask16)(nan >> 16), none);
                    }
                    if (l.flavour) { lo = _mm512_mul_ps(lo, scale); hi = _mm512_mul_ps(hi, scale); }
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

// flavour 0: activation of one map, 1: sum, 2: product of two maps; the second may be one pixel for the whole map.
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
                if (l.flavour) {
                    load_map(y, l.in2_8, l.in2_scale, l.in2_zero, c, n, a, b);
                    if (l.flavour == 1) { lo = _mm512_add_ps(lo, a); hi = _mm512_add_ps(hi, b); }
                    else { lo = _mm512_mul_ps(lo, a); hi = _mm512_mul_ps(hi, b); }
                }
                lo = activate_any(l.act, lo, slope); hi = activate_any(l.act, hi, slope);
                store_map(out, l, c, n, lo, hi);
            }
        }
}

static void run_upsample(const Layer& l, const Step& s, char* arena) {
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 y = s.y0; y < s.y1; y++)
            for (i64 x = 0; x < l.out_w; x++)
                copy_bytes(arena + l.out_off + ((b * l.out_h + y) * l.out_w + x) * l.out_ps,
                           arena + l.in_off + ((b * l.in_h + y * l.in_h / l.out_h % l.in_mod) * l.in_w + x * l.in_w / l.out_w) * l.in_ps,
                           l.in_c * item(l.in8));
}

static void run_zero(const Layer& l, const Step& s, char* arena) {
    for (i64 b = s.b0; b < s.b1; b++)
        for (i64 i = s.y0 * l.out_w; i < s.y1 * l.out_w; i++)
            zero_bytes(arena + l.out_off + (b * l.out_h * l.out_w + i) * l.out_ps, l.out_c * item(l.out8));
}

// A row of images as bytes, which are [column][channel].
static void input_bytes(const Layer& l, const float* in, const Job& job, char* out) {
    const __m512 inv = _mm512_set1_ps(as_float(l.out_inv)), zero = _mm512_set1_ps(as_float(l.out_zero));
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

// ---------------------------------------------------------------------------------------------- threads
#if TILES
struct alignas(64) Config { uint8_t palette, start, reserved[14]; uint16_t colsb[16]; uint8_t rows[16]; };
#endif

struct Team {
    int size;
    pid_t pid;
    std::vector<std::thread> threads;
    std::vector<Worker*> workers;
    std::atomic<uint64_t> generation{0};
    std::atomic<int> finished{0}, arrived{0}, phase{0};
    std::atomic<bool> stop{false};
    std::mutex mutex;
    std::condition_variable wake;
    const Job* jobs = nullptr; int njobs = 0;

    explicit Team(int n) : size(n), pid(getpid()) {
        for (int i = 0; i < n; i++) workers.push_back(new Worker());
        for (int i = 1; i < n; i++) threads.emplace_back([this, i] { loop(i); });
    }
    ~Team() {
        { std::lock_guard<std::mutex> hold(mutex); stop = true; generation++; }
        wake.notify_all();
        for (auto& t : threads) t.join();
        for (auto w : workers) { free(w->scratch); free(w->partial); delete w; }
    }
    void barrier() {
        if (size == 1) return;
        const int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
        } else {
            for (int i = 0; phase.load(std::memory_order_acquire) == now; i++) {
                if (i < 20000) _mm_pause(); else std::this_thread::yield();
            }
        }
    }
    void execute(const Program& p, const Job& job, int rank, Worker& w) {
        if (w.scratch_size < p.scratch) {
            free(w.scratch);
            w.scratch = (char*)big_alloc(p.scratch);
            w.scratch_size = p.scratch;
        }
        if (w.partial_size < p.tiles * 2048) {
            free(w.partial);
            w.partial = (char*)big_alloc(p.tiles * 2048);
            w.partial_size = p.tiles * 2048;
        }
        if (w.tile_a.size() < p.tiles) { w.tile_a.resize(p.tiles); w.tile_pos.resize(p.tiles * 16); }
        char* arena = (char*)job.arena;
        for (const Step& s : p.steps[rank]) {
            if (s.barrier) { barrier(); continue; }
            const Layer& l = p.layers[s.layer];
#ifdef CSP_PROFILE
            Clock clock(&p.ticks[rank][&s - p.steps[rank].data()]);
#endif
            switch (l.kind) {
                case CONV: run_conv(p, s, arena, w); break;
                case DEPTHWISE: run_depthwise(l, s, arena); break;
                case POOL: run_pool(l, s, arena); break;
                case MEAN: run_mean(l, s, arena); break;
                case BINARY: run_binary(l, s, arena); break;
                case UPSAMPLE: run_upsample(l, s, arena); break;
                case ZERO: run_zero(l, s, arena); break;
                case INPUT: run_input(l, s, arena, job); break;
                case OUTPUT: run_output(l, s, arena, job); break;
            }
        }
    }
    void work(int rank) {
        const unsigned control = _mm_getcsr();
        _mm_setcsr(control | 0x8040);  // numbers too small for full precision are zeros: others take hundreds of cycles
#if TILES
        Config config = {};
        config.palette = 1;
        for (int i = 0; i < 8; i++) { config.colsb[i] = 64; config.rows[i] = 16; }
        _tile_loadconfig(&config);
#endif
        for (int j = 0; j < njobs; j++) { execute(*(const Program*)jobs[j].program, jobs[j], rank, *workers[rank]); barrier(); }
#if TILES
        _tile_release();
#endif
        _mm_setcsr(control);
    }
    void loop(int rank) {
        uint64_t seen = 0;
        while (true) {
            for (int i = 0; i < 4000 && generation.load(std::memory_order_acquire) == seen; i++) _mm_pause();
            if (generation.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> hold(mutex);
                wake.wait(hold, [&] { return generation.load() != seen; });
            }
            seen++;
            if (stop) return;
            work(rank);
            finished.fetch_add(1, std::memory_order_release);
        }
    }
    void run(const Job* j, int n) {
        jobs = j; njobs = n;
        finished = 0;
        if (size > 1) {
            { std::lock_guard<std::mutex> hold(mutex); generation.fetch_add(1, std::memory_order_release); }
            wake.notify_all();
        }
        work(0);
        for (int i = 0; finished.load(std::memory_order_acquire) < size - 1; i++) {
            if (i < 20000) _mm_pause(); else std::this_thread::yield();
        }
    }
};

extern "C" {
int csp_record() { return RECORD; }
int csp_tiles() { return TILES; }
// Asks the kernel for the tile registers; 0 if they may be used, or are not.
int csp_permission() { return TILES ? (int)syscall(SYS_arch_prctl, 0x1023, 18) : 0; }
void* csp_alloc(i64 size) { return big_alloc((size_t)size); }
void csp_free(void* p) { free(p); }
void* csp_team(int size) { return new Team(size); }
void csp_team_free(void* t) {
    Team* team = (Team*)t;
    if (team->pid == getpid()) delete team;  // the threads of a forked process are not in its child
}
int csp_team_pid(void* t) { return ((Team*)t)->pid; }
void* csp_program(const i64* records, i64 nlayers, i64 scratch, i64 tiles) {
    Program* p = new Program();
    p->scratch = scratch; p->tiles = tiles;
    for (i64 i = 0; i < nlayers; i++) {
        Layer l;
        memcpy(&l, records + i * RECORD, sizeof(l));
        p->layers.push_back(l);
        std::vector<i64> koff; std::vector<Block> blocks;
        if (l.kind == CONV) {
            koff.assign((const i64*)l.koff, (const i64*)l.koff + (TILES ? 1 : 3) * l.ksteps);
            blocks.assign((const Block*)l.table, (const Block*)l.table + l.nblocks);
        }
        p->koffs.push_back(koff); p->blocks.push_back(blocks);
    }
    return p;
}
void csp_steps(void* program, const i64* steps, i64 n) {
    std::vector<Step> s((const Step*)steps, (const Step*)steps + n);
    ((Program*)program)->steps.push_back(s);
#ifdef CSP_PROFILE
    ((Program*)program)->ticks.emplace_back(n);
#endif
}
#ifdef CSP_PROFILE
i64* csp_ticks(void* program, int rank) { return ((Program*)program)->ticks[rank].data(); }
#endif
void csp_program_free(void* p) { delete (Program*)p; }
void csp_run(void* team, const i64* jobs, i64 n) { ((Team*)team)->run((const Job*)jobs, (int)n); }
}
