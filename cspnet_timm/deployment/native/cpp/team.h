// The threads, and how a program's steps are taken to the images at hand.
#pragma once
#include "convolution.h"
#include "layers.h"

#if TILES
struct alignas(64) Config { uint8_t palette, start, reserved[14]; uint16_t colsb[16]; uint8_t rows[16]; };
#endif

// The images at hand: all of a job, a thread's share of them, and which of them a step is for.
struct Images { i64 rank, own, first, b0; };

// From where a map would begin such that image b, counted from the first of the job, and row y lie where they do. A
// thread's own memory has its own images alone, or those of the step; of rows that lie there in turns, y0 begins a turn.
static inline i64 origin(const Images& at, i64 off, i64 place, i64 image, i64 turn) {
    if (place == SHARED) return off - turn;
    return off + at.rank * at.own - (place == OWN ? at.first : at.b0) * image - turn;
}

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
        try {
            for (int i = 0; i < n; i++) workers.push_back(new Worker());
            for (int i = 1; i < n; i++) threads.emplace_back([this, i] { loop(i); });
        } catch (...) {
            end();
            throw;
        }
    }
    ~Team() { end(); }
    void end() {
        { std::lock_guard<std::mutex> hold(mutex); stop = true; generation++; }
        wake.notify_all();
        for (auto& t : threads) t.join();
        threads.clear();
        for (auto w : workers) delete w;
        workers.clear();
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
        const i64 first = job.images * rank / size, last = job.images * (rank + 1) / size;
        char* const arena = (char*)job.arena;
        for (const Step& step : p.steps[rank]) {
            if (step.barrier) { barrier(); continue; }
            Step s = step;
            if (s.apart) { s.b0 += first; s.b1 = std::min(s.b1 + first, last); }
            else s.b1 = std::min(s.b1, job.images);
            if (s.b0 >= s.b1) continue;
#ifdef CSP_PROFILE
            Clock clock(&p.ticks[rank][&step - p.steps[rank].data()]);
#endif
            Layer l = p.layers[s.layer];
            const Images at = {rank, p.own, first, s.b0};
            auto turn = [&](i64 rows, i64 width, i64 ps) { return s.y0 / rows * rows * width * ps; };
            const i64 out_pixels = l.out_h * l.out_w;
            l.in_off = origin(at, l.in_off, l.in_place, l.in_h * l.in_w * l.in_ps,
                              l.in_turns ? turn(l.in_rows, l.in_w, l.in_ps) : 0);
            l.in2_off = origin(at, l.in2_off, l.in2_place, (l.in2_small ? 1 : out_pixels) * l.in2_ps,
                               l.in2_small ? 0 : turn(l.in2_rows, l.out_w, l.in2_ps));
            l.out_off = origin(at, l.out_off, l.out_place, out_pixels * l.out_ps, turn(l.out_rows, l.out_w, l.out_ps));
            switch (l.kind) {
                case CONV: {
                    const std::vector<Block>& blocks = p.blocks[s.layer];
                    const i64 res = turn(l.in2_rows, l.out_w, l.in2_ps);
                    for (i64 n = s.n0; n < s.n1; n++) {
                        Block& k = w.blocks[n] = blocks[n];
                        k.out_off = origin(at, k.out_off, k.out_place, out_pixels * k.out_ps, turn(k.out_rows, l.out_w, k.out_ps));
                        k.res_off = origin(at, k.res_off, l.in2_place, out_pixels * k.res_ps, res);
                    }
                    run_conv(l, p.koffs[s.layer].data(), w.blocks.data(), s, arena, w);
                    break;
                }
                case DEPTHWISE: run_depthwise(l, s, arena); break;
                case POOL: run_pool(l, s, arena); break;
                case MEAN: run_mean(l, s, arena); break;
                case BINARY: run_binary(l, s, arena); break;
                case UPSAMPLE: run_upsample(l, s, arena); break;
                case ZEROS: run_zeros(l, s, arena); break;
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
