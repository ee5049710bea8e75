// The focal loss of independent classes and its gradient, in one sweep over the logits.

#include "vectors.h"

namespace {

constexpr double REFUSED = -1;
constexpr Size ROWS = 64; // that are summed in float32 before they are in float64

// For e in [0, 1], by 2 atanh(e / (2 + e)).
inline Floats log_of_one_and(Floats e) {
  Floats ratio = e / (2.0f + e);
  Floats square = ratio * ratio;
  Floats series = square * (1.0f / 13) + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  return 2.0f * ratio * (1.0f + series * square);
}

struct Found {
  Floats loss, slope;
};

// What should be absent costs weight * p^gamma * -log(1 - p), where p is the sigmoid.
inline Found absent(Floats logits, float weight, float gamma) {
  auto positive = logits > 0.0f;
  Floats e = exponential(positive ? -logits : logits);
  Floats log = log_of_one_and(e);
  Floats surprise = (positive ? logits : Floats{}) + log; // -log(1 - p)
  Floats factor = weight * exponential(gamma * ((positive ? Floats{} : logits) - log));
  Floats part = 1.0f / (1.0f + e);
  Floats p = positive ? part : e * part, rest = positive ? e * part : part;
  return {factor * surprise, factor * (gamma * rest * surprise + p)};
}

// Rows that do not count cost nothing; a class below 0 is none. Writes the gradient to `slopes`,
// and REFUSED to `total`, alone, if a class is none of the logits'.
template <class T>
void focal(const T* logits, const std::int64_t* classes, const bool* counted, T* slopes,
           double* total, float alpha, float gamma, Size rows, Size width, Size threads) {
  if (std::any_of(classes, classes + rows, [=](std::int64_t found) { return found >= width; })) {
    *total = REFUSED;
    return;
  }
  Shares shares(rows * width, width, threads);
  std::vector<double> totals(shares.parts);
  shares.run([&](Size part, Size start, Size end) {
    Size row = start / width, last = end / width;
    while (row < last) {
      Floats sum{};
      for (Size stop = std::min(last, row + ROWS); row < stop; ++row) {
        const T* given = logits + row * width;
        T* slope = slopes + row * width;
        if (!counted[row]) {
          std::fill(slope, slope + width, T{});
          continue;
        }
        Size at = 0;
        for (; at + LANES <= width; at += LANES) {
          Found found = absent(load(given + at), 1 - alpha, gamma);
          sum += found.loss;
          store(slope + at, found.slope);
        }
        if (at < width) {
          Found found = absent(load_some(given + at, width - at), 1 - alpha, gamma);
          store_some(slope + at, found.slope, width - at);
          for (Size lane = 0; lane < width - at; ++lane) sum[lane] += found.loss[lane];
        }
        if (classes[row] >= 0) {
          Floats logit = load_some(given + classes[row], 1);
          Found missed = absent(-logit, alpha, gamma);
          sum[0] += missed.loss[0] - absent(logit, 1 - alpha, gamma).loss[0];
          store_some(slope + classes[row], -missed.slope, 1);
        }
      }
      for (Size lane = 0; lane < LANES; ++lane) totals[part] += sum[lane];
    }
  });
  *total = 0;
  for (double part : totals) *total += part;
}

} // namespace

#define FOCAL(NAME, TYPE)                                                                          \
  void focal_##NAME(const void* logits, const std::int64_t* classes, const bool* counted,          \
                    void* slopes, double* total, double alpha, double gamma, Size rows,            \
                    Size width, Size threads) {                                                    \
    focal<TYPE>((const TYPE*)logits, classes, counted, (TYPE*)slopes, total, (float)alpha,         \
                (float)gamma, rows, width, threads);                                               \
  }

extern "C" {
FOCAL(float32, float)
FOCAL(bfloat16, Bfloat16)
}
