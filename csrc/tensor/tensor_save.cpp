// A dict of tensors becomes a safetensors file.
//
// The header has the order of the caller. The data have the dtypes with the
// largest elements first, and begin at a multiple of the granule, so each
// tensor lies at a multiple of its element's size.
//
// The file is written once, from front to back, in ranges of whole granules:
//
// - The whole granules of a large, contiguous tensor are one range. It goes to
//   the FileTransfer as it is: direct I/O takes the tensor's own memory where
//   that is aligned, and page-locked buffers elsewhere.
// - All else is put together in packs: the header, small tensors, the edges of
//   large ones, and tensors that are not contiguous, piece by piece.
//
// So neighbours share granules, but no range writes to another's, and only the
// last bytes of the file may go through the page cache. There are a few packs,
// which are used again when their bytes are written.

#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <tuple>

#include "file_dtypes.h"
#include "file_transfers.h"
#include "plain_modes.h"
#include "tensor_check.h"
#include "torch_ext/base/align.h"
#include "torch_ext/io/new_file.h"
#include "torch_ext/swap/safetensors.h"
#include "torch_ext/tensor/tensor_file.h"
#include "torch_ext/tensor/tensor_file_transfer.h"

namespace torch_ext {
namespace {

/// Where the data begin in the file. Files are moved between file systems, so
/// it does not depend on this one.
constexpr std::uint64_t kDataAlignment = 4096;
/// Ranges of tensors from here on are not put into packs, in bytes.
constexpr std::uint64_t kLarge = std::uint64_t{1} << 20;
constexpr std::uint64_t kPackBytes = std::uint64_t{4} << 20;
constexpr std::size_t kPacks = 4;
/// Ranges that are waited for together.
constexpr std::size_t kMostInFlight = 64;

std::string in_quotes(const std::string& name) {
  std::string shown = name.substr(0, 200);
  std::ranges::replace(shown, '\0', ' ');  // It would end the message.
  return "tensor '" + shown + "'";
}

void check_tensor(const std::string& name, const at::Tensor& tensor) {
  check_has_plain_memory(tensor, "save: " + in_quotes(name));
  if (!file_dtype_of(tensor.scalar_type())) {
    throw TypeError("save: " + in_quotes(name) + " has the dtype " +
                    c10::toString(tensor.scalar_type()) +
                    ", which safetensors has not: convert it, as with "
                    "torch.view_as_real() or .to()");
  }
  if (packed_in_one(tensor.scalar_type()) > 1 && tensor.dim() == 0) {
    throw TypeError("save: " + in_quotes(name) +
                    " is a pair of 4-bit numbers without a dimension that "
                    "could count two: reshape it to (1,)");
  }
}

/// Throws if two tensors share memory, which a file would lose.
void check_apart(const NamedTensors& tensors) {
  struct Range {
    c10::Device device;
    const std::byte* begin;
    const std::byte* end;
    const std::string* name;
  };
  std::vector<Range> ranges;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.numel() == 0) continue;
    const auto* begin = static_cast<const std::byte*>(tensor.const_data_ptr());
    const std::uint64_t reach =
        end_in_storage(tensor) -
        static_cast<std::uint64_t>(tensor.storage_offset()) * tensor.itemsize();
    ranges.push_back({tensor.device(), begin, begin + reach, &name});
  }
  std::ranges::sort(ranges, {}, [](const Range& range) {
    return std::tuple(range.device.type(), range.device.index(), range.begin);
  });
  const Range* last = nullptr;  // The one that reaches farthest.
  for (const Range& range : ranges) {
    const bool same_device = last != nullptr && last->device == range.device;
    if (same_device && range.begin < last->end) {
      throw std::invalid_argument(
          "save: " + in_quotes(*last->name) + " and " + in_quotes(*range.name) +
          " share memory (tied weights?), and a safetensors file cannot say "
          "so: leave one out and tie it again after load(), or save a .clone() "
          "of it");
    }
    if (!same_device || range.end > last->end) last = &range;
  }
}

/// The elements as bytes, of a tensor that is contiguous and neither lazily
/// conjugate nor negative.
at::Tensor bytes_of(const at::Tensor& tensor) {
  // view() would keep the stride of a single element, whatever it is.
  return tensor.as_strided({tensor.numel()}, {1}).view(at::kByte);
}

bool is_packed(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

/// The file's ranges, in the order of the file.
class Writer {
 public:
  Writer(const NewFile& file, std::uint64_t size,
         const TensorFileOptions& options)
      : file_(file.file()),
        options_(options),
        granule_(file_.granule()),
        pack_bytes_(align_up(std::min(size, kPackBytes), granule_)),
        transfer_(transfer_options(options)) {}

  void add_text(const std::string& text) {
    add_bytes(
        at::from_blob(const_cast<char*>(text.data()),
                      {static_cast<std::int64_t>(text.size())},
                      at::TensorOptions().dtype(at::kByte).device(at::kCPU)));
  }

  void add(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return;
    if (is_packed(tensor)) {
      add_packed(bytes_of(tensor));
    } else {
      add_strided(tensor);
    }
  }

  /// Waits until all is written.
  void finish() {
    write_pack();
    for (Pack& pack : packs_) wait_for_pack(pack);
    while (!in_flight_.empty()) wait_for_oldest();
    transfer_.close();
  }

 private:
  struct Pack {
    at::Tensor memory;
    std::optional<TensorTicket> ticket;
  };

  void add_packed(const at::Tensor& bytes) {
    const auto size = static_cast<std::uint64_t>(bytes.numel());
    const std::uint64_t begin = position();
    const std::uint64_t first = align_up(begin, granule_);
    const std::uint64_t last = align_down(begin + size, granule_);
    if (first + kLarge > last) {
      add_bytes(bytes);
      return;
    }
    add_bytes(part(bytes, 0, first - begin));
    write_pack();
    if (in_flight_.size() == kMostInFlight) wait_for_oldest();
    in_flight_.push_back(transfer_.write(
        file_.fd(), first, part(bytes, first - begin, last - first)));
    begin_ = last;
    add_bytes(part(bytes, last - begin, begin + size - last));
  }

  /// Adds the elements of any tensor, in pieces that are packed one by one.
  void add_strided(const at::Tensor& tensor) {
    if (static_cast<std::uint64_t>(tensor.nbytes()) <= kPackBytes) {
      add_bytes(bytes_of(tensor.resolve_conj().resolve_neg().contiguous()));
      return;
    }
    std::int64_t dim = 0;
    while (tensor.size(dim) == 1) ++dim;
    const std::int64_t half = tensor.size(dim) / 2;
    add_strided(tensor.narrow(dim, 0, half));
    add_strided(tensor.narrow(dim, half, tensor.size(dim) - half));
  }

  void add_bytes(const at::Tensor& bytes) {
    const auto size = static_cast<std::uint64_t>(bytes.numel());
    for (std::uint64_t done = 0; done < size;) {
      if (filled_ == pack_bytes_) write_pack();
      if (filled_ == 0) open_pack();
      const std::uint64_t length = std::min(size - done, pack_bytes_ - filled_);
      const at::Tensor to = part(packs_[next_].memory, filled_, length);
      const at::Tensor from = part(bytes, done, length);
      if (from.is_cpu()) {
        std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), length);
      } else {
        to.copy_(from);
      }
      filled_ += length;
      done += length;
    }
  }

  void open_pack() {
    Pack& pack = packs_[next_];
    wait_for_pack(pack);
    if (!pack.memory.defined()) {
      pack.memory =
          pinned_zeros(static_cast<std::int64_t>(pack_bytes_), at::kByte);
    }
  }

  void write_pack() {
    if (filled_ == 0) return;
    Pack& pack = packs_[next_];
    pack.ticket =
        transfer_.write(file_.fd(), begin_, part(pack.memory, 0, filled_));
    begin_ += std::exchange(filled_, 0);
    next_ = (next_ + 1) % packs_.size();
  }

  void wait_for_pack(Pack& pack) {
    if (pack.ticket) wait_for(*pack.ticket, options_);
    pack.ticket.reset();
  }

  void wait_for_oldest() {
    wait_for(in_flight_.front(), options_);
    in_flight_.pop_front();
  }

  std::uint64_t position() const { return begin_ + filled_; }

  static at::Tensor part(const at::Tensor& bytes, std::uint64_t begin,
                         std::uint64_t length) {
    return bytes.narrow(0, static_cast<std::int64_t>(begin),
                        static_cast<std::int64_t>(length));
  }

  const File& file_;
  const TensorFileOptions& options_;
  const std::uint64_t granule_;
  const std::uint64_t pack_bytes_;
  std::array<Pack, kPacks> packs_;
  std::size_t next_ = 0;      ///< The pack that is filled.
  std::uint64_t filled_ = 0;  ///< Bytes in it.
  std::uint64_t begin_ = 0;   ///< Where it begins in the file.
  std::deque<TensorTicket> in_flight_;
  TensorFileTransfer transfer_;  // Last: its end waits for what stands above.
};

/// Gives each tensor its place. Returns the numbers of the tensors in the order
/// of the data.
std::vector<std::size_t> lay_out(const NamedTensors& tensors,
                                 SafetensorsHeader& header) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater<>(), [&](std::size_t i) {
    return tensors[i].second.itemsize();
  });
  header.tensors.resize(tensors.size());
  std::uint64_t end = 0;
  for (const std::size_t i : order) {
    const auto& [name, tensor] = tensors[i];
    SafetensorsHeader::Tensor& entry = header.tensors[i];
    entry.name = name;
    entry.dtype = *file_dtype_of(tensor.scalar_type());
    entry.shape.assign(tensor.sizes().begin(), tensor.sizes().end());
    if (!entry.shape.empty()) {
      entry.shape.back() *= packed_in_one(tensor.scalar_type());
    }
    entry.begin = end;
    end += static_cast<std::uint64_t>(tensor.nbytes());
    entry.end = end;
  }
  return order;
}

}  // namespace

void save_tensors(const std::filesystem::path& path,
                  const NamedTensors& tensors, const FileMetadata& metadata,
                  const TensorFileOptions& options) {
  const PlainModes plain;
  for (const auto& [name, tensor] : tensors) check_tensor(name, tensor);
  check_apart(tensors);
  SafetensorsHeader header;
  header.metadata = metadata;
  const std::vector<std::size_t> order = lay_out(tensors, header);
  const std::string head = encode_safetensors(header, kDataAlignment);
  const std::uint64_t size =
      std::accumulate(header.tensors.begin(), header.tensors.end(), head.size(),
                      [](std::uint64_t sum, const auto& entry) {
                        return sum + (entry.end - entry.begin);
                      });
  NewFile file(path, size);
  naming(file.path(), [&] {
    Writer writer(file, size, options);
    writer.add_text(head);
    for (const std::size_t i : order) writer.add(tensors[i].second.detach());
    writer.finish();
    file.publish();
  });
}

}  // namespace torch_ext
