// Thread-local scratch memory of the kernels.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

// Uninitialised memory, aligned to a cache line, that is kept for the next call.
template <typename T>
class Buffer {
  public:
    T* at_least(std::size_t count) {
        if (count > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
            size_ = count;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> memory_;
    std::size_t size_ = 0;
};

template <typename T>
T* scratch(std::size_t count) {
    static thread_local Buffer<T> buffer;
    return buffer.at_least(count);
}
