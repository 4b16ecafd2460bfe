// Softmax and cross-entropy as a Python function: samples are shared among threads, sums over them taken in their
// order.
#include <algorithm>
#include <vector>

#include "module.h"
#include "parallel.h"
#include "simd.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::size_t kGrain = 1 << 15;  // logits that are worth a thread

// Overwrite logits by their gradients, and store the mean loss and the gradient of the bias. All dots are None in the
// primal operation. With them, `loss` and `bias_bar` are derivatives.
template <typename T>
void cross_entropy(const Array<T>& logits, const Maybe<T>& logits_dot, const Input<T>& bias,
                   const Maybe<const T>& bias_dot, const Maybe<const std::int64_t>& indices,
                   const Maybe<const T>& labels, bool of_logits, const Array<T>& loss, const Array<T>& bias_bar,
                   const Maybe<T>& labels_bar_dot, int threads) {
    expect(logits.ndim() == 2 && indices.has_value() != labels.has_value());
    expect(logits_dot.has_value() == bias_dot.has_value());
    const std::size_t size = logits.size(), batch = logits.shape(0), classes = logits.shape(1);
    std::vector<T> losses(batch);
    const CrossEntropy<T> a{batch,
                            classes,
                            data_of(bias, classes),
                            data_of(bias_dot, classes),
                            data_of(indices, batch),
                            data_of(labels, size),
                            of_logits,
                            logits.data(),
                            data_of(logits_dot, size),
                            losses.data(),
                            data_of(labels_bar_dot, size)};
    expect(!a.indices || std::all_of(a.indices, a.indices + batch, [&](std::int64_t index) {
        return 0 <= index && index < static_cast<std::int64_t>(classes);
    }));
    const auto kernel = logits_dot ? classifier_unit<T>().dual : classifier_unit<T>().primal;
    const T* o_bar = logits_dot ? a.logits_dot : a.logits;  // as the kernel leaves them
    T *loss_sum = data_of(loss, 1), *o_bar_sum = data_of(bias_bar, classes);

    nb::gil_scoped_release release;
    parallel_for(batch, 1 + kGrain / classes, threads, [&](std::size_t sample) { kernel(a, sample); });
    *loss_sum = T(0);
    std::fill(o_bar_sum, o_bar_sum + classes, T(0));
    for (std::size_t sample = 0; sample < batch; ++sample) {
        *loss_sum += losses[sample];
        for (std::size_t k = 0; k < classes; ++k) o_bar_sum[k] += o_bar[sample * classes + k];
    }
}

template <typename T>
void define(nb::module_& module) {
    module.def("cross_entropy", cross_entropy<T>, "logits"_a.noconvert(), "logits_dot"_a.none(), "bias"_a.noconvert(),
               "bias_dot"_a.none(), "indices"_a.none(), "labels"_a.none(), "of_logits"_a, "loss"_a.noconvert(),
               "bias_bar"_a.noconvert(), "labels_bar_dot"_a.none(), "threads"_a);
}

}  // namespace

void define_classifier(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}
