// Tensors that are never in memory as a whole become a safetensors file.
//
// A commit has the fields of a parameter side by side in its tiles. In the file
// one field of all parameters comes first, and then the next. To read each tile
// once, the file is written at several places at the same time. A stream is one
// of them: neighbours in the file whose groups ascend. Group by group, all
// streams get the next piece of their tensor in turn, until they have all of
// it.
//
// A stream goes forward only. Its whole granules go to the drive by direct
// I/O, from two packs by turns. A granule at an end of a stream belongs to its
// neighbour too. Such edges are put together in memory, and written last.

#include "tensor_export.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>

#include "file_dtypes.h"
#include "file_transfers.h"
#include "plain_modes.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/new_file.h"
#include "torch_ext/swap/safetensors.h"
#include "torch_ext/tensor/tensor_file_transfer.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kDataAlignment = 4096;  // As save_tensors() has it.
constexpr std::uint64_t kPackBytes = std::uint64_t{4} << 20;
/// Elements of a tensor that are read before it is another one's turn.
constexpr std::uint64_t kPieceElements = std::uint64_t{1} << 18;

/// What all streams share: the file, and the granules at their ends.
class Target {
 public:
  Target(const NewFile& file, std::uint64_t size,
         const TensorFileOptions& options, const ExportProgress& progress)
      : size_(size),
        path_(file.path()),
        file_(file.file()),
        options_(options),
        progress_(progress),
        transfer_(transfer_options(options)) {}

  std::uint64_t granule() const { return file_.granule(); }

  TensorTicket write(std::uint64_t offset, const at::Tensor& bytes) {
    done_ += static_cast<std::uint64_t>(bytes.numel());
    // Whoever reads longer than it writes does not wait for writes.
    if (options_.interrupt) options_.interrupt();
    if (progress_) progress_(done_, size_);
    return naming(path_,
                  [&] { return transfer_.write(file_.fd(), offset, bytes); });
  }

  void wait(std::optional<TensorTicket>& ticket) const {
    if (ticket) naming(path_, [&] { wait_for(*ticket, options_); });
    ticket.reset();
  }

  /// Memory of the granule that begins at `offset`.
  const at::Tensor& edge(std::uint64_t offset) {
    at::Tensor& memory = edges_[offset];
    if (!memory.defined()) {
      memory =
          pinned_zeros(static_cast<std::int64_t>(file_.granule()), at::kByte);
    }
    return memory;
  }

  /// Writes the edges, when all streams are complete.
  void finish() {
    std::deque<std::optional<TensorTicket>> tickets;
    for (const auto& [offset, memory] : edges_) {
      const std::uint64_t bytes = std::min(granule(), size_ - offset);
      tickets.emplace_back(
          write(offset, memory.narrow(0, 0, static_cast<std::int64_t>(bytes))));
      if (tickets.size() < kMostInFlight) continue;
      wait(tickets.front());
      tickets.pop_front();
    }
    for (auto& ticket : tickets) wait(ticket);
    naming(path_, [&] { transfer_.close(); });
  }

 private:
  static constexpr std::size_t kMostInFlight = 32;

  const std::uint64_t size_;
  const std::string& path_;  ///< What errors of writing name.
  const File& file_;
  const TensorFileOptions& options_;
  const ExportProgress& progress_;
  std::uint64_t done_ = 0;
  std::map<std::uint64_t, at::Tensor> edges_;
  TensorFileTransfer transfer_;  // Last: its end waits for what stands above.
};

/// Bytes [begin, end) of the file, written from front to back.
class Stream {
 public:
  Stream(Target& target, std::uint64_t begin, std::uint64_t end)
      : target_(target),
        next_(begin),
        end_(end),
        first_(std::min(align_up(begin, target.granule()), end)),
        last_(std::max(align_down(end, target.granule()), first_)) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// Where the next bytes are to be put, at most `most`. It is not empty as
  /// long as bytes are missing.
  std::span<std::byte> room(std::uint64_t most) {
    if (next_ < first_ || next_ >= last_) {
      const std::uint64_t offset = align_down(next_, target_.granule());
      const std::uint64_t behind = std::min(offset + target_.granule(), end_);
      return part(target_.edge(offset), next_ - offset,
                  std::min(most, behind - next_));
    }
    Pack& pack = packs_[turn_];
    if (filled_ == 0) {
      target_.wait(pack.ticket);
      if (!pack.memory.defined()) {
        const std::uint64_t bytes =
            std::min(align_up(kPackBytes, target_.granule()), last_ - first_);
        pack.memory = pinned_zeros(static_cast<std::int64_t>(bytes), at::kByte);
      }
    }
    const auto bytes = static_cast<std::uint64_t>(pack.memory.numel());
    return part(pack.memory, filled_,
                std::min({most, bytes - filled_, last_ - next_}));
  }

  /// Says that so many bytes are there now.
  void advance(std::uint64_t bytes) {
    const bool in_pack = next_ >= first_ && next_ < last_;
    next_ += bytes;
    if (!in_pack) return;
    Pack& pack = packs_[turn_];
    filled_ += bytes;
    if (filled_ < static_cast<std::uint64_t>(pack.memory.numel()) &&
        next_ < last_) {
      return;
    }
    pack.ticket = target_.write(
        next_ - filled_,
        pack.memory.narrow(0, 0, static_cast<std::int64_t>(filled_)));
    filled_ = 0;
    turn_ = (turn_ + 1) % packs_.size();
  }

  /// Waits until all but the edges is written.
  void finish() {
    for (Pack& pack : packs_) target_.wait(pack.ticket);
  }

 private:
  struct Pack {
    at::Tensor memory;
    std::optional<TensorTicket> ticket;
  };

  static std::span<std::byte> part(const at::Tensor& memory,
                                   std::uint64_t begin, std::uint64_t bytes) {
    return {static_cast<std::byte*>(memory.mutable_data_ptr()) + begin, bytes};
  }

  Target& target_;
  std::uint64_t next_;         ///< Where the next bytes go.
  const std::uint64_t end_;    ///< Behind the last one.
  const std::uint64_t first_;  ///< The whole granules in between.
  const std::uint64_t last_;
  std::array<Pack, 2> packs_;
  std::size_t turn_ = 0;
  std::uint64_t filled_ = 0;  ///< Bytes in the pack whose turn it is.
};

/// A tensor that is on its way into its stream.
struct Source {
  StreamedTensor* tensor = nullptr;
  std::uint64_t count = 0;
  std::uint64_t done = 0;
};

struct Run {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::deque<Source> tensors = {};
};

std::uint64_t elements_of(const StreamedTensor& tensor) {
  std::uint64_t count = 1;
  for (const std::int64_t size : tensor.sizes) {
    if (size < 0 ||
        (size > 0 &&
         count > (std::uint64_t{1} << 56) / static_cast<std::uint64_t>(size))) {
      throw std::invalid_argument("export: tensor '" + tensor.name +
                                  "' has sizes that cannot be");
    }
    count *= static_cast<std::uint64_t>(size);
  }
  return count;
}

SafetensorsHeader lay_out(const std::vector<StreamedTensor>& tensors,
                          const FileMetadata& metadata) {
  SafetensorsHeader header{.tensors = {}, .metadata = metadata};
  std::uint64_t end = 0;
  for (const StreamedTensor& tensor : tensors) {
    const auto dtype = file_dtype_of(tensor.dtype);
    if (!dtype || packed_in_one(tensor.dtype) > 1) {
      throw TypeError("export: tensor '" + tensor.name.substr(0, 200) +
                      "' has the dtype " + c10::toString(tensor.dtype) +
                      ", which safetensors has not");
    }
    SafetensorsHeader::Tensor& entry = header.tensors.emplace_back();
    entry.name = tensor.name;
    entry.dtype = *dtype;
    entry.shape.assign(tensor.sizes.begin(), tensor.sizes.end());
    entry.begin = end;
    end += elements_of(tensor) * c10::elementSize(tensor.dtype);
    entry.end = end;
  }
  return header;
}

/// Cuts the data into runs whose groups ascend.
std::vector<Run> runs_of(std::vector<StreamedTensor>& tensors,
                         const SafetensorsHeader& header, std::uint64_t data) {
  std::vector<Run> runs;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const SafetensorsHeader::Tensor& entry = header.tensors[i];
    if (entry.begin == entry.end) continue;
    const bool goes_on =
        !runs.empty() &&
        runs.back().tensors.back().tensor->group < tensors[i].group;
    if (!goes_on) runs.push_back({.begin = data + entry.begin});
    runs.back().end = data + entry.end;
    runs.back().tensors.push_back({&tensors[i], elements_of(tensors[i])});
  }
  return runs;
}

void add_text(Stream& stream, const std::string& text) {
  for (std::size_t done = 0; done < text.size();) {
    const std::span<std::byte> room = stream.room(text.size() - done);
    std::memcpy(room.data(), text.data() + done, room.size());
    stream.advance(room.size());
    done += room.size();
  }
}

/// Reads the next piece of a tensor. Elements are never cut, since each lies at
/// a multiple of its size.
void add_piece(Stream& stream, Source& source) {
  const std::size_t item = c10::elementSize(source.tensor->dtype);
  std::uint64_t left = std::min(kPieceElements, source.count - source.done);
  while (left > 0) {
    const std::uint64_t count = stream.room(left * item).size() / item;
    const std::span<std::byte> room = stream.room(count * item);
    source.tensor->read(room.data(), source.tensor->dtype, {}, source.done,
                        count);
    stream.advance(room.size());
    source.done += count;
    left -= count;
  }
}

void add_all(std::vector<Run>& runs, std::deque<Stream>& streams) {
  for (;;) {
    const Run* next = nullptr;
    for (const Run& run : runs) {
      if (run.tensors.empty()) continue;
      if (next == nullptr || run.tensors.front().tensor->group <
                                 next->tensors.front().tensor->group) {
        next = &run;
      }
    }
    if (next == nullptr) return;
    const std::uint64_t group = next->tensors.front().tensor->group;
    for (std::size_t i = 0; i < runs.size(); ++i) {
      if (runs[i].tensors.empty()) continue;
      Source& source = runs[i].tensors.front();
      if (source.tensor->group != group) continue;
      add_piece(streams[i], source);
      if (source.done < source.count) continue;
      source.tensor->read = {};  // It may hold memory.
      runs[i].tensors.pop_front();
    }
  }
}

}  // namespace

void export_tensors(const std::filesystem::path& path,
                    std::vector<StreamedTensor> tensors,
                    const FileMetadata& metadata,
                    const TensorFileOptions& options,
                    const ExportProgress& progress) {
  const PlainModes plain;
  std::ranges::stable_sort(tensors, std::greater<>(),
                           [](const StreamedTensor& tensor) {
                             return c10::elementSize(tensor.dtype);
                           });
  const SafetensorsHeader header = lay_out(tensors, metadata);
  const std::string head = encode_safetensors(header, kDataAlignment);
  const std::uint64_t size =
      head.size() + (header.tensors.empty() ? 0 : header.tensors.back().end);
  std::vector<Run> runs = runs_of(tensors, header, head.size());
  NewFile file(path, size);
  Target target(file, size, options, progress);
  std::deque<Stream> streams;  // Their addresses stay.
  for (const Run& run : runs) streams.emplace_back(target, run.begin, run.end);
  streams.emplace_back(target, 0, head.size());
  add_text(streams.back(), head);
  add_all(runs, streams);
  for (Stream& stream : streams) stream.finish();
  target.finish();
  naming(file.path(), [&] { file.publish(); });
}

}  // namespace torch_ext
