// A loop over independent blocks, shared among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

// Call body(block) once for each block in [0, blocks), from at most `threads` threads, the caller's among them.
// Starting a thread costs some 50 us, so each gets at least `grain` blocks, and none is started for fewer.
template <typename Body>
void parallel_for(std::size_t blocks, std::size_t grain, int threads, const Body& body) {
    const std::size_t useful = std::max<std::size_t>(1, blocks / grain);
    const std::size_t workers = std::min<std::size_t>(static_cast<std::size_t>(std::max(threads, 1)), useful);
    const auto share = [&](std::size_t worker) {
        const std::size_t end = (worker + 1) * blocks / workers;
        for (std::size_t block = worker * blocks / workers; block < end; ++block) body(block);
    };
    std::vector<std::thread> started;
    started.reserve(workers - 1);
    for (std::size_t worker = 1; worker < workers; ++worker) started.emplace_back(share, worker);
    share(0);
    for (std::thread& thread : started) thread.join();
}
