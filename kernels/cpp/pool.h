// A caching allocator for large results. Without it freed memory goes back to the system, and the page faults of the
// next allocation cost more than the kernels that write to it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

// Directly from the system if possible, so that released memory is available to other processes at once.
inline void* from_system(std::size_t size) {
#if defined(__unix__) || defined(__APPLE__)
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
#else
    return ::operator new(size, std::align_val_t(64));
#endif
}

inline void to_system(void* memory, [[maybe_unused]] std::size_t size) {
#if defined(__unix__) || defined(__APPLE__)
    munmap(memory, size);
#else
    ::operator delete(memory, std::align_val_t(64));
#endif
}

// Cached blocks and blocks in use together take at most the bytes that were once in use at the same time.
class Pool {
  public:
    struct Block {
        void* memory;
        std::size_t size;
    };

    // Return at least `size` uninitialised bytes: the smallest free block that is large enough, but at most kMostOver
    // times too large, or a new one. Of several equal blocks take the one that was given back last, which may still be
    // in the CPU's cache.
    Block take(std::size_t size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto smallest = free_.lower_bound(size);
        Block block{nullptr, size};
        if (smallest != free_.end() && smallest->first <= kMostOver * size) {
            const auto found = std::prev(free_.upper_bound(smallest->first));
            block = {found->second, found->first};
            kept_ -= block.size;
            free_.erase(found);
        } else {
            while (!free_.empty() && used_ + kept_ + size > most_) drop_one();
            block.memory = fresh(size);
        }
        used_ += block.size;
        most_ = std::max(most_, used_);
        return block;
    }

    void give_back(const Block& block) {
        const std::lock_guard<std::mutex> lock(mutex_);
        used_ -= block.size;
        kept_ += block.size;
        free_.emplace(block.size, block.memory);
    }

    // Release all cached blocks, and reset the limit, after a step that was too large, or after the last one.
    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        while (!free_.empty()) drop_one();
        most_ = used_;
    }

  private:
    static constexpr std::size_t kMostOver = 4;  // pooled planes are a quarter of the planes before the pool

    void* fresh(std::size_t size) {
        try {
            return from_system(size);
        } catch (const std::bad_alloc&) {
            if (free_.empty()) throw;
        }
        while (!free_.empty()) drop_one();
        return from_system(size);
    }

    void drop_one() {
        const auto smallest = free_.begin();
        kept_ -= smallest->first;
        to_system(smallest->second, smallest->first);
        free_.erase(smallest);
    }

    std::mutex mutex_;
    std::multimap<std::size_t, void*> free_;
    std::size_t used_ = 0, kept_ = 0, most_ = 0;
};
