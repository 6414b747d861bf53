// What this code and the Python beside it (records.py) both know: enumerations, and structures of 64-bit integers.
// Each is a list of names here and there; engine.cpp gives out these lists, and Python compares them with its own.
#pragma once
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
#include <new>
#include <system_error>
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

#define ENUM_KIND(X) X(CONV) X(DEPTHWISE) X(POOL) X(MEAN) X(BINARY) X(UPSAMPLE) X(ZEROS) X(INPUT) X(OUTPUT)
#define ENUM_ACT(X) \
    X(NONE) X(RELU) X(LEAKY_RELU) X(SILU) X(HARDSWISH) X(HARDSIGMOID) X(SIGMOID) X(MISH) X(RELU6)
// How a dense convolution finds its pixels: in the map, in a copy of some rows, in a copy for each position.
#define ENUM_MODE(X) X(DIRECT) X(BAND) X(PATCH)
// From which numbers to which: HALF and FROM_HALF multiply bfloat16, HALF and FROM_BYTES may give it.
#define ENUM_FLOW(X) X(HALF) X(BYTES) X(FROM_HALF) X(FROM_BYTES)
#define ENUM_POOL(X) X(MAXIMUM) X(AVERAGE) X(AVERAGE_PADDED)
#define ENUM_BINARY(X) X(ACTIVATION) X(SUM) X(PRODUCT)
// Whose memory a map lies in: everybody's; a thread's, all its images; a thread's, the images of the step.
#define ENUM_PLACE(X) X(SHARED) X(OWN) X(LOCAL)

// A layer. Offsets are bytes from the arena's start to where the map of the memory's first image begins.
#define STRUCT_LAYER(X) \
    X(kind) X(flavour) /* of a pool or a binary layer */ \
    X(in_off) X(in_ps) /* bytes from pixel to pixel */ X(in_h) X(in_w) X(in_c) \
    X(in_rows) /* that there is room for; row y lies at y % in_rows */ X(in_place) \
    X(in_turns) /* the layer reads the very rows that it writes */ \
    X(in2_off) X(in2_ps) X(in2_rows) X(in2_place) X(in2_small) /* one pixel for the whole map */ \
    X(out_off) X(out_ps) X(out_h) X(out_w) X(out_c) X(out_rows) X(out_place) \
    X(kh) X(kw) X(stride) X(pad_h) X(pad_w) X(dil) \
    X(act) X(act_param) /* a float's bits */ \
    X(res_mode) /* what in2 is added to: 0 nothing, 1 the sums, 2 the activation */ \
    /* Maps in bytes: a byte q of channel c stands for (q - zero[c]) * scale[c]; written is y * inv[c] + zero[c]. */ \
    X(in8) X(out8) X(in2_8) X(fill) /* pixels of zeros */ X(in_scale) X(in_zero) X(in2_scale) X(in2_zero) \
    X(out_inv) X(out_zero) \
    X(weights) X(bias) X(flow) \
    X(mode) X(tap_c) /* channels of a tap */ X(nblocks) X(blocks) X(ksteps) X(koff) \
    X(flat) /* rows of a band are taken as one */ X(rows_at_once) \
    X(planes) X(plane) X(width) X(band_ps) /* of a band: planes each way, their rows and columns, bytes of a pixel */ \
    X(dense) /* a band's pixels lie side by side, and a step of the product takes bytes of several */ \
    X(by_position) /* order of work: positions outside, blocks inside */ \
    X(steps_at_once) /* where blocks are outside: steps for which a block's weights stay in the first-level cache */ \
    X(fetch) /* the next block's have to be fetched from afar */ \
    X(index) X(is_f32) /* of an output: which, and whether the map is float32 */ \
    X(row_table) X(column_table) /* of an upsampling: which row and column each takes */
// What a block of 32 output channels of a convolution reads and writes.
#define STRUCT_BLOCK(X) \
    X(out_off) X(out_ps) X(out_rows) X(out_place) X(nstore) X(res_off) X(res_ps) X(a_off) X(epilogue)
// Of a layer the images b0 to b1, rows y0 to y1, blocks n0 to n1; of a thread's own images where apart, else of all.
#define STRUCT_STEP(X) X(layer) X(b0) X(b1) X(y0) X(y1) X(n0) X(n1) X(apart) X(barrier)
// A step of a product without tiles: from where on how many times 4 bytes of a position, and where their weights begin.
#define STRUCT_RUN(X) X(from) X(count) X(weights)
#define STRUCT_JOB(X) \
    X(program) X(arena) X(images) X(input) X(stride_n) X(stride_c) X(stride_h) X(stride_w) X(outputs)
// How a block's sums become bytes where there are tiles, in the order of lanes that _mm512_packs_epi32 leaves.
#define STRUCT_EPILOGUE_TILES(X) X(int32, shift) X(float16, mul) X(float16, res_mul) X(float16, inv) X(float16, add)
// The same where only one of the two maps is in bytes, or there are no tiles.
#define STRUCT_EPILOGUE(X) X(float32, mul) X(float32, res_mul) X(float32, res_add) X(float32, inv) X(float32, add)

#define NAME(name) name,
enum Kind { ENUM_KIND(NAME) };
enum Act { ENUM_ACT(NAME) };
enum Mode { ENUM_MODE(NAME) };
enum Flow { ENUM_FLOW(NAME) };
enum PoolFlavour { ENUM_POOL(NAME) };
enum BinaryFlavour { ENUM_BINARY(NAME) };
enum Place { ENUM_PLACE(NAME) };
#undef NAME
#define FIELD(name) i64 name;
struct Layer { STRUCT_LAYER(FIELD) };
struct Block { STRUCT_BLOCK(FIELD) };
struct Step { STRUCT_STEP(FIELD) };
struct Run { STRUCT_RUN(FIELD) };
struct Job { STRUCT_JOB(FIELD) };
#undef FIELD
typedef int32_t int32;
typedef float float32;
#define FIELD(type, name) type name[32];
#if TILES
typedef _Float16 float16;
struct EpilogueTiles { STRUCT_EPILOGUE_TILES(FIELD) };
#endif
struct Epilogue { STRUCT_EPILOGUE(FIELD) };
#undef FIELD

#define TEXT(name) #name " "
#define TYPED(type, name) #type ":" #name " "
static const char* const DESCRIPTION =
    "Kind " ENUM_KIND(TEXT) "\nAct " ENUM_ACT(TEXT) "\nMode " ENUM_MODE(TEXT) "\nFlow " ENUM_FLOW(TEXT)
    "\nPool " ENUM_POOL(TEXT) "\nBinary " ENUM_BINARY(TEXT) "\nPlace " ENUM_PLACE(TEXT)
    "\nLayer " STRUCT_LAYER(TEXT) "\nBlock " STRUCT_BLOCK(TEXT) "\nStep " STRUCT_STEP(TEXT) "\nRun " STRUCT_RUN(TEXT)
    "\nJob " STRUCT_JOB(TEXT)
    "\nEpilogueTiles " STRUCT_EPILOGUE_TILES(TYPED) "\nEpilogue " STRUCT_EPILOGUE(TYPED);
#undef TEXT
#undef TYPED

struct Program {
    std::vector<Layer> layers;
    std::vector<std::vector<i64>> koffs;
    std::vector<std::vector<Block>> blocks;
    std::vector<std::vector<Step>> steps;  // of each thread of the team
    size_t scratch = 0, tiles = 0;
    i64 own = 0;  // bytes of a thread's own part of the arena
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
