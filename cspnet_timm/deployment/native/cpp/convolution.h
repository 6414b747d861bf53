// A dense convolution: pixels side by side for the product, and which product.
#pragma once
#include "structs.h"
#if TILES
#include "product_tiles.h"
#else
#include "product_registers.h"
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
        case LEAKY_RELU: return pick_flow<LEAKY_RELU>(res, flow);
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
                const char* from = image + (y % l.in_rows * l.in_w + left * s + p - l.pad_w) * l.in_ps;
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
        rows[ky] = image + (inside[ky] ? iy % l.in_rows * l.in_w * l.in_ps : 0) - l.pad_w * l.in_ps;
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
            const char* row = image + iy % l.in_rows * l.in_w * l.in_ps;
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

static void run_conv(const Layer& l, const i64* koff, const Block* blocks, const Step& s, char* arena, Worker& w) {
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
