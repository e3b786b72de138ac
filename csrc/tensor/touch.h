#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torch_ext/paging/pager.h"

namespace torch_ext {

/// A storage whose bytes a Pager has. While nothing has it pinned, its tensors
/// hold a stand-in storage, which raises an error when somebody takes its
/// address. touch.cpp tells how operators notice it.
class PagedStorage {
 public:
  /// Tensors that share a storage and have plain memory on the CPU. Nothing
  /// changes yet. Errors: Pager::add()'s.
  PagedStorage(std::shared_ptr<Pager> pager, std::string name,
               std::vector<at::Tensor> tensors);
  /// The same, for tensors on the meta device, and with the bytes of a file.
  /// From the start the pager has them. The tensors get storage() before
  /// begin().
  PagedStorage(std::shared_ptr<Pager> pager, std::string name,
               std::vector<at::Tensor> tensors, FileRange range);
  PagedStorage(const PagedStorage&) = delete;
  PagedStorage& operator=(const PagedStorage&) = delete;
  /// Errors are dropped. It has been taken out.
  ~PagedStorage();

  /// Copies the storage's bytes to the pager. Errors: Pager::pin()'s.
  void copy_in();
  /// From now on the pager has the bytes; the storage's own memory is free.
  /// Nobody else uses the tensors meanwhile.
  void begin() noexcept;
  /// The tensors get memory of their own again, with the bytes. Nobody else
  /// uses them meanwhile. Errors: std::bad_alloc, Pager::pin()'s; nothing has
  /// changed then.
  void end();
  /// Whether the pager has the bytes.
  bool is_paged() const { return begun_; }
  /// Whether nobody but this has the tensors any more, or they have got
  /// another storage; after end(), whether nobody has the stand-in.
  bool is_dropped() const;

  const std::string& name() const { return name_; }
  Pager& pager() const { return *pager_; }
  Pager::Unit unit() const { return *unit_; }
  std::uint64_t bytes() const { return bytes_; }
  const c10::Storage& storage() const { return real_; }
  const c10::Storage& stand_in() const { return stand_in_; }

  /// Gives a view that has the stand-in the storage itself, until as many calls
  /// of hide_view(). Returns false, and does nothing, if it has that already.
  /// Threads: any.
  bool show_view(const at::Tensor& view);
  void hide_view(const at::Tensor& view) noexcept;

 private:
  struct Views;
  PagedStorage(std::shared_ptr<Pager> pager, std::string name,
               std::vector<at::Tensor> tensors, c10::Storage real);
  Pager::OnPinned on_pinned();
  void show(std::byte* data) noexcept;

  const std::shared_ptr<Pager> pager_;
  const std::string name_;
  const std::vector<at::Tensor> tensors_;
  const c10::Storage real_;
  const c10::Storage stand_in_;
  const std::uint64_t bytes_;
  const std::unique_ptr<Views> views_;
  std::optional<Pager::Unit> unit_;  ///< None if making it has failed.
  bool begun_ = false;
};

/// The storages that operators look for. There is one for the process.
/// Threads: any.
class TouchedStorages {
 public:
  static TouchedStorages& instance();

  /// Makes operators notice it: they pin it while they run. It owns the
  /// storages. Errors: StateError if another library has torch's dispatch key.
  void add(const std::shared_ptr<PagedStorage>& storage);
  void remove(const PagedStorage& storage) noexcept;
  /// The paged storage that the tensor, or a view of it, belongs to; else null.
  std::shared_ptr<PagedStorage> find(const at::Tensor& tensor) const;
  /// Takes out those that are dropped.
  void sweep() noexcept;

 private:
  TouchedStorages() = default;
  struct State;
  static State& state();
};

/// Whether operators notice the tensor.
bool is_touched(const at::Tensor& tensor) noexcept;

/// As set_data(), between the meta device and the CPU too. The tensor stays the
/// same object.
void set_data_of(const at::Tensor& tensor, const at::Tensor& data);

/// Whether there are only so many references to a storage, beside that of its
/// Python object, which stays once somebody has asked for it. Threads: any.
bool is_held_only_by(const c10::Storage& storage, std::size_t references);

/// Called in a catch block, when an operator's pin has failed. It may throw
/// something that says more, such as an exception of Python. Set once.
void set_touch_error_translator(std::function<void()> translate);

}  // namespace torch_ext
