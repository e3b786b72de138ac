#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "torch_ext/paging/pager.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// How to make a ModelOffload.
struct ModelOffloadOptions {
  StoreOptions store = {};
  /// Bytes of host memory for all offloaded parameters together.
  std::uint64_t host_memory = 0;
  /// Where tensors on the meta device have their bytes: a safetensors file, an
  /// index or a directory, see SafetensorsCheckpoint. They are read there, and
  /// nobody may write to the files. Empty: no tensor is on that device.
  std::filesystem::path checkpoint = {};
  /// As in PagerOptions.
  std::function<void()> while_waiting = {};
};

/// A parameter, and what messages call it.
struct NamedTensor {
  std::string name;
  at::Tensor tensor;
  /// Other names that it may have in a checkpoint.
  std::vector<std::string> aliases = {};
  /// Whether it is a parameter. Others stay in memory. They are loaded if they
  /// are on the meta device.
  bool is_parameter = true;
};

/// What became of a storage of the parameters.
struct OffloadedStorage {
  std::string name;         ///< That of its first parameter.
  std::uint64_t bytes = 0;  ///< The storage's size.
  /// Why it stays in memory as before; empty if it is offloaded.
  std::string stays = {};
  bool resident = false;  ///< The plan keeps it in host memory.
};

/// What gathered tensors are for.
enum class ModelPass {
  kNone,  ///< Something that does not come again at the same place.
  kForward,
  kBackward,
};

/// Keeps the parameters of a model on NVMe. Any operator that touches one
/// brings it into host memory, and what it changes is written back. The tensors
/// stay the same objects, with the same bits; views, ties and autograd need
/// nothing. Between operators an offloaded tensor has no address: whoever takes
/// one gets an error that names the parameter, unless it is gathered.
///
/// Storages below 64 KiB stay in memory, and so do those that somebody else
/// shares. The parameters live on in NVMe when this ends without close(), for
/// as long as somebody has them.
/// Threads: any; two threads may use one model.
class ModelOffload {
 public:
  /// Offloads the tensors in place. They are dense, strided and on the CPU, or
  /// on the meta device. Those come to the CPU, with a checkpoint's bytes.
  /// Nothing has changed after an error. Errors: std::invalid_argument for a
  /// budget that is too small, with the number that would do. The same for a
  /// checkpoint that does not fit the model, with names. TypeError (a tensor of
  /// another kind), StateError (a tensor is offloaded already), IoError.
  ModelOffload(std::vector<NamedTensor> parameters,
               ModelOffloadOptions options);
  ModelOffload(const ModelOffload&) = delete;
  ModelOffload& operator=(const ModelOffload&) = delete;
  ~ModelOffload();

  /// While it lives, the tensors have addresses. With `write`, they may be
  /// changed through them.
  class Gathered {
   public:
    Gathered() = default;

   private:
    friend class ModelOffload;
    std::vector<Pager::Pins> pins_;
  };
  /// Brings the tensors (or the parameters that they are views of) and keeps
  /// them. Tensors that are not offloaded are left out. What belongs to a pass
  /// is read ahead in the next one. Errors: Pager::hold()'s.
  Gathered gathered(const std::vector<at::Tensor>& tensors, bool write,
                    ModelPass pass = ModelPass::kNone);

  /// Copies of the tensors as they are now, and tensors that are not offloaded
  /// as they are. The copies lie in a file without a name in the first
  /// directory, mapped as private memory: see SnapshotFile. Tensors that share
  /// a storage share a copy. A copy is an inference tensor: changing it would
  /// not change the parameter, and raises an error. Errors: IoError,
  /// Pager::hold()'s.
  std::vector<at::Tensor> snapshot(const std::vector<at::Tensor>& tensors);

  /// Brings all parameters back into memory of their own. Does nothing the
  /// second time. Errors: std::invalid_argument if memory has no room for them,
  /// IoError; what has not come back by then is still offloaded.
  void close();

  std::vector<OffloadedStorage> plan() const;
  PagerStats stats() const;
  const std::vector<std::string>& notes() const noexcept;
  const std::string& engine() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
