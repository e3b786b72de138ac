#include <algorithm>
#include <vector>

#include "engines.h"

namespace torch_ext {
namespace {

/// Moves nothing, and says that it moved everything. What remains is the
/// library's own cost.
class NullEngine final : public IoEngine {
 public:
  explicit NullEngine(std::size_t depth) : depth_(depth) {
    done_.reserve(depth);
  }

  std::string_view name() const noexcept override { return "null"; }
  std::size_t depth() const noexcept override { return depth_; }

  std::size_t submit(std::span<const IoRequest> batch) override {
    batch = batch.first(std::min(batch.size(), depth_ - done_.size()));
    for (const IoRequest& request : batch) {
      const bool moves = request.op != IoRequest::Op::kSync;
      const std::size_t length =
          std::min(request.length, IoRequest::kMaxTransfer);
      done_.push_back(
          {request.cookie, moves ? static_cast<std::int64_t>(length) : 0});
    }
    return batch.size();
  }

  std::size_t poll(std::span<IoCompletion> out, std::size_t,
                   std::chrono::nanoseconds) override {
    const std::size_t count = std::min(out.size(), done_.size());
    const auto end = done_.begin() + static_cast<std::ptrdiff_t>(count);
    std::copy(done_.begin(), end, out.begin());
    done_.erase(done_.begin(), end);
    return count;
  }

  void wake() noexcept override {}

 private:
  const std::size_t depth_;
  std::vector<IoCompletion> done_;
};

}  // namespace

std::unique_ptr<IoEngine> make_null_engine(int depth) {
  return std::make_unique<NullEngine>(static_cast<std::size_t>(depth));
}

}  // namespace torch_ext
