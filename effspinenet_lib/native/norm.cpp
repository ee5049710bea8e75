// Batch norm in training, and the swish after it if there is one.
//
// torch computes the two one after the other, and keeps what lies between them for the gradient;
// here it is computed anew where it is needed.

#include <cmath>

#include "vectors.h"

namespace {

inline Floats sigmoid(Floats values) { return 1.0f / (1.0f + exponential(-values)); }

template <bool swish> inline Floats activate(Floats normed) {
  return swish ? normed * sigmoid(normed) : normed;
}

// What a gradient by the activation's result is by its input.
template <bool swish> inline Floats back(Floats gradient, Floats normed) {
  if (!swish) return gradient;
  Floats gate = sigmoid(normed);
  return gradient * gate * (1.0f + normed * (1.0f - gate));
}

struct Moments {
  double rows = 0;
  std::vector<double> means, squares; // squares: of the distances from the mean, summed
  explicit Moments(Size channels) : means(channels), squares(channels) {}
  void join(double other_rows, const double* other_means, const double* other_squares) {
    if (other_rows == 0) return;
    double all = rows + other_rows;
    for (std::size_t channel = 0; channel < means.size(); ++channel) {
      double distance = other_means[channel] - means[channel];
      squares[channel] += other_squares[channel] + distance * distance * rows * other_rows / all;
      means[channel] += distance * other_rows / all;
    }
    rows = all;
  }
};

template <class T>
void add_moments(const T* features, Size start, Size end, Size channels, Moments& moments) {
  Size period = period_of(channels);
  Size block = block_of(period);
  Sums sums(channels);
  float* sum = sums.at();
  std::vector<double> means(channels), squares(channels);
  std::vector<float> centres(channels);
  for (; start < end; start += block) {
    Size stop = std::min(end, start + block);
    double rows = double(stop - start) / channels;
    std::fill(means.begin(), means.end(), 0.0);
    std::fill(squares.begin(), squares.end(), 0.0);
    sweep(
        start, stop, period,
        [=](Size at, Size i) { store(sum + i, load(sum + i) + load(features + at)); },
        [=](Size at, Size i, Size number) {
          store(sum + i, load(sum + i) + load_some(features + at, number));
        });
    sums.add_to(means.data());
    for (Size channel = 0; channel < channels; ++channel)
      means[channel] = centres[channel] = float(means[channel] / rows);
    Repeated repeated(centres.data(), channels);
    const float* centre = repeated.at();
    sweep(
        start, stop, period,
        [=](Size at, Size i) {
          Floats distance = load(features + at) - load(centre + i);
          store(sum + i, load(sum + i) + distance * distance);
        },
        [=](Size at, Size i, Size number) {
          Floats distance = load_some(features + at, number) - load_some(centre + i, number);
          store(sum + i, load(sum + i) + distance * distance);
        });
    sums.add_to(squares.data());
    moments.join(rows, means.data(), squares.data());
  }
}

// What the backward pass needs of the forward pass: four numbers a channel.
struct Kept {
  float *scale, *shift, *mean, *inverse;
  Kept(float* room, Size channels)
      : scale(room),
        shift(room + channels),
        mean(room + 2 * channels),
        inverse(room + 3 * channels) {}
};

template <class T, bool swish>
void forward(const T* features, const float* weight, const float* bias, float* running_mean,
             float* running_variance, double momentum, double epsilon, T* result, float* room,
             Size count, Size channels, Size threads) {
  Shares shares(count, period_of(channels), threads);
  std::vector<Moments> found(shares.parts, Moments(channels));
  shares.run([&](Size part, Size start, Size end) {
    add_moments(features, start, end, channels, found[part]);
  });
  Moments& all = found[0];
  for (Size part = 1; part < shares.parts; ++part)
    all.join(found[part].rows, found[part].means.data(), found[part].squares.data());
  Kept kept(room, channels);
  for (Size channel = 0; channel < channels; ++channel) {
    double mean = all.means[channel], squares = all.squares[channel];
    double inverse = 1 / std::sqrt(squares / all.rows + epsilon);
    kept.mean[channel] = float(mean);
    kept.inverse[channel] = float(inverse);
    kept.scale[channel] = float(weight[channel] * inverse);
    kept.shift[channel] = float(bias[channel] - weight[channel] * inverse * mean);
    float& old_mean = running_mean[channel];
    float& old_variance = running_variance[channel];
    old_mean = float(old_mean + momentum * (mean - old_mean));
    old_variance = float(old_variance + momentum * (squares / (all.rows - 1) - old_variance));
  }
  Repeated scales(kept.scale, channels), shifts(kept.shift, channels);
  const float *scale = scales.at(), *shift = shifts.at();
  auto compute = [=](Floats values, Size i) {
    return activate<swish>(values * load(scale + i) + load(shift + i));
  };
  shares.run([&](Size, Size start, Size end) {
    sweep(
        start, end, shares.period,
        [=](Size at, Size i) { store(result + at, compute(load(features + at), i)); },
        [=](Size at, Size i, Size number) {
          store_some(result + at, compute(load_some(features + at, number), i), number);
        });
  });
}

// The gradient past the activation is written to `by_features` on the way, for the second sweep.
template <class T, bool swish>
void backward(const T* features, const T* gradient, float* room, T* by_features, float* by_weight,
              float* by_bias, Size count, Size channels, Size threads) {
  Shares shares(count, period_of(channels), threads);
  Kept kept(room, channels);
  Repeated scales(kept.scale, channels), shifts(kept.shift, channels), means(kept.mean, channels);
  const float *scale = scales.at(), *shift = shifts.at(), *mean = means.at();
  std::vector<std::vector<double>> totals(shares.parts, std::vector<double>(2 * channels));
  shares.run([&](Size part, Size start, Size end) {
    Sums plain(channels), weighted(channels);
    float *sum = plain.at(), *weighted_sum = weighted.at();
    auto add = [=](Floats values, Floats upper, Size i) {
      Floats slope = back<swish>(upper, values * load(scale + i) + load(shift + i));
      store(sum + i, load(sum + i) + slope);
      store(weighted_sum + i, load(weighted_sum + i) + slope * (values - load(mean + i)));
      return slope;
    };
    for (Size block = shares.block(); start < end; start += block) {
      sweep(
          start, std::min(end, start + block), shares.period,
          [=](Size at, Size i) {
            Floats slope = add(load(features + at), load(gradient + at), i);
            if (swish) store(by_features + at, slope);
          },
          [=](Size at, Size i, Size number) {
            Floats values = load_some(features + at, number);
            Floats slope = add(values, load_some(gradient + at, number), i);
            if (swish) store_some(by_features + at, slope, number);
          });
      plain.add_to(totals[part].data());
      weighted.add_to(totals[part].data() + channels);
    }
  });
  double rows = double(count) / channels;
  std::vector<float> tilts(channels), offsets(channels);
  for (Size channel = 0; channel < channels; ++channel) {
    double sum = 0, weighted_sum = 0;
    for (const std::vector<double>& part : totals) {
      sum += part[channel];
      weighted_sum += part[channels + channel];
    }
    double inverse = kept.inverse[channel];
    by_bias[channel] = float(sum);
    by_weight[channel] = float(weighted_sum * inverse);
    double tilt = kept.scale[channel] * inverse * inverse * weighted_sum / rows;
    tilts[channel] = float(tilt);
    offsets[channel] = float(kept.scale[channel] * sum / rows - tilt * kept.mean[channel]);
  }
  Repeated repeated_tilts(tilts.data(), channels), repeated_offsets(offsets.data(), channels);
  const float *tilt = repeated_tilts.at(), *offset = repeated_offsets.at();
  const T* slopes = swish ? by_features : gradient;
  auto compute = [=](Floats values, Floats slope, Size i) {
    return load(scale + i) * slope - load(tilt + i) * values - load(offset + i);
  };
  shares.run([&](Size, Size start, Size end) {
    sweep(
        start, end, shares.period,
        [=](Size at, Size i) {
          store(by_features + at, compute(load(features + at), load(slopes + at), i));
        },
        [=](Size at, Size i, Size number) {
          Floats values = load_some(features + at, number);
          Floats slope = load_some(slopes + at, number);
          store_some(by_features + at, compute(values, slope, i), number);
        });
  });
}

} // namespace

#define NORM(NAME, TYPE, SWISH)                                                                    \
  void forward_##NAME(const void* features, const float* weight, const float* bias,                \
                      float* running_mean, float* running_variance, void* result, float* kept,     \
                      double momentum, double epsilon, Size count, Size channels, Size threads) {  \
    forward<TYPE, SWISH>((const TYPE*)features, weight, bias, running_mean, running_variance,      \
                         momentum, epsilon, (TYPE*)result, kept, count, channels, threads);        \
  }                                                                                                \
  void backward_##NAME(const void* features, const void* gradient, float* kept,                    \
                       void* by_features, float* by_weight, float* by_bias, Size count,            \
                       Size channels, Size threads) {                                              \
    backward<TYPE, SWISH>((const TYPE*)features, (const TYPE*)gradient, kept, (TYPE*)by_features,  \
                          by_weight, by_bias, count, channels, threads);                           \
  }

extern "C" {
NORM(float32, float, false)
NORM(float32_swish, float, true)
NORM(bfloat16, Bfloat16, false)
NORM(bfloat16_swish, Bfloat16, true)
}
