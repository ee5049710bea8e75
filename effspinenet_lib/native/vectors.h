// Going over channels-last tensors in vectors, on one or more threads.
//
// A tensor is `count` numbers in rows of `channels`. Rows are handled as vectors of LANES numbers:
// what belongs to a channel is repeated until its period is a multiple of LANES, so that any number
// of channels fills the vectors. Vectors are GCC's and Clang's own; the compiler takes them apart
// where the processor's are shorter.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

namespace {

typedef std::int64_t Size;

constexpr Size LANES = 16;             // floats in the widest vectors
constexpr Size SHORTEST_PERIOD = 64;   // floats: below, loops cost more than what is in them
constexpr Size BLOCK = 1 << 14;        // floats: 64 KiB, which stay in the cache between two sweeps
constexpr Size THREAD_SHARE = 1 << 18; // floats: less is not worth a thread

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Bfloat16 {
  std::uint16_t bits;
};

inline Floats load(const float* at) {
  Floats values;
  std::memcpy(&values, at, sizeof values);
  return values;
}

inline Floats load(const Bfloat16* at) {
  Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* at, Floats values) { std::memcpy(at, &values, sizeof values); }

// Rounds to the nearest, ties to even.
inline void store(Bfloat16* at, Floats values) {
  Words words = (Words)values;
  Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  rounded = values == values ? rounded : Words{} + 0x7fc0u;
  Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(at, &halves, sizeof halves);
}

template <class T> inline Floats load_some(const T* at, Size number) {
  T room[LANES] = {};
  std::memcpy(room, at, number * sizeof(T));
  return load(room);
}

template <class T> inline void store_some(T* at, Floats values, Size number) {
  T room[LANES];
  store(room, values);
  std::memcpy(at, room, number * sizeof(T));
}

// To about 1e-7: 2^n times a polynomial of what remains (the coefficients of Cephes' expf).
inline Floats exponential(Floats values) {
  values = values < -80.0f ? Floats{} - 80.0f : values;
  values = values > 80.0f ? Floats{} + 80.0f : values;
  const float rounder = 12582912.0f; // 1.5 * 2^23: added and taken away, it rounds
  Floats power = values * 1.44269504088896341f + rounder - rounder;
  Floats rest = values - power * 0.693359375f + power * 2.12194440e-4f;
  Floats result = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  result = result * rest + 8.3334519073e-3f;
  result = result * rest + 4.1665795894e-2f;
  result = result * rest + 1.6666665459e-1f;
  result = result * rest + 5.0000001201e-1f;
  result = result * rest * rest + rest + 1.0f;
  Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
  return result * (Floats)exponent;
}

Size period_of(Size channels) {
  Size period = std::lcm(channels, LANES);
  return period < SHORTEST_PERIOD ? SHORTEST_PERIOD / period * period : period;
}

Size block_of(Size period) { return std::max(Size(1), BLOCK / period) * period; }

// What belongs to the channels, for every number of a period.
class Repeated {
public:
  Repeated(const float* values, Size channels) : values_(period_of(channels)) {
    for (std::size_t at = 0; at < values_.size(); at += channels)
      std::copy(values, values + channels, values_.begin() + at);
  }
  const float* at() const { return values_.data(); }

private:
  std::vector<float> values_;
};

// Sums over a few rows, for every number of a period.
class Sums {
public:
  explicit Sums(Size channels) : channels_(channels), values_(period_of(channels)) {}
  float* at() { return values_.data(); }
  void add_to(double* totals) {
    for (std::size_t at = 0; at < values_.size(); at += channels_)
      for (Size channel = 0; channel < channels_; ++channel)
        totals[channel] += values_[at + channel];
    std::fill(values_.begin(), values_.end(), 0.0f);
  }

private:
  Size channels_;
  std::vector<float> values_;
};

// Calls whole(at, i) for LANES numbers from `at`, the i-th and so on of their period, and
// some(at, i, number) for the few at the end.
template <class Whole, class Some>
inline void sweep(Size start, Size end, Size period, Whole whole, Some some) {
  Size at = start;
  for (; at + period <= end; at += period)
    for (Size i = 0; i < period; i += LANES) whole(at + i, i);
  for (Size i = 0; at + i < end; i += LANES) {
    Size number = std::min(LANES, end - at - i);
    if (number == LANES)
      whole(at + i, i);
    else
      some(at + i, i, number);
  }
}

// Shares the numbers out between threads, by whole periods; work(part, start, end).
struct Shares {
  Size count, period, parts;
  Shares(Size count, Size period, Size threads) : count(count), period(period) {
    parts = std::max(Size(1), std::min(threads, count / THREAD_SHARE));
  }
  // What a thread sums before it adds to the totals.
  Size block() const { return block_of(period); }
  Size edge(Size part) const {
    return part == parts ? count : count / period * part / parts * period;
  }
  template <class Work> void run(Work work) const {
    std::vector<std::thread> threads;
    for (Size part = 1; part < parts; ++part) {
      try {
        threads.emplace_back(work, part, edge(part), edge(part + 1));
      } catch (const std::system_error&) { // no more threads: this one does it
        work(part, edge(part), edge(part + 1));
      }
    }
    work(0, edge(0), edge(1));
    for (std::thread& thread : threads) thread.join();
  }
};

} // namespace
