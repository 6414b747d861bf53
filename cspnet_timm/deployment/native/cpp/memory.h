// Memory: in large pages, of the arena, of weights, and of each thread.
#pragma once
#include "structs.h"

#ifdef CSP_GUARD  // for tests: pages before and behind that nobody may touch, and nothing that is a number in it
#include <map>
static std::map<void*, std::pair<void*, size_t>> guarded;
static std::mutex guarding;
static void* allocate(size_t size) {
    const size_t page = 4096, room = (size + 63) / 64 * 64, inner = (room + page - 1) / page * page;
    char* const start = (char*)mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    memset(start, 0xff, inner + 2 * page);
    mprotect(start, page, PROT_NONE);
    mprotect(start + page + inner, page, PROT_NONE);
    char* const p = start + page + inner - room;
    std::lock_guard<std::mutex> hold(guarding);
    guarded[p] = {start, inner + 2 * page};
    return p;
}
static void release(void* p) {
    std::lock_guard<std::mutex> hold(guarding);
    const auto found = guarded.find(p);
    if (found == guarded.end()) return;
    munmap(found->second.first, found->second.second);
    guarded.erase(found);
}
#else
// The kernel gives a page when it is first touched: room that a small batch does not use costs nothing.
static void* allocate(size_t size) {
    const size_t large = 2u << 20, page = size >= large ? large : 4096;
    void* p = nullptr;
    if (posix_memalign(&p, page, (size + page - 1) / page * page)) return nullptr;
    if (page == large) madvise(p, (size + page - 1) / page * page, MADV_HUGEPAGE);
    return p;
}
static void release(void* p) { free(p); }
#endif

// Memory of one thread. Its room is made before anything runs; nothing is left in it from one step to another.
struct Worker {
    char* scratch = nullptr; size_t scratch_size = 0;
    char* partial = nullptr; size_t partial_size = 0;  // sums of four tiles for each pair
    std::vector<const char*> tile_a; std::vector<int32_t> tile_pos;  // 16 output positions per tile, -1: none
    std::vector<Block> blocks;  // of the layer at hand, where they are for the thread and the images at hand
    alignas(64) float acc[2][32 * 32];

    static bool grow(char*& p, size_t& has, size_t wanted) {
        if (has >= wanted) return true;
        release(p);
        p = (char*)allocate(wanted);
        has = p ? wanted : 0;
        return p != nullptr;
    }
    bool reserve(size_t scratch_bytes, size_t tiles, size_t nblocks) {
        if (!grow(scratch, scratch_size, scratch_bytes) || !grow(partial, partial_size, tiles * 2048)) return false;
        if (tile_a.size() < tiles) { tile_a.resize(tiles); tile_pos.resize(tiles * 16); }
        if (blocks.size() < nblocks) blocks.resize(nblocks);
        return true;
    }
    ~Worker() { release(scratch); release(partial); }
};
