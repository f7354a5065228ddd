// A codebook in bf16 or fp16 whose rounding does not bias the product.
//
// Rounding each of the 16 levels to nearest gives all weights of a level the same error, so the errors do not average
// out over a row: with x of mean one sigma the output of NF4 is 2.06 % off, that of dense bf16 0.26 %.
//
// What may be chosen     a factor that multiplies the levels before they are rounded and divides the scales; for each
//                        level, which of its two neighbours it rounds to; a factor of the scales alone
// What is made small     for Gaussian weights of sigma = absmax / width, in the worst of several widths (a heavy-tailed
//                        block is wide): the mean error, which multiplies the sum of x, and the slope of the error
//                        against the weight, which scales the output
// How                    tries 64 factors, each with up to four levels rounded the other way
// What comes out         NF4 in bf16 has mean 1.9e-5 of absmax and slope 9e-5; INT4 and FP4 become exact
// What is not searched   levels that T holds exactly, as E2M1 and whole numbers are: they stay, with a scale of 1
//
// CUDA's linear_dgrad in fp16 rounds level * scale to T once more. That adds no mean error, except for a level whose
// significand is all ones: level * scale is half to one ulp short of scale times a power of two, and always rounds up
// to that. So no level gets such a significand.
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

float to_float(Int13 a) { return float(whole_number(a)) * 0x1p-12f; }
template <class T>
T rounded(float a) {
  if constexpr (!std::is_same_v<T, Int13>) return from_float<T>(a);
  const float magnitude = std::fmin(std::nearbyint(std::fabs(a) * 0x1p12f), 8191.f);  // of NaN too
  return T{uint16_t(uint16_t(magnitude) | (std::signbit(a) ? 0x8000 : 0))};
}

constexpr int kFactors = 64, kFlips = 4;
constexpr double kWidths[] = {0.8, 1.5, 2.0, 2.4, 2.8, 3.3, 4.0, 6.0};
constexpr int kWidthCount = int(std::size(kWidths));
constexpr double kMeanWeight = 60, kSlopeWeight = 3;  // against the errors' RMS over the levels

using Levels = std::array<double, kLevels>;

// The share of each level among Gaussian weights of that width; levels ascend.
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

// The errors of a rounded codebook for weights of each width. All sums are linear in the values of the levels, so that
// one level can change without the others being summed again.
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

// The T on the other side of `exact` from `rounded`.
template <class T>
float other_neighbour(float exact, T rounded) {
  const float value = to_float(rounded);
  if (exact == value) return value;
  const bool away_from_zero = std::fabs(exact) > std::fabs(value);
  return to_float(T{uint16_t(away_from_zero ? rounded.bits + 1 : rounded.bits - 1)});
}

bool is_all_ones(float value) { return (from_float<Float16>(value).bits & Float16::kFraction) == Float16::kFraction; }

template <class T>
struct Search {
  Levels levels;  // ascending
  std::array<Levels, kWidthCount> share;
  std::array<double, kWidthCount> power{};
  std::array<float, kLevels> values, best;  // levels times the factor, rounded: of this candidate and of the best
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
      const T nearest = rounded<T>(exact);
      values[i] = to_float(nearest);
      other[i] = other_neighbour(exact, nearest);
      seen.add(share, power, i, levels[i], levels[i], values[i] / double(factor));
    }
    for (int w = 0; w < kWidthCount; ++w) seen.slope[w] += 1;  // of the exact levels, from which it was counted
    flip_from(0, kFlips, factor, other, seen);
  }

  // Tries this candidate, and all that round up to `flips` of the levels from `first` on the other way.
  void flip_from(int first, int flips, float factor, const std::array<float, kLevels>& other, const Seen& seen) {
    const double cost = seen.cost();
    constexpr bool kIsScaled = std::is_same_v<T, Float16>;
    if (cost < least && !(kIsScaled && std::any_of(values.begin(), values.end(), is_all_ones))) {
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
  bool is_exact = true;
  for (int i = 0; i < kLevels; ++i) {
    result.levels[i] = rounded<T>(code[i]);
    is_exact = is_exact && to_float(result.levels[i]) == code[i];
  }
  const bool is_finite = std::all_of(code, code + kLevels, [](float level) { return std::isfinite(level); });
  if (!is_finite && std::is_same_v<T, Int13>) result.scale = NAN;
  if (is_exact || !is_finite) return result;
  // Levels beyond [-1, 1] are divided by a power of two, and the scale multiplied by it.
  float largest = 1, within[kLevels];
  for (int i = 0; i < kLevels; ++i) largest = std::max(largest, std::fabs(code[i]));
  int exponent = 0;
  if (largest > 1) std::frexp(largest, &exponent);
  for (int i = 0; i < kLevels; ++i) within[i] = std::ldexp(code[i], -exponent);
  const Search<T> found(within);
  result.scale = float(std::ldexp(found.best_scale, exponent));
  for (int i = 0; i < kLevels; ++i) {
    const auto at =
        std::lower_bound(found.levels.begin(), found.levels.end(), double(within[i])) - found.levels.begin();
    result.levels[i] = rounded<T>(found.best[size_t(at)]);
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
template RoundedCode<Int13> rounded_code(const float code[kLevels]);

}  // namespace nf4
