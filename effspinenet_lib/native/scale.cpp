// The gradients of squeeze-and-excitation's product in one sweep, where torch takes three.

#include "vectors.h"

namespace {

// Of features * gates, where an image has a gate for each channel; `count` is of one image.
template <class T>
void scale_backward(const T* features, const T* gradient, const float* gates, T* by_features,
                    float* by_gates, Size count, Size channels, Size threads) {
  Shares shares(count, period_of(channels), threads);
  Repeated repeated(gates, channels);
  const float* gate = repeated.at();
  std::vector<std::vector<double>> totals(shares.parts, std::vector<double>(channels));
  shares.run([&](Size part, Size start, Size end) {
    Sums sums(channels);
    float* sum = sums.at();
    auto compute = [=](Floats values, Floats upper, Size i) {
      store(sum + i, load(sum + i) + upper * values);
      return upper * load(gate + i);
    };
    for (Size block = shares.block(); start < end; start += block) {
      sweep(
          start, std::min(end, start + block), shares.period,
          [=](Size at, Size i) {
            store(by_features + at, compute(load(features + at), load(gradient + at), i));
          },
          [=](Size at, Size i, Size number) {
            Floats values = load_some(features + at, number);
            Floats upper = load_some(gradient + at, number);
            store_some(by_features + at, compute(values, upper, i), number);
          });
      sums.add_to(totals[part].data());
    }
  });
  for (Size channel = 0; channel < channels; ++channel) {
    double sum = 0;
    for (const std::vector<double>& part : totals) sum += part[channel];
    by_gates[channel] = float(sum);
  }
}

} // namespace

#define SCALE(NAME, TYPE)                                                                          \
  void scale_backward_##NAME(const void* features, const void* gradient, const float* gates,       \
                             void* by_features, float* by_gates, Size images, Size count,          \
                             Size channels, Size threads) {                                        \
    for (Size image = 0; image < images; ++image) {                                                \
      Size at = image * count, gate = image * channels;                                            \
      scale_backward<TYPE>((const TYPE*)features + at, (const TYPE*)gradient + at, gates + gate,   \
                           (TYPE*)by_features + at, by_gates + gate, count, channels, threads);    \
    }                                                                                              \
  }

extern "C" {
SCALE(float32, float)
SCALE(bfloat16, Bfloat16)
}
