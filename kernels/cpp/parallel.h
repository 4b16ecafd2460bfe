// A loop over independent blocks, shared among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

// The thread pool that torch itself uses (GNU OpenMP's), looked up in the running process because each torch ships its
// own copy. A second set of threads would fight with it for the cores: OpenMP's go on spinning after each of torch's
// loops. Null where torch uses something else.
using RunOnPool = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
inline RunOnPool pool() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<RunOnPool>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Return how many blocks of `operations` additions and multiplications each keep one thread busy for as long as it
// takes to start another. Work that is divided further is done no sooner, and much later where that thread has to wait
// for a core.
inline std::size_t grain_of(std::size_t operations) {
    constexpr std::size_t kOperations = 1 << 21;  // some 40 us
    return 1 + kOperations / operations;
}

// Call body(block) once for each block in [0, blocks), from at most `threads` threads, the caller's among them. `grain`
// blocks are worth a thread of their own: starting one costs some 50 us. An exception of body comes out here.
template <typename Body>
void parallel_for(std::size_t blocks, std::size_t grain, int threads, const Body& body) {
    const std::size_t useful = std::max<std::size_t>(1, blocks / grain);
    const std::size_t workers = std::min<std::size_t>(static_cast<std::size_t>(std::max(threads, 1)), useful);
    const std::size_t shares = workers == 1 ? 1 : std::min(blocks, 8 * workers);
    std::atomic<std::size_t> next{0};
    // whoever is free takes the next share: a thread that others keep from its core does less
    std::exception_ptr failure;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    const auto work = [&] {
        try {
            for (std::size_t taken = next++; taken < shares; taken = next++) {
                const std::size_t end = (taken + 1) * blocks / shares;
                for (std::size_t block = taken * blocks / shares; block < end; ++block) body(block);
            }
        } catch (...) {  // the first one; no thread of the pool may end by it
            if (!failed.test_and_set()) failure = std::current_exception();
        }
    };
    if (workers == 1) {
        work();
    } else if (const RunOnPool run = pool()) {
        run([](void* data) { (*static_cast<decltype(work)*>(data))(); },
            const_cast<void*>(static_cast<const void*>(&work)), static_cast<unsigned>(workers), 0);
    } else {
        std::vector<std::thread> started;
        for (std::size_t worker = 1; worker < workers; ++worker) started.emplace_back(work);
        work();
        for (std::thread& thread : started) thread.join();
    }
    if (failure) std::rethrow_exception(failure);
}
