// Memory for large results, kept for the next one of its size. The system would take back what is freed and fault in
// every page of the next allocation, which costs more than the kernels that write it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

// What is kept and what is in use are together never more than what was once in use at the same time.
class Pool {
public:
    struct Block {
        void* memory;
        std::size_t size;
    };

    // At least `size` bytes without a value: the smallest free block that is large enough, or a new one. Of several the
    // last that came back, which may still be in the cache.
    Block take(std::size_t size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto smallest = free_.lower_bound(size);
        Block block{nullptr, size};
        if (smallest != free_.end()) {
            const auto found = std::prev(free_.upper_bound(smallest->first));
            block = {found->second, found->first};
            kept_ -= block.size;
            free_.erase(found);
        } else {
            while (!free_.empty() && used_ + kept_ + size > most_) drop_one();
            block.memory = ::operator new(size, std::align_val_t(kAlignment));
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

private:
    static constexpr std::size_t kAlignment = 64;

    void drop_one() {
        const auto smallest = free_.begin();
        kept_ -= smallest->first;
        ::operator delete(smallest->second, std::align_val_t(kAlignment));
        free_.erase(smallest);
    }

    std::mutex mutex_;
    std::multimap<std::size_t, void*> free_;
    std::size_t used_ = 0, kept_ = 0, most_ = 0;
};
