// Softmax and cross-entropy as Python functions: samples are shared among threads, sums over them taken in their order.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "module.h"
#include "parallel.h"
#include "simd.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::size_t kGrain = 1 << 15;  // logits that are worth a thread

template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Input = Array<const T>;
template <typename T>
using Maybe = std::optional<Array<T>>;

void expect(bool condition) {
    if (!condition) throw std::invalid_argument("classifier: sizes do not fit each other, or a label is no class");
}

// Sizes and labels are checked by the caller in Python; this is the last line of defence against memory that is not
// ours.
template <typename T>
CrossEntropy<T> arguments(const Array<T>& logits, const Input<T>& bias, const Maybe<const std::int64_t>& indices,
                          const Maybe<const T>& labels, bool of_logits) {
    expect(logits.ndim() == 2 && bias.size() == logits.shape(1) && indices.has_value() != labels.has_value());
    CrossEntropy<T> a{};
    a.batch = logits.shape(0);
    a.classes = logits.shape(1);
    a.bias = bias.data();
    a.logits = logits.data();
    a.of_logits = of_logits;
    if (labels) {
        expect(labels->size() == logits.size());
        a.labels = labels->data();
    } else {
        const std::int64_t classes = static_cast<std::int64_t>(a.classes);
        a.indices = indices->data();
        expect(indices->size() == a.batch && std::all_of(a.indices, a.indices + a.batch, [&](std::int64_t index) {
                   return 0 <= index && index < classes;
               }));
    }
    return a;
}

// Runs `kernel` for every sample, and adds up the losses and `o_bar`, which the kernel writes in the place of some
// logits.
template <typename T, typename Kernel>
void run(CrossEntropy<T> a, Kernel kernel, const T* o_bar, T* loss, T* bias_bar, int threads) {
    nb::gil_scoped_release release;
    std::vector<T> losses(a.batch);
    a.losses = losses.data();
    parallel_for(a.batch, 1 + kGrain / a.classes, threads, [&](std::size_t sample) { kernel(a, sample); });
    *loss = T(0);
    std::fill(bias_bar, bias_bar + a.classes, T(0));
    for (std::size_t sample = 0; sample < a.batch; ++sample) {
        *loss += losses[sample];
        for (std::size_t k = 0; k < a.classes; ++k) bias_bar[k] += o_bar[sample * a.classes + k];
    }
}

template <typename T>
void cross_entropy(Array<T> logits, const Input<T>& bias, const Maybe<const std::int64_t>& indices,
                   const Maybe<const T>& labels, bool of_logits, Array<T> loss, Array<T> bias_bar, int threads) {
    const CrossEntropy<T> a = arguments<T>(logits, bias, indices, labels, of_logits);
    expect(loss.size() == 1 && bias_bar.size() == a.classes);
    run(a, classifier_unit<T>().primal, a.logits, loss.data(), bias_bar.data(), threads);
}

template <typename T>
void cross_entropy_dual(Array<T> logits, Array<T> logits_dot, const Input<T>& bias, const Input<T>& bias_dot,
                        const Maybe<const std::int64_t>& indices, const Maybe<const T>& labels, bool of_logits,
                        Array<T> loss_dot, Array<T> bias_bar_dot, const Maybe<T>& labels_bar_dot, int threads) {
    CrossEntropy<T> a = arguments<T>(logits, bias, indices, labels, of_logits);
    expect(logits_dot.size() == logits.size() && bias_dot.size() == a.classes);
    expect(loss_dot.size() == 1 && bias_bar_dot.size() == a.classes);
    expect(!labels_bar_dot || labels_bar_dot->size() == logits.size());
    a.logits_dot = logits_dot.data();
    a.bias_dot = bias_dot.data();
    a.labels_bar_dot = labels_bar_dot ? labels_bar_dot->data() : nullptr;
    run(a, classifier_unit<T>().dual, a.logits_dot, loss_dot.data(), bias_bar_dot.data(), threads);
}

template <typename T>
void define(nb::module_& module) {
    module.def("cross_entropy", cross_entropy<T>, "logits"_a.noconvert(), "bias"_a.noconvert(), "indices"_a.none(),
               "labels"_a.none(), "of_logits"_a, "loss"_a.noconvert(), "bias_bar"_a.noconvert(), "threads"_a);
    module.def("cross_entropy_dual", cross_entropy_dual<T>, "logits"_a.noconvert(), "logits_dot"_a.noconvert(),
               "bias"_a.noconvert(), "bias_dot"_a.noconvert(), "indices"_a.none(), "labels"_a.none(), "of_logits"_a,
               "loss_dot"_a.noconvert(), "bias_bar_dot"_a.noconvert(), "labels_bar_dot"_a.none(), "threads"_a);
}

}  // namespace

void define_classifier(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}
