// Memory for large results, kept for the next one of its size. The system would take back what is freed and fault in
// every page of the next allocation, which costs more than the kernels that write it.
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

// Straight from the system where that is possible, so that dropped memory is free for others at once.
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

// Blocks that are kept and blocks in use are together never more bytes than were once in use at the same time.
class Pool {
  public:
    struct Block {
        void* memory;
        std::size_t size;
    };

    // At least `size` bytes without a value: the smallest free block that is large enough, or a new one; a block that
    // is far too large is left for a request of its size. Of several, the one that was given back last, which may still
    // be in the cache.
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

    // Keep nothing, and forget what was once in use: after a step that was too large, or a last one.
    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        while (!free_.empty()) drop_one();
        most_ = used_;
    }

  private:
    static constexpr std::size_t kMostOver = 4;  // a pooled tensor is a quarter of what it comes from

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
