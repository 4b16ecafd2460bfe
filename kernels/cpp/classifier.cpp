// Compiled once for each vector unit; see simd.h.
#include "classifier.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pack.h"
#include "simd.h"

namespace {

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();  // the logit of lanes past the last class

// Call body(first, n) for packs of n consecutive classes.
template <typename T, typename Body>
INLINE void for_each_pack(std::size_t classes, const Body& body) {
    for (std::size_t first = 0; first < classes; first += Pack<T>::lanes) {
        body(first, std::min(classes - first, Pack<T>::lanes));
    }
}

// The softmax of a row of logits. The maximum is subtracted first, so nothing overflows.
template <typename T>
struct Softmax {
    T max, log_sum;

    INLINE Pack<T> log_of(const Pack<T>& z) const { return z - broadcast(max) - broadcast(log_sum); }
};

template <typename T>
Softmax<T> softmax_of(const T* row, std::size_t classes) {
    Pack<T> most = broadcast(kNothing<T>), sum{};
    for_each_pack<T>(classes,
                     [&](std::size_t k, std::size_t n) { most = larger(load(row + k, n, kNothing<T>), most); });
    const T max = largest_lane(most);
    for_each_pack<T>(
        classes, [&](std::size_t k, std::size_t n) { sum += exp_of(load(row + k, n, kNothing<T>) - broadcast(max)); });
    return {max, std::log(sum_of_lanes(sum))};
}

// The target distribution of a sample. Probabilities that are being learned need not sum to one.
template <typename T>
class Target {
  public:
    Target(const CrossEntropy<T>& a, std::size_t sample)
        : labels_(a.labels ? a.labels + sample * a.classes : nullptr),
          index_(a.labels ? 0 : static_cast<std::size_t>(a.indices[sample])),
          of_logits_(a.of_logits) {
        if (of_logits_) {
            softmax_ = softmax_of(labels_, a.classes);
        } else if (labels_) {
            Pack<T> sum{};
            for_each_pack<T>(a.classes, [&](std::size_t k, std::size_t n) { sum += load(labels_ + k, n); });
            mass_ = sum_of_lanes(sum);
        }
    }

    T mass() const { return mass_; }

    INLINE Pack<T> at(std::size_t first, std::size_t n) const {
        if (!labels_) return one_hot<T>(index_ - first);
        return of_logits_ ? exp_of(softmax_.log_of(load(labels_ + first, n, kNothing<T>))) : load(labels_ + first, n);
    }

  private:
    const T* labels_;
    std::size_t index_;
    bool of_logits_;
    Softmax<T> softmax_{};
    T mass_ = 1;
};

template <typename T>
void add(T* row, const T* bias, std::size_t classes) {
    for_each_pack<T>(classes,
                     [&](std::size_t k, std::size_t n) { store(row + k, load(row + k, n) + load(bias + k, n), n); });
}

template <typename T>
void primal(const CrossEntropy<T>& a, std::size_t sample) {
    T* o = a.logits + sample * a.classes;
    add(o, a.bias, a.classes);
    const Softmax<T> softmax = softmax_of(o, a.classes);
    const Target<T> target(a, sample);
    const T share = T(1) / T(a.batch);
    Pack<T> sum{};
    for_each_pack<T>(a.classes, [&](std::size_t k, std::size_t n) {
        const Pack<T> log_pi = softmax.log_of(load(o + k, n)), t = target.at(k, n);
        sum += t * log_pi;
        store(o + k, (exp_of(log_pi) * target.mass() - t) * share, n);
    });
    a.losses[sample] = -sum_of_lanes(sum) * share;
}

template <typename T>
void dual(const CrossEntropy<T>& a, std::size_t sample) {
    T *o = a.logits + sample * a.classes, *o_dot = a.logits_dot + sample * a.classes;
    T* labels_bar_dot = a.labels_bar_dot ? a.labels_bar_dot + sample * a.classes : nullptr;
    add(o, a.bias, a.classes);
    add(o_dot, a.bias_dot, a.classes);
    const Softmax<T> softmax = softmax_of(o, a.classes);
    const Target<T> target(a, sample);
    const T share = T(1) / T(a.batch);

    Pack<T> pi_o_dot{}, t_log_pi_dot{};
    for_each_pack<T>(a.classes, [&](std::size_t k, std::size_t n) {
        pi_o_dot += exp_of(softmax.log_of(load(o + k, n, kNothing<T>))) * load(o_dot + k, n);
    });
    const Pack<T> shift = broadcast(sum_of_lanes(pi_o_dot));  // log_pi_dot = o_dot - shift
    for_each_pack<T>(a.classes, [&](std::size_t k, std::size_t n) {
        t_log_pi_dot += target.at(k, n) * (load(o_dot + k, n) - shift);
    });
    const T along = sum_of_lanes(t_log_pi_dot);
    a.losses[sample] = -along * share;

    for_each_pack<T>(a.classes, [&](std::size_t k, std::size_t n) {
        const Pack<T> mass_pi = exp_of(softmax.log_of(load(o + k, n))) * target.mass(), t = target.at(k, n);
        const Pack<T> log_pi_dot = load(o_dot + k, n) - shift;
        store(o + k, (mass_pi - t) * share, n);
        store(o_dot + k, mass_pi * log_pi_dot * share, n);
        if (labels_bar_dot) {  // logits reach the target through their softmax
            const Pack<T> to_labels = a.of_logits ? t * (log_pi_dot - broadcast(along)) : log_pi_dot;
            store(labels_bar_dot + k, to_labels * -share, n);
        }
    });
}

}  // namespace

namespace UNIT {

template <typename T>
ClassifierUnit<T> classifier_unit() {
    return {primal<T>, dual<T>};
}
template ClassifierUnit<float> classifier_unit<float>();
template ClassifierUnit<double> classifier_unit<double>();

}  // namespace UNIT
