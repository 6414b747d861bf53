// An interpreter of convolutional networks for CPUs with AVX-512: maps in bfloat16 and sums in float32, or maps in bytes
// and sums in int32. The products are AMX's where the compiler is allowed its tiles (and float16 with them), else VNNI's.
//
// The caller (Python, in the folder above, whose README.md explains the words) has laid out every map in one arena, packed
// the weights, and written the order of work; nothing here is specific to a network. Maps are
// [image][row][column][channel] without borders; a layer reads and writes a range of channels of such a map, so that
// concatenations and slices are no work. What is read and written has been checked there, record by record.
#include "team.h"

extern "C" {
// The names of all that both sides know, a line for each enumeration and structure.
const char* csp_description() { return DESCRIPTION; }
int csp_tiles() { return TILES; }
// Asks the kernel for the tile registers; 0 if they may be used, or are not.
int csp_permission() { return TILES ? (int)syscall(SYS_arch_prctl, 0x1023, 18) : 0; }
void* csp_alloc(i64 size) { return allocate((size_t)size); }
void csp_free(void* p) { release(p); }
void* csp_team(int size) {  // null if the system gives no more threads
    try { return new Team(size); } catch (const std::exception&) { return nullptr; }
}
void csp_team_free(void* t) {
    Team* team = (Team*)t;
    if (team->pid == getpid()) delete team;  // the threads of a forked process are not in its child
}
int csp_team_pid(void* t) { return ((Team*)t)->pid; }
// Room for a program in the memory of each thread; 0 if there is none.
int csp_reserve(void* team, const void* program) {
    const Program& p = *(const Program*)program;
    size_t nblocks = 0;
    for (const auto& blocks : p.blocks) nblocks = std::max(nblocks, blocks.size());
    try {
        for (Worker* w : ((Team*)team)->workers) if (!w->reserve(p.scratch, p.tiles, nblocks)) return 0;
    } catch (const std::bad_alloc&) { return 0; }
    return 1;
}
void* csp_program(const i64* layers, i64 count, i64 scratch, i64 tiles, i64 own) {
    Program* p = new Program();
    p->scratch = (size_t)scratch; p->tiles = (size_t)tiles; p->own = own;
    for (i64 i = 0; i < count; i++) {
        Layer l;
        memcpy(&l, layers + i * (sizeof(Layer) / sizeof(i64)), sizeof(l));
        std::vector<i64> koff; std::vector<Block> blocks;
        if (l.kind == CONV) {
            koff.assign((const i64*)l.koff, (const i64*)l.koff + (TILES ? 1 : 3) * l.ksteps);
            blocks.assign((const Block*)l.blocks, (const Block*)l.blocks + l.nblocks);
        }
        p->layers.push_back(l); p->koffs.push_back(koff); p->blocks.push_back(blocks);
    }
    return p;
}
void csp_steps(void* program, const i64* steps, i64 n) {
    ((Program*)program)->steps.emplace_back((const Step*)steps, (const Step*)steps + n);
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
