// A codebook in bf16 or fp16 whose rounding does not bias the product.
//
// Rounding the 16 levels by nearest gives each an error that all weights of that level share, so that the errors do not
// average out over a row: with x of mean one sigma NF4's nearest roundings put 2.06 % on the output, dense bf16 0.26 %.
// Three things are free: the factor by which levels are multiplied first and scales divided in the end, which neighbour
// a level is rounded to, and the factor of the scales alone. Out of 64 factors and up to four levels rounded the other
// way, those are taken that keep small what Gaussian weights of sigma = absmax / width see, the worst of several widths
// (a heavy-tailed block is wide): the mean error, which multiplies the sum of x, and the slope of the error on the
// weight, which scales the output. NF4 in bf16: mean 1.9e-5 of absmax and slope 9e-5. INT4 and FP4 become exact.
// linear_dgrad on CUDA, in fp16, rounds level * scale to T once more. That has no mean error, but for a significand of all
// ones, whose product falls short of the scale by half to one ulp and always rounds to the whole one: no level gets it.
#include "rounded_code.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <mutex>
#include <type_traits>
#include <vector>

#include "element.h"

namespace nf4 {
namespace {

constexpr int kFactors = 64, kFlips = 4;
constexpr double kWidths[] = {0.8, 1.5, 2.0, 2.4, 2.8, 3.3, 4.0, 6.0};
constexpr int kWidthCount = int(std::size(kWidths));
constexpr double kMeanWeight = 60, kSlopeWeight = 3;  // against the errors' RMS over the levels

using Levels = std::array<double, kLevels>;

// The share of each level among weights of that width; levels ascend.
Levels occupancy(const Levels& levels, double width) {
  const auto below = [&](double a) { return 0.5 * std::erfc(-width * a / std::sqrt(2.0)); };
  const double low = below(-1), inside = 1 - 2 * low;
  Levels share;
  for (int i = 0; i < kLevels; ++i) {
    const double from = i == 0 ? low : below((levels[i - 1] + levels[i]) / 2);
    const double to = i == kLevels - 1 ? 1 - low : below((levels[i] + levels[i + 1]) / 2);
    share[i] = (to - from) / inside;
  }
  return share;
}

// What the weights of each width see of a rounded codebook. All sums are linear in the levels' values.
struct Seen {
  double mean[kWidthCount] = {};   // of rounded / factor - level
  double slope[kWidthCount] = {};  // of rounded / factor on level
  double square = 0;               // sum over the levels of (rounded / factor - level)^2

  void add(const std::array<Levels, kWidthCount>& share, const std::array<double, kWidthCount>& power, int i,
           double level, double from, double to) {  // level i's value changes
    for (int w = 0; w < kWidthCount; ++w) {
      mean[w] += share[w][i] * (to - from);
      slope[w] += share[w][i] * level * (to - from) / power[w];
    }
    square += (to - level) * (to - level) - (from - level) * (from - level);
  }
  double scale() const {  // puts the slopes' middle at 1
    return 2 / (*std::min_element(slope, slope + kWidthCount) + *std::max_element(slope, slope + kWidthCount));
  }
  double cost() const {
    double bias = 0;
    for (double m : mean) bias = std::max(bias, std::fabs(m));
    const double tilt = *std::max_element(slope, slope + kWidthCount) * scale() - 1;
    return std::sqrt(std::max(square, 0.0) / kLevels) + kMeanWeight * bias + kSlopeWeight * tilt;
  }
};

// The T next to `rounded` on the other side of `exact`.
template <class T>
float other_neighbour(float exact, T rounded) {
  const float value = to_float(rounded);
  if (exact == value) return value;
  const bool away_from_zero = std::fabs(exact) > std::fabs(value);
  return to_float(T{uint16_t(away_from_zero ? rounded.bits + 1 : rounded.bits - 1)});
}

template <class T>
bool is_all_ones(float value) {
  return (from_float<T>(value).bits & T::kFraction) == T::kFraction;
}

template <class T>
struct Search {
  Levels levels;  // ascending
  std::array<Levels, kWidthCount> share;
  std::array<double, kWidthCount> power{};
  std::array<float, kLevels> values, best;  // the present candidate's and the best one's levels times the factor
  double least = INFINITY, best_scale = 1;

  explicit Search(const float code[kLevels]) {
    std::copy(code, code + kLevels, levels.begin());
    std::sort(levels.begin(), levels.end());
    for (int w = 0; w < kWidthCount; ++w) {
      share[w] = occupancy(levels, kWidths[w]);
      for (int i = 0; i < kLevels; ++i) power[w] += share[w][i] * levels[i] * levels[i];
    }
    std::copy(levels.begin(), levels.end(), best.begin());
    for (int f = 0; f < kFactors; ++f) try_factor(1 + float(f) / kFactors);
  }

  void try_factor(float factor) {
    std::array<float, kLevels> other;
    Seen seen;
    for (int i = 0; i < kLevels; ++i) {
      const float exact = float(levels[i]) * factor;
      const T rounded = from_float<T>(exact);
      values[i] = to_float(rounded);
      other[i] = other_neighbour(exact, rounded);
      seen.add(share, power, i, levels[i], levels[i], values[i] / double(factor));
    }
    for (int w = 0; w < kWidthCount; ++w) seen.slope[w] += 1;  // of the exact levels, from which it was counted
    flip_from(0, kFlips, factor, other, seen);
  }

  // Offers this candidate, and all that round up to `flips` of the levels from `first` on the other way.
  void flip_from(int first, int flips, float factor, const std::array<float, kLevels>& other, const Seen& seen) {
    const double cost = seen.cost();
    constexpr bool kIsScaled = std::is_same_v<T, Float16>;
    if (cost < least && !(kIsScaled && std::any_of(values.begin(), values.end(), is_all_ones<T>))) {
      least = cost;
      best = values;
      best_scale = seen.scale() / factor;
    }
    for (int i = first; flips > 0 && i < kLevels; ++i) {
      if (values[i] == other[i]) continue;
      const float nearest = values[i];
      Seen flipped = seen;
      flipped.add(share, power, i, levels[i], nearest / double(factor), other[i] / double(factor));
      values[i] = other[i];
      flip_from(i + 1, flips - 1, factor, other, flipped);
      values[i] = nearest;
    }
  }
};

template <class T>
RoundedCode<T> search(const float code[kLevels]) {
  RoundedCode<T> result;
  result.scale = 1;
  for (int i = 0; i < kLevels; ++i) result.levels[i] = from_float<T>(code[i]);
  if (!std::all_of(code, code + kLevels, [](float level) { return std::isfinite(level); })) return result;
  const Search<T> found(code);
  result.scale = float(found.best_scale);
  for (int i = 0; i < kLevels; ++i) {
    const auto at = std::lower_bound(found.levels.begin(), found.levels.end(), double(code[i])) - found.levels.begin();
    result.levels[i] = from_float<T>(found.best[size_t(at)]);
  }
  return result;
}

template <class T>
struct Found {
  float code[kLevels];
  RoundedCode<T> rounded;
};

}  // namespace

template <class T>
RoundedCode<T> rounded_code(const float code[kLevels]) {
  constexpr size_t kMost = 256;
  static std::mutex mutex;
  static std::vector<Found<T>> cache;  // a search takes 2 ms
  static size_t oldest = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Found<T>& found : cache)
    if (std::memcmp(found.code, code, sizeof found.code) == 0) return found.rounded;
  Found<T> found;
  found.rounded = search<T>(code);
  std::memcpy(found.code, code, sizeof found.code);
  if (cache.size() < kMost)
    cache.push_back(found);
  else
    cache[oldest++ % kMost] = found;
  return found.rounded;
}

template RoundedCode<BFloat16> rounded_code(const float code[kLevels]);
template RoundedCode<Float16> rounded_code(const float code[kLevels]);

}  // namespace nf4
