// A safetensors file becomes tensors.
//
// - On the CPU the whole file, from the granule in which the data begin, comes
//   into one block of memory. New pages of memory lie anywhere, and a drive
//   reads into such pages at half its speed. So direct I/O reads pieces into a
//   few buffers of huge pages. All cores take new pages and copy each piece to
//   its place, while the next ones are read.
// - With a mapping, the block is the mapped file. Nothing is read yet.
// - On a device each tensor is read into memory of its own, through page-locked
//   buffers.
//
// A tensor is a part of the block. Files of others may have tensors at odd
// addresses: those are copied out.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceType.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>

#include "dense_tensor.h"
#include "file_dtypes.h"
#include "file_transfers.h"
#include "parallel.h"
#include "plain_modes.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/available_memory.h"
#include "torch_ext/base/size.h"
#include "torch_ext/io/file.h"
#include "torch_ext/memory/buffer_pool.h"
#include "torch_ext/memory/host_block.h"
#include "torch_ext/swap/safetensors.h"
#include "torch_ext/tensor/tensor_file.h"
#include "torch_ext/tensor/tensor_file_transfer.h"

namespace torch_ext {
namespace {

/// Bytes that one read asks for.
constexpr std::uint64_t kPiece = std::uint64_t{16} << 20;
/// Bytes that a thread copies at a time. Its cache holds them.
constexpr std::uint64_t kPart = std::uint64_t{256} << 10;

/// What a tensor of the file is for torch.
struct Kind {
  c10::ScalarType dtype;
  std::vector<std::int64_t> shape;
};

Kind kind_of(const SafetensorsHeader::Tensor& entry, const std::string& path) {
  const auto dtype = torch_dtype_of(entry.dtype);
  const std::string name = "tensor '" + entry.name.substr(0, 200) + "'";
  if (!dtype) {
    throw std::invalid_argument(path + ": " + name + " has the dtype " +
                                entry.dtype + ", which torch has not");
  }
  Kind kind{*dtype, {entry.shape.begin(), entry.shape.end()}};
  const auto packed = static_cast<std::int64_t>(packed_in_one(*dtype));
  if (packed > 1) {
    if (kind.shape.empty() || kind.shape.back() % packed != 0) {
      throw std::invalid_argument(path + ": the last dimension of " + name +
                                  " is odd, but torch keeps two 4-bit numbers "
                                  "in one byte");
    }
    kind.shape.back() /= packed;
  }
  return kind;
}

/// The bytes of the file from `begin` on, in memory.
struct Block {
  std::shared_ptr<std::byte> memory;
  std::uint64_t begin = 0;
};

/// Copies to memory whose pages are new, on all cores.
void copy_to_new(std::byte* to, std::span<const std::byte> from) {
  const auto threads = static_cast<std::size_t>(at::get_num_threads());
  const std::size_t parts = align_up(from.size(), kPart) / kPart;
  run_in_parallel(threads, parts, [&](std::size_t i) {
    const std::size_t begin = i * kPart;
    const std::size_t bytes = std::min(kPart, from.size() - begin);
    populate(to + begin, bytes);
    std::memcpy(to + begin, from.data() + begin, bytes);
  });
}

/// How many pieces of a block are read at a time.
std::uint64_t staging_buffers(std::uint64_t bytes,
                              const TensorFileOptions& options) {
  return std::min(std::max(options.host_memory / kPiece, std::uint64_t{2}),
                  align_up(bytes, kPiece) / kPiece);
}

void read_pieces(const File& file, const Block& block, std::uint64_t bytes,
                 const TensorFileOptions& options) {
  struct Piece {
    TensorTicket read;
    std::uint64_t begin;
    std::span<std::byte> staged;
  };
  const std::uint64_t buffers = staging_buffers(bytes, options);
  const BufferPool staging(kPiece, buffers);
  // If something fails, its end waits for the reads under way.
  TensorFileTransfer transfer(transfer_options(options));
  std::deque<Piece> pieces;
  std::uint64_t next = 0;
  const auto read_next = [&](std::byte* to) {
    if (next == bytes) return;
    const std::uint64_t length = std::min(kPiece, bytes - next);
    pieces.push_back({transfer.read(file.fd(), block.begin + next,
                                    host_view(to, length, at::kByte)),
                      next,
                      {to, length}});
    next += length;
  };
  for (std::uint64_t i = 0; i < buffers; ++i) {
    read_next(staging.memory().data() + i * kPiece);
  }
  while (!pieces.empty()) {
    const Piece piece = std::move(pieces.front());
    pieces.pop_front();
    wait_for(piece.read, options);
    copy_to_new(block.memory.get() + piece.begin, piece.staged);
    read_next(piece.staged.data());
  }
}

void read_in_place(const File& file, const Block& block, std::uint64_t bytes,
                   const TensorFileOptions& options) {
  populate(block.memory.get(), bytes);
  TensorFileTransfer transfer(transfer_options(options));
  wait_for(transfer.read(file.fd(), block.begin,
                         host_view(block.memory.get(), bytes, at::kByte)),
           options);
}

Block read_block(const File& file, const SafetensorsHeader& header,
                 std::uint64_t end, const TensorFileOptions& options) {
  Block block;
  block.begin = align_down(header.bytes, file.granule());
  const std::uint64_t bytes = end - block.begin;
  // A process that touches more is killed, or makes another one be killed.
  const std::uint64_t left = available_memory() / 16 * 15;
  if (bytes > left) {
    throw IoError({.op = "load",
                   .path = file.path(),
                   .length = bytes,
                   .error = ENOMEM,
                   .detail = "the tensors take " + format_size(bytes) +
                             " of memory, of which " + format_size(left) +
                             " are left; mmap=True leaves them in the file"});
  }
  block.memory = allocate_block(bytes);
  // Pieces are faster, and take memory of their own.
  const std::uint64_t beside = staging_buffers(bytes, options) * kPiece;
  if (bytes > kPiece && bytes + beside <= left) {
    read_pieces(file, block, bytes, options);
  } else {
    read_in_place(file, block, bytes, options);
  }
  return block;
}

at::Tensor in_block(const Block& block, std::uint64_t offset,
                    std::uint64_t bytes, const Kind& kind) {
  if (bytes == 0) return at::empty(kind.shape, host_options(kind.dtype));
  const std::uint64_t place = offset - block.begin;
  if (!is_aligned(block.memory.get() + place, c10::elementSize(kind.dtype))) {
    const at::Tensor copy = at::empty(kind.shape, host_options(kind.dtype));
    std::memcpy(copy.mutable_data_ptr(), block.memory.get() + place, bytes);
    return copy;
  }
  auto part = part_of(block.memory, place, bytes);
  void* const data = part.get();
  return at::from_blob(
      data, kind.shape,
      [part = std::move(part)](void*) mutable { part.reset(); },
      host_options(kind.dtype));
}

NamedTensors load_on_cpu(const File& file, const SafetensorsHeader& header,
                         std::uint64_t end, bool mapped,
                         const TensorFileOptions& options) {
  Block block;
  std::vector<Kind> kinds;
  for (const auto& entry : header.tensors) {
    kinds.push_back(kind_of(entry, file.path()));
  }
  if (end > header.bytes) {
    block = mapped ? Block{map_block(file), 0}
                   : read_block(file, header, end, options);
  }
  NamedTensors tensors;
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const auto& entry = header.tensors[i];
    tensors.emplace_back(entry.name,
                         in_block(block, header.bytes + entry.begin,
                                  entry.end - entry.begin, kinds[i]));
  }
  return tensors;
}

NamedTensors load_on_device(const File& file, const SafetensorsHeader& header,
                            c10::Device device,
                            const TensorFileOptions& options) {
  NamedTensors tensors;
  for (const auto& entry : header.tensors) {
    const Kind kind = kind_of(entry, file.path());
    tensors.emplace_back(
        entry.name,
        at::empty(kind.shape,
                  at::TensorOptions().dtype(kind.dtype).device(device)));
  }
  if (device.is_meta()) return tensors;
  TensorFileTransfer transfer(transfer_options(options));
  std::vector<TensorTicket> tickets;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].second.numel() == 0) continue;
    tickets.push_back(transfer.read(
        file.fd(), header.bytes + header.tensors[i].begin, tensors[i].second));
  }
  for (const TensorTicket& ticket : tickets) wait_for(ticket, options);
  return tensors;
}

}  // namespace

NamedTensors load_tensors(const std::filesystem::path& path,
                          const LoadTarget& target,
                          const TensorFileOptions& options) {
  const PlainModes plain;
  if (target.mapped && !target.device.is_cpu()) {
    throw std::invalid_argument("load: a mapping is on the CPU, not on " +
                                target.device.str());
  }
  const File file = File::open(path, File::Mode::kRead);
  const SafetensorsHeader header = read_safetensors_header(file);
  std::uint64_t end = header.bytes;
  for (const auto& entry : header.tensors) {
    end = std::max(end, header.bytes + entry.end);
  }
  return naming(file.path(), [&] {
    return target.device.is_cpu()
               ? load_on_cpu(file, header, end, target.mapped, options)
               : load_on_device(file, header, target.device, options);
  });
}

FileMetadata load_metadata(const std::filesystem::path& path) {
  return read_safetensors_header(File::open(path, File::Mode::kRead)).metadata;
}

}  // namespace torch_ext
