#include "torch_ext/tensor/model_offload.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>

#include "meta_tensors.h"
#include "tensor_check.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/available_memory.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/make_queue.h"
#include "torch_ext/optim/snapshot_file.h"
#include "torch_ext/swap/safetensors_checkpoint.h"
#include "touch.h"

namespace torch_ext {
namespace {

// Smaller storages cost more to bring than to keep.
constexpr std::uint64_t kSmallest = std::uint64_t{64} << 10;

/// The parameters that share a storage.
struct Group {
  std::string name;  ///< That of the first.
  std::vector<at::Tensor> tensors;
  std::string stays = {};
  MetaSource source = nullptr;  ///< Has its bytes, if they are not in memory.

  std::uint64_t bytes() const { return tensors.front().storage().nbytes(); }
};

void check(const NamedTensor& parameter) {
  const std::string& name = parameter.name;
  const at::Tensor& tensor = parameter.tensor;
  if (tensor.defined() && is_touched(tensor)) {
    throw StateError("'" + name + "' is offloaded already");
  }
  // find_meta_sources() looks at the others.
  if (tensor.defined() && tensor.is_meta()) return;
  check_has_plain_memory(tensor, "offload of '" + name + "'");
  if (!tensor.is_cpu()) {
    throw TypeError("offload of '" + name + "': parameters on " +
                    tensor.device().str() +
                    " are not supported, only those on the CPU");
  }
}

std::vector<Group> groups_of(std::vector<NamedTensor> parameters,
                             const std::vector<MetaSource>& sources) {
  std::vector<Group> groups;
  std::map<const c10::StorageImpl*, std::size_t> group_of;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    at::Tensor& tensor = parameters[i].tensor;
    const auto [place, fresh] = group_of.try_emplace(
        tensor.storage().unsafeGetStorageImpl(), groups.size());
    if (fresh) {
      groups.push_back({.name = std::move(parameters[i].name),
                        .tensors = {},
                        .source = sources[i]});
    }
    if (!parameters[i].is_parameter) {
      groups[place->second].stays = "it is no parameter";
    }
    std::vector<at::Tensor>& tensors = groups[place->second].tensors;
    const bool known = std::ranges::any_of(
        tensors, [&](const at::Tensor& each) { return each.is_same(tensor); });
    if (!known) tensors.push_back(std::move(tensor));
  }
  for (Group& group : groups) {
    const c10::Storage& storage = group.tensors.front().storage();
    if (storage.nbytes() < kSmallest) {
      group.stays = "it has less than 64 KiB";
    } else if (group.source == nullptr &&
               !is_held_only_by(storage, group.tensors.size())) {
      group.stays =
          "its memory is shared with something that is no parameter: a view, "
          "a NumPy array, or a graph that is not freed";
    }
  }
  return groups;
}

/// Reads the checkpoint's files.
std::shared_ptr<IoQueue> queue_for(
    const std::optional<SafetensorsCheckpoint>& checkpoint,
    const StoreOptions& options) {
  if (!checkpoint || checkpoint->tensors().empty()) return nullptr;
  const File& file = *checkpoint->tensors().begin()->second.file;
  return make_queue(options.aio, options.engine, file.direct(),
                    options.engine_factory)
      .queue;
}

// An operator needs two parameters at once; so much must always fit.
void check_budget(const std::vector<Group>& groups, std::uint64_t memory) {
  const Group* largest = nullptr;
  std::uint64_t most = 0;
  for (const Group& group : groups) {
    // In a file it begins anywhere in a page.
    const std::uint64_t before =
        group.source == nullptr ? 0 : group.source->offset % page_size();
    const std::uint64_t bytes = align_up(before + group.bytes(), page_size());
    if (!group.stays.empty() || bytes <= most) continue;
    most = bytes;
    largest = &group;
  }
  if (largest == nullptr || memory >= 2 * most) return;
  throw std::invalid_argument(
      "host_memory must be at least " + std::to_string(2 * most) +
      ", twice the largest parameter, '" + largest->name + "'; got " +
      std::to_string(memory));
}

}  // namespace

struct ModelOffload::Impl {
  std::filesystem::path directory;  ///< For snapshots.
  std::shared_ptr<Store> store;
  std::shared_ptr<Pager> pager;
  /// TouchedStorages owns them.
  std::vector<std::weak_ptr<PagedStorage>> storages;
  std::vector<OffloadedStorage> staying;

  /// Those that are still offloaded.
  std::vector<std::shared_ptr<PagedStorage>> paged() const {
    std::vector<std::shared_ptr<PagedStorage>> living;
    for (const auto& each : storages) {
      auto storage = each.lock();
      if (storage != nullptr && storage->is_paged()) {
        living.push_back(std::move(storage));
      }
    }
    return living;
  }
};

ModelOffload::ModelOffload(std::vector<NamedTensor> parameters,
                           ModelOffloadOptions options)
    : impl_(std::make_unique<Impl>()) {
  for (const NamedTensor& parameter : parameters) check(parameter);
  std::optional<SafetensorsCheckpoint> checkpoint;
  if (!options.checkpoint.empty()) checkpoint.emplace(options.checkpoint);
  const std::vector<MetaSource> sources =
      find_meta_sources(parameters, checkpoint ? &*checkpoint : nullptr);
  TouchedStorages& touched = TouchedStorages::instance();
  touched.sweep();
  std::vector<Group> groups = groups_of(std::move(parameters), sources);
  check_budget(groups, options.host_memory);
  impl_->store = std::make_shared<Store>(options.store);
  impl_->directory = options.store.directory.all().front().path;
  std::uint64_t total = 0;
  for (const Group& group : groups) {
    if (group.stays.empty() && group.source == nullptr) total += group.bytes();
  }
  impl_->store->check_room(total);
  impl_->pager = std::make_shared<Pager>(
      PagerOptions{.store = impl_->store,
                   .memory = options.host_memory,
                   .files = queue_for(checkpoint, options.store),
                   .while_waiting = std::move(options.while_waiting)});
  std::vector<std::shared_ptr<PagedStorage>> storages;
  GivenStorages given;
  const auto give = [&](const std::vector<at::Tensor>& tensors,
                        const c10::Storage& storage) {
    for (const at::Tensor& tensor : tensors) given.give(tensor, storage);
  };
  for (Group& group : groups) {
    if (!group.stays.empty()) {
      impl_->staying.push_back(
          {.name = group.name, .bytes = group.bytes(), .stays = group.stays});
      if (group.source != nullptr) {
        give(group.tensors, load_storage(*group.source));
      }
      continue;
    }
    if (group.source == nullptr) {
      storages.push_back(std::make_shared<PagedStorage>(
          impl_->pager, std::move(group.name), std::move(group.tensors)));
      storages.back()->copy_in();
      continue;
    }
    const auto& [file, offset, bytes, dtype, shape] = *group.source;
    storages.push_back(std::make_shared<PagedStorage>(
        impl_->pager, std::move(group.name), group.tensors,
        FileRange{.file = file, .offset = offset, .bytes = bytes}));
    give(group.tensors, storages.back()->storage());
  }
  impl_->pager->flush();
  impl_->storages.assign(storages.begin(), storages.end());
  try {
    for (const auto& storage : storages) touched.add(storage);
  } catch (...) {
    for (const auto& storage : storages) touched.remove(*storage);
    throw;
  }
  given.keep();
  for (const auto& storage : storages) storage->begin();
}

ModelOffload::~ModelOffload() = default;

ModelOffload::Gathered ModelOffload::gathered(
    const std::vector<at::Tensor>& tensors, bool write, ModelPass pass) {
  std::vector<Pager::Touch> touches;
  for (const at::Tensor& tensor : tensors) {
    const auto storage = TouchedStorages::instance().find(tensor);
    if (storage == nullptr || &storage->pager() != impl_->pager.get()) continue;
    touches.push_back({.unit = storage->unit(),
                       .access = write ? Access::kWrite : Access::kRead,
                       .forward = pass == ModelPass::kForward});
  }
  Gathered gathered;
  if (!touches.empty()) {
    gathered.pins_.push_back(
        impl_->pager->hold(touches, /*planned=*/pass != ModelPass::kNone));
  }
  return gathered;
}

std::vector<at::Tensor> ModelOffload::snapshot(
    const std::vector<at::Tensor>& tensors) {
  struct Copy {
    std::shared_ptr<PagedStorage> storage;
    std::uint64_t offset = 0;
  };
  std::map<const PagedStorage*, Copy> copies;
  std::vector<const PagedStorage*> storage_of;
  std::uint64_t total = 0;
  for (const at::Tensor& tensor : tensors) {
    auto storage = TouchedStorages::instance().find(tensor);
    const bool ours = storage != nullptr && storage->is_paged() &&
                      &storage->pager() == impl_->pager.get();
    storage_of.push_back(ours ? storage.get() : nullptr);
    if (!ours || copies.contains(storage.get())) continue;
    const PagedStorage* const key = storage.get();
    const std::uint64_t bytes = align_up(storage->bytes(), page_size());
    copies[key] = {.storage = std::move(storage), .offset = total};
    total += bytes;
  }
  SnapshotFile file(impl_->directory, total);
  for (const auto& [storage, copy] : copies) {
    const Pager::Touch touch{storage->unit()};
    const Pager::Pins pins = impl_->pager->hold({&touch, 1});
    file.write(copy.offset, {pins.data(0), storage->bytes()});
  }
  const std::shared_ptr<std::byte> memory = file.map();
  std::vector<at::Tensor> result;
  const c10::InferenceMode inference;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (storage_of[i] == nullptr) {
      result.push_back(tensor);
      continue;
    }
    std::byte* const first = memory.get() + copies[storage_of[i]].offset;
    const auto skipped =
        static_cast<std::size_t>(tensor.storage_offset()) * tensor.itemsize();
    result.push_back(at::from_blob(
        first + skipped, tensor.sizes(), tensor.strides(), [memory](void*) {},
        at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU)));
  }
  return result;
}

void ModelOffload::close() {
  TouchedStorages& touched = TouchedStorages::instance();
  touched.sweep();
  const auto storages = impl_->paged();
  std::uint64_t total = 0;
  for (const auto& storage : storages) total += storage->bytes();
  const std::uint64_t room = available_memory();
  if (total > room) {
    throw std::invalid_argument(
        "the parameters take " + std::to_string(total) +
        " bytes, and memory has " + std::to_string(room) +
        " left: save them with state_dict() instead of closing");
  }
  for (const auto& storage : storages) storage->end();
  touched.sweep();
}

std::vector<OffloadedStorage> ModelOffload::plan() const {
  std::vector<OffloadedStorage> plan;
  for (const auto& storage : impl_->paged()) {
    plan.push_back({.name = storage->name(),
                    .bytes = storage->bytes(),
                    .resident = impl_->pager->resident(storage->unit())});
  }
  plan.insert(plan.end(), impl_->staying.begin(), impl_->staying.end());
  return plan;
}

PagerStats ModelOffload::stats() const { return impl_->pager->stats(); }

const std::vector<std::string>& ModelOffload::notes() const noexcept {
  return impl_->store->notes();
}

const std::string& ModelOffload::engine() const noexcept {
  return impl_->store->engine();
}

}  // namespace torch_ext
