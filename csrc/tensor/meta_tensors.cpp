#include "meta_tensors.h"

#include <ATen/ops/detach.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "file_dtypes.h"
#include "torch_ext/base/error.h"
#include "touch.h"

namespace torch_ext {
namespace {

/// How many names an error shows.
constexpr std::size_t kMostNames = 10;

std::string text_of(const std::vector<std::string>& names) {
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kMostNames); ++i) {
    text += (i > 0 ? ", " : "") + names[i];
  }
  if (names.size() > kMostNames) {
    text += " and " + std::to_string(names.size() - kMostNames) + " more";
  }
  return text;
}

template <typename Shape>
std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

void check_kind(const NamedTensor& named) {
  const at::Tensor& tensor = named.tensor;
  const bool plain = tensor.layout() == c10::Layout::Strided &&
                     !tensor.is_quantized() && !tensor.is_nested() &&
                     tensor.has_storage() && tensor.is_contiguous() &&
                     tensor.storage_offset() == 0 &&
                     tensor.nbytes() == tensor.storage().nbytes() &&
                     !tensor.key_set().has(c10::DispatchKey::Python);
  if (plain) return;
  throw TypeError("offload of '" + named.name +
                  "': on the meta device only dense, contiguous parameters "
                  "with a storage of their own are supported");
}

MetaSource find(const NamedTensor& named,
                const SafetensorsCheckpoint& checkpoint) {
  MetaSource source = checkpoint.find(named.name);
  for (const std::string& alias : named.aliases) {
    if (source == nullptr) source = checkpoint.find(alias);
  }
  return source;
}

/// How the checkpoint's tensor differs; empty if it does not.
std::string difference(const NamedTensor& named,
                       const SafetensorsCheckpoint::Tensor& source) {
  const at::Tensor& tensor = named.tensor;
  const auto dtype = file_dtype_of(tensor.scalar_type());
  const std::string name = "'" + named.name + "'";
  if (dtype != source.dtype || packed_in_one(tensor.scalar_type()) != 1) {
    return name + " (" + std::string(c10::toString(tensor.scalar_type())) +
           ", there " + source.dtype + ")";
  }
  const bool same_shape = std::ranges::equal(
      tensor.sizes(), source.shape, [](std::int64_t a, std::uint64_t b) {
        return a >= 0 && static_cast<std::uint64_t>(a) == b;
      });
  if (same_shape) return {};
  return name + " (" + shape_text(tensor.sizes()) + ", there " +
         shape_text(source.shape) + ")";
}

at::Tensor on_cpu(const at::Tensor& like, const c10::Storage& storage) {
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
      like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(like.sizes());
  return tensor;
}

}  // namespace

std::vector<MetaSource> find_meta_sources(
    const std::vector<NamedTensor>& tensors,
    const SafetensorsCheckpoint* checkpoint) {
  std::vector<MetaSource> sources;
  std::vector<std::string> missing;
  std::vector<std::string> different;
  bool any = false;
  for (const NamedTensor& named : tensors) {
    sources.push_back(nullptr);
    if (!named.tensor.defined() || !named.tensor.is_meta()) continue;
    any = true;
    check_kind(named);
    if (checkpoint != nullptr) sources.back() = find(named, *checkpoint);
    if (sources.back() == nullptr) {
      missing.push_back("'" + named.name + "'");
      continue;
    }
    std::string differs = difference(named, *sources.back());
    if (!differs.empty()) different.push_back(std::move(differs));
  }
  if (!missing.empty() && checkpoint == nullptr) {
    throw std::invalid_argument(
        "on the meta device without values: " + text_of(missing) +
        "; name the safetensors files that have them: checkpoint=");
  }
  if (!missing.empty()) {
    throw std::invalid_argument(checkpoint->path() +
                                ": the checkpoint has no " + text_of(missing));
  }
  if (!different.empty()) {
    throw std::invalid_argument(
        checkpoint->path() + ": dtype or shape of the model differ: " +
        text_of(different) + "; make the model with those of the checkpoint");
  }
  if (checkpoint != nullptr && !any) {
    throw std::invalid_argument(
        "checkpoint= is for a model on the meta device, but none of its "
        "tensors is there: leave it out, or make the model on that device");
  }
  return sources;
}

c10::Storage make_empty_storage(std::uint64_t bytes) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes,
      c10::DataPtr(nullptr, c10::Device(c10::kCPU)), c10::GetCPUAllocator(),
      /*resizable=*/true));
}

c10::Storage load_storage(const SafetensorsCheckpoint::Tensor& source) {
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), source.bytes, c10::GetCPUAllocator(),
      /*resizable=*/true));
  auto* const data = static_cast<char*>(storage.mutable_data());
  const File& file = *source.file;
  std::uint64_t done = 0;
  while (done < source.bytes) {
    const ssize_t got =
        ::pread(file.buffered_fd(), data + done, source.bytes - done,
                static_cast<off_t>(source.offset + done));
    if (got > 0) {
      done += static_cast<std::uint64_t>(got);
    } else if (got == 0 || errno != EINTR) {
      throw IoError({.op = "pread",
                     .path = file.path(),
                     .offset = source.offset + done,
                     .length = source.bytes - done,
                     .error = got == 0 ? EIO : errno,
                     .detail = got == 0 ? "the file ends there" : ""});
    }
  }
  return storage;
}

GivenStorages::~GivenStorages() {
  for (auto& [tensor, before] : before_) {
    try {
      set_data_of(tensor, before);
    } catch (...) {
      // It has been done in the other direction.
    }
  }
}

void GivenStorages::give(const at::Tensor& tensor,
                         const c10::Storage& storage) {
  before_.emplace_back(tensor, tensor.detach());
  set_data_of(tensor, on_cpu(tensor, storage));
}

}  // namespace torch_ext
