#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace torch_ext {

/// Deals slots 0, 1, 2, ... to drives in proportion to their weights, as evenly
/// as whole slots allow. With weights 3 and 1 they go to drives 0 0 1 0, and so
/// on. The method is smooth weighted round-robin: at each slot, every drive
/// gains its weight; the drive that has most gets the slot and pays the sum of
/// the weights. Threads: const members from any.
class StripeMap {
 public:
  /// `weights` >= 1; at least one.
  explicit StripeMap(std::vector<int> weights) {
    const int divisor =
        std::accumulate(weights.begin(), weights.end(), 0,
                        [](int a, int b) { return std::gcd(a, b); });
    for (int& weight : weights) weight /= divisor;
    const int sum = std::accumulate(weights.begin(), weights.end(), 0);
    std::vector<int> credit(weights.size(), 0);
    ranks_.assign(weights.size(), {0});
    for (int slot = 0; slot < sum; ++slot) {
      for (std::size_t i = 0; i < weights.size(); ++i) credit[i] += weights[i];
      const auto most = std::max_element(credit.begin(), credit.end());
      *most -= sum;
      const auto drive = static_cast<std::size_t>(most - credit.begin());
      drives_.push_back(drive);
      for (std::size_t i = 0; i < weights.size(); ++i) {
        ranks_[i].push_back(ranks_[i].back() + (i == drive ? 1 : 0));
      }
    }
  }

  std::size_t drives() const noexcept { return ranks_.size(); }
  /// After how many slots the pattern repeats.
  std::uint64_t period() const noexcept { return drives_.size(); }
  std::size_t drive_of(std::uint64_t slot) const noexcept {
    return drives_[slot % period()];
  }
  /// How many of the slots [first, last) are the drive's.
  std::uint64_t count(std::size_t drive, std::uint64_t first,
                      std::uint64_t last) const noexcept {
    return rank(drive, last) - rank(drive, first);
  }

 private:
  std::uint64_t rank(std::size_t drive, std::uint64_t slot) const noexcept {
    const std::vector<std::uint32_t>& ranks = ranks_[drive];
    return slot / period() * ranks.back() + ranks[slot % period()];
  }

  std::vector<std::size_t> drives_;  ///< By slot of a period.
  /// For each drive, how many slots it has before slot 0, 1, ..., period.
  std::vector<std::vector<std::uint32_t>> ranks_;
};

}  // namespace torch_ext
