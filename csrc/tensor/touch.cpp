// How an operator brings the parameters that it needs
//
// Each paged tensor has an extra dispatch key. Operators on it, on its views
// and on what autograd saved of it come to one boxed fallback first, above
// autograd. The fallback pins the storages of all arguments that have the key,
// calls the operator, and ends the pins. What an operator returns has no such
// key, so all other operators cost nothing more.
//
//  - A view needs no bytes. Nor does a composite operator: the operators that
//    it is made of come here themselves.
//  - An argument that the schema says is written makes its storage dirty. One
//    that is overwritten as a whole need not be read before.
//
// The bytes come and go by the DataPtr in the StorageImpl. That is no change of
// the tensor: no version is counted, and views keep their storage.
//
// Whoever takes an address outside of an operator gets an error with the
// parameter's name, wherever the bytes are. While nothing is pinned the DataPtr
// is null, and the tensors themselves hold a stand-in storage whose data raises
// that error. A view that is made meanwhile has the stand-in too, but for the
// operators that use it. A view that was made before has the storage itself,
// which raises the error where set_raises() can say so.
//
// This file is the only one that knows the key.

#include "touch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DispatchKey.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <unordered_map>
#include <utility>

#include "../base/mutex.h"
#include "meta_tensors.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

// DeferredInit is for kernels outside of torch, comes before autograd, and is
// used by nobody: torchdistX, for which it was made, is archived.
template <typename Key>
constexpr Key touch_key() {
  if constexpr (requires { Key::DeferredInit; }) {
    return Key::DeferredInit;
  } else {
    return Key::TESTING_ONLY_GenericWrapper;
  }
}
constexpr c10::DispatchKey kKey = touch_key<c10::DispatchKey>();

/// A TensorImpl's own key set cannot be changed in place otherwise.
struct OpenImpl : c10::TensorImpl {
  static constexpr auto key_set() { return &OpenImpl::key_set_; }
};

void set_key(const at::Tensor& tensor, bool on) noexcept {
  c10::DispatchKeySet& keys =
      tensor.unsafeGetTensorImpl()->*(OpenImpl::key_set());
  keys = on ? keys.add(kKey) : keys.remove(kKey);
}

void put(const at::Tensor& tensor, const c10::Storage& storage) noexcept {
  c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  const bool allowed = impl->allow_tensor_metadata_change();
  impl->set_allow_tensor_metadata_change(true);
  impl->set_storage_keep_dtype(storage);
  impl->set_allow_tensor_metadata_change(allowed);
}

const c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl()
                              : nullptr;
}

// torch has a flag by which the address of a storage is an error, and nothing
// that takes it back. An explicit instantiation may name what is private. Where
// the name is not known to be right, the address of views that were made while
// there were bytes is 0 afterwards.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR <= 15
template <bool c10::StorageImpl::*Flag>
struct OpenStorage {
  friend void set_raises(c10::StorageImpl& storage, bool raises) {
    storage.*Flag = raises;
  }
};
void set_raises(c10::StorageImpl& storage, bool raises);
template struct OpenStorage<&c10::StorageImpl::throw_on_immutable_data_ptr_>;
#else
void set_raises(c10::StorageImpl&, bool) {}
#endif

/// Gives a storage other bytes. Without any, its address is an error.
void set_bytes(const c10::Storage& storage, c10::DataPtr bytes) noexcept {
  c10::StorageImpl& impl = *storage.unsafeGetStorageImpl();
  set_raises(impl, bytes.get() == nullptr);
  impl.set_data_ptr_noswap(std::move(bytes));  // It looks at the flag.
}

std::string message_of(const std::string& name) {
  return "the parameter '" + name +
         "' is offloaded: it has an address only inside an operator, or in "
         "`with offload.gathered(parameter):`";
}

c10::Storage make_stand_in(const c10::Storage& real, const std::string& name) {
  c10::Storage stand_in(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), real.nbytes(),
      c10::DataPtr(nullptr, real.device()), c10::GetCPUAllocator(),
      /*resizable=*/false));
  stand_in.unsafeGetStorageImpl()
      ->release_data_and_set_meta_custom_data_ptr_error_msg_(message_of(name));
  return stand_in;
}

const c10::impl::PyObjectSlot& slot_of(const at::Tensor& tensor) {
  return *tensor.unsafeGetTensorImpl()->pyobj_slot();
}

const c10::impl::PyObjectSlot& slot_of(const c10::Storage& storage) {
  return *storage.unsafeGetStorageImpl()->pyobj_slot();
}

// Whether there are only so many references to a tensor or storage. Its Python
// object, if it has one, is one more, and lives as long as there are others.
template <typename Held>
bool is_held_by(const Held& held, std::size_t references) {
  if (held.use_count() == references) return true;
  return held.use_count() == references + 1 &&
         slot_of(held).has_unique_reference();
}

std::function<void()>& translator() {
  static auto* const translate = new std::function<void()>;
  return *translate;
}

// What an operator does with its arguments ---------------------------------

/// A tensor argument, and what the operator does with it.
struct Argument {
  const at::Tensor* tensor;
  std::shared_ptr<PagedStorage> storage;
  Access access;
};

// The operators that run through all of their first argument and read nothing
// of it.
bool replaces(const std::string& name) {
  return name == "aten::copy_" || name == "aten::zero_" ||
         name == "aten::fill_" || name == "aten::normal_" ||
         name == "aten::uniform_";
}

// Whether what comes next may read what is to be replaced, or leave it: a mode
// or subclass of Python, or a transform.
bool may_not_replace(c10::DispatchKeySet rest) {
  return rest.has_any(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
       c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper,
       c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
}

bool covers_its_storage(const at::Tensor& tensor) {
  return tensor.storage_offset() == 0 &&
         tensor.is_non_overlapping_and_dense() &&
         tensor.nbytes() == tensor.storage().nbytes();
}

bool needs_no_bytes(const c10::OperatorHandle& op) {
  // Some have a kernel for the CPU besides, as silu_backward.
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
      !op.hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
    return true;
  }
  return std::ranges::any_of(op.schema().arguments(),
                             [](const c10::Argument& argument) {
                               return argument.alias_info() != nullptr &&
                                      !argument.alias_info()->isWrite();
                             });
}

// Whether it writes an argument that its schema does not mark: the statistics.
bool writes_unmarked(const std::string& name, std::size_t index) {
  return name == "aten::native_batch_norm" && (index == 3 || index == 4);
}

/// Calls `use(tensor, is_written, index)` for each tensor on the stack.
template <typename Use>
void for_each_tensor(const c10::FunctionSchema& schema,
                     std::span<const c10::IValue> values, Use use) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const c10::AliasInfo* const alias = schema.arguments()[i].alias_info();
    const bool written = (alias != nullptr && alias->isWrite()) ||
                         writes_unmarked(schema.name(), i);
    const c10::IValue& value = values[i];
    if (value.isTensor()) {
      use(value.toTensor(), written, i);
    } else if (value.isTensorList()) {
      for (const c10::IValue& each : value.toListRef()) {
        use(each.toTensor(), written, i);
      }
    } else if (value.isList()) {
      for (const c10::IValue& each : value.toListRef()) {
        if (each.isTensor()) use(each.toTensor(), written, i);
      }
    }
  }
}

std::vector<Argument> arguments_of(const c10::OperatorHandle& op,
                                   std::span<const c10::IValue> values,
                                   c10::DispatchKeySet rest) {
  std::vector<Argument> arguments;
  const TouchedStorages& storages = TouchedStorages::instance();
  for_each_tensor(
      op.schema(), values,
      [&](const at::Tensor& tensor, bool written, std::size_t index) {
        if (!tensor.defined() || !is_touched(tensor)) return;
        auto storage = storages.find(tensor);
        if (storage == nullptr) return;
        const bool all = written && index == 0 &&
                         replaces(op.schema().name()) &&
                         !may_not_replace(rest) && covers_its_storage(tensor);
        arguments.push_back({&tensor, std::move(storage),
                             all       ? Access::kReplace
                             : written ? Access::kWrite
                                       : Access::kRead});
      });
  // What has ended meanwhile has memory of its own.
  std::erase_if(arguments, [](const Argument& argument) {
    if (argument.storage->is_paged()) return false;
    put(*argument.tensor, argument.storage->storage());
    return true;
  });
  // It may be its own source.
  for (Argument& argument : arguments) {
    if (argument.access == Access::kReplace && arguments.size() > 1) {
      argument.access = Access::kWrite;
    }
  }
  return arguments;
}

/// What an operator needs of one pager.
struct PagerTouches {
  Pager* pager;
  std::vector<Pager::Touch> touches;
};

std::vector<PagerTouches> touches_of(const std::vector<Argument>& arguments) {
  std::vector<PagerTouches> all;
  const bool forward = torch::autograd::get_current_graph_task_id() < 0;
  for (const auto& [tensor, storage, access] : arguments) {
    Pager* const pager = &storage->pager();
    auto found = std::ranges::find(all, pager, &PagerTouches::pager);
    if (found == all.end()) found = all.insert(found, {pager, {}});
    found->touches.push_back(
        {storage->unit(), access, forward && access == Access::kRead});
  }
  return all;
}

// An operator with parameters of several models begins again so often.
constexpr int kAttempts = 100;

// A thread that has pinned something of one pager does not wait for what others
// have pinned of the next, since they may wait for it. So it lets go of all,
// and begins with the pager that refused: there it waits.
std::vector<Pager::Pins> pin(const std::vector<Argument>& arguments) {
  std::vector<PagerTouches> needed = touches_of(arguments);
  std::vector<Pager::Pins> pins;
  for (int attempt = 1;; ++attempt) {
    auto next = needed.begin();
    try {
      for (; next != needed.end(); ++next) {
        pins.push_back(next->pager->pin(next->touches));
      }
      return pins;
    } catch (const BudgetError&) {
      if (next == needed.begin() || attempt == kAttempts) throw;
    }
    pins.clear();
    std::rotate(needed.begin(), next, needed.end());
  }
}

std::vector<Pager::Pins> pin_for_operator(
    const std::vector<Argument>& arguments) {
  try {
    return pin(arguments);
  } catch (...) {
    if (translator()) translator()();
    throw;
  }
}

/// Views that were made while there were no bytes. They have the storage itself
/// for as long as an operator uses them.
class ShownViews {
 public:
  explicit ShownViews(const std::vector<Argument>& arguments) {
    views_.reserve(arguments.size());
    for (const auto& [tensor, storage, access] : arguments) {
      if (storage->show_view(*tensor)) views_.emplace_back(*tensor, storage);
    }
  }
  ShownViews(const ShownViews&) = delete;
  ShownViews& operator=(const ShownViews&) = delete;
  ~ShownViews() {
    for (const auto& [tensor, storage] : views_) storage->hide_view(tensor);
  }

 private:
  std::vector<std::pair<at::Tensor, std::shared_ptr<PagedStorage>>> views_;
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
              torch::jit::Stack* stack) {
  const c10::DispatchKeySet rest =
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kKey);
  if (needs_no_bytes(op)) {
    op.redispatchBoxed(rest, stack);
    return;
  }
  const std::size_t count = op.schema().arguments().size();
  const std::vector<Argument> arguments =
      arguments_of(op, std::span<const c10::IValue>(*stack).last(count), rest);
  std::vector<Pager::Pins> pins = pin_for_operator(arguments);
  const ShownViews views(arguments);
  try {
    op.redispatchBoxed(rest, stack);
  } catch (...) {
    for (Pager::Pins& each : pins) each.undo_replaced();
    throw;
  }
  // A tensor that has got the storage of one that operators notice.
  if (op.schema().name() == "aten::set_" && stack->back().isTensor()) {
    const at::Tensor& tensor = stack->back().toTensor();
    if (TouchedStorages::instance().find(tensor) != nullptr) {
      set_key(tensor, true);
    }
  }
}

}  // namespace

void set_data_of(const at::Tensor& tensor, const at::Tensor& data) {
  // set_data() does not take a tensor of another kind of device.
  c10::DispatchKeySet& keys =
      tensor.unsafeGetTensorImpl()->*(OpenImpl::key_set());
  const c10::DispatchKeySet before = keys;
  keys = data.key_set();
  try {
    tensor.set_data(data);
  } catch (...) {
    keys = before;
    throw;
  }
}

bool is_held_only_by(const c10::Storage& storage, std::size_t references) {
  return is_held_by(storage, references);
}

// Storages -------------------------------------------------------------------

/// Views that have the storage itself while operators use them, and how many.
struct PagedStorage::Views {
  Mutex mutex;
  std::unordered_map<const c10::TensorImpl*, std::size_t> uses
      GUARDED_BY(mutex);
};

PagedStorage::PagedStorage(std::shared_ptr<Pager> pager, std::string name,
                           std::vector<at::Tensor> tensors, c10::Storage real)
    : pager_(std::move(pager)),
      name_(std::move(name)),
      tensors_(std::move(tensors)),
      real_(std::move(real)),
      stand_in_(make_stand_in(real_, name_)),
      bytes_(real_.nbytes()),
      views_(std::make_unique<Views>()) {
  // Means nothing as long as its address is no error.
  real_.unsafeGetStorageImpl()->get_extra_meta().custom_data_ptr_error_msg_ =
      message_of(name_);
}

PagedStorage::PagedStorage(std::shared_ptr<Pager> pager, std::string name,
                           std::vector<at::Tensor> tensors)
    : PagedStorage(std::move(pager), std::move(name), tensors,
                   tensors.front().storage()) {
  unit_ = pager_->add(bytes_, name_, on_pinned());
}

PagedStorage::PagedStorage(std::shared_ptr<Pager> pager, std::string name,
                           std::vector<at::Tensor> tensors, FileRange range)
    : PagedStorage(std::move(pager), std::move(name), std::move(tensors),
                   make_empty_storage(range.bytes)) {
  unit_ = pager_->add(std::move(range), name_, on_pinned());
}

Pager::OnPinned PagedStorage::on_pinned() {
  return [this](std::byte* data) { show(data); };
}

PagedStorage::~PagedStorage() {
  if (!unit_) return;
  try {
    pager_->remove(*unit_);
  } catch (...) {
    // In a forked child there is nothing to free.
  }
}

void PagedStorage::copy_in() {
  const Pager::Touch touch{*unit_, Access::kReplace};
  const Pager::Pins pins = pager_->pin({&touch, 1});
  std::memcpy(pins.data(0), real_.data(), bytes_);
}

void PagedStorage::begin() noexcept {
  begun_ = true;
  real_.unsafeGetStorageImpl()->set_resizable(false);
  show(nullptr);
  for (const at::Tensor& tensor : tensors_) set_key(tensor, true);
}

void PagedStorage::end() {
  c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes_);
  const Pager::Touch touch{*unit_, Access::kRead};
  Pager::Pins pins = pager_->hold({&touch, 1});
  std::memcpy(memory.mutable_get(), pins.data(0), bytes_);
  begun_ = false;
  pins.release();
  c10::StorageImpl* const real = real_.unsafeGetStorageImpl();
  set_bytes(real_, std::move(memory));
  for (const at::Tensor& tensor : tensors_) {
    if (storage_of(tensor) == stand_in_.unsafeGetStorageImpl() ||
        storage_of(tensor) == real) {
      put(tensor, real_);
      set_key(tensor, false);
    }
  }
  real->set_resizable(true);
}

// Under the pager's lock. A tensor that was given another storage keeps that.
void PagedStorage::show(std::byte* data) noexcept {
  if (!begun_) return;
  const bool here = data != nullptr;
  set_bytes(real_, c10::DataPtr(data, real_.device()));
  const c10::Storage& from = here ? stand_in_ : real_;
  const c10::Storage& to = here ? real_ : stand_in_;
  for (const at::Tensor& tensor : tensors_) {
    if (storage_of(tensor) == from.unsafeGetStorageImpl()) put(tensor, to);
  }
}

bool PagedStorage::show_view(const at::Tensor& view) {
  const bool is_own = std::ranges::any_of(
      tensors_, [&](const at::Tensor& own) { return own.is_same(view); });
  if (is_own) return false;
  const MutexLock lock(views_->mutex);
  std::size_t& uses = views_->uses[view.unsafeGetTensorImpl()];
  if (uses == 0 && storage_of(view) == real_.unsafeGetStorageImpl()) {
    views_->uses.erase(view.unsafeGetTensorImpl());
    return false;
  }
  if (uses++ == 0) put(view, real_);
  return true;
}

void PagedStorage::hide_view(const at::Tensor& view) noexcept {
  const MutexLock lock(views_->mutex);
  const auto found = views_->uses.find(view.unsafeGetTensorImpl());
  if (found == views_->uses.end() || --found->second > 0) return;
  put(view, stand_in_);
  views_->uses.erase(found);
}

bool PagedStorage::is_dropped() const {
  if (!begun_) return is_held_by(stand_in_, 1);
  std::size_t with_real = 0;
  std::size_t with_stand_in = 0;
  for (const at::Tensor& tensor : tensors_) {
    const c10::StorageImpl* const now = storage_of(tensor);
    if (now == real_.unsafeGetStorageImpl()) {
      ++with_real;
    } else if (now == stand_in_.unsafeGetStorageImpl()) {
      ++with_stand_in;
    } else {
      continue;  // It has got another storage.
    }
    if (!is_held_by(tensor, 1)) return false;
  }
  // Views may live on, and need the bytes.
  return is_held_by(real_, 1 + with_real) &&
         is_held_by(stand_in_, 1 + with_stand_in);
}

struct TouchedStorages::State {
  Mutex mutex;
  std::unordered_map<const c10::StorageImpl*, std::shared_ptr<PagedStorage>>
      storages GUARDED_BY(mutex);
  std::unique_ptr<torch::Library> library GUARDED_BY(mutex);
};

TouchedStorages::State& TouchedStorages::state() {
  // This is never destroyed: tensors may die after everything static.
  static auto* const state = new State;
  return *state;
}

TouchedStorages& TouchedStorages::instance() {
  static TouchedStorages storages;
  return storages;
}

void TouchedStorages::add(const std::shared_ptr<PagedStorage>& storage) {
  State& all = state();
  const MutexLock lock(all.mutex);
  if (all.library == nullptr) {
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "_",
                                                    kKey, __FILE__, __LINE__);
    try {
      library->fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
    } catch (const std::exception& error) {
      throw StateError(
          std::string("parameters cannot be offloaded: another library has "
                      "taken torch's dispatch key ") +
          c10::toString(kKey) + ": " + error.what());
    }
    all.library = std::move(library);
  }
  all.storages[storage->storage().unsafeGetStorageImpl()] = storage;
  all.storages[storage->stand_in().unsafeGetStorageImpl()] = storage;
}

void TouchedStorages::remove(const PagedStorage& storage) noexcept {
  State& all = state();
  std::shared_ptr<PagedStorage> removed;  // Ends after the lock.
  const MutexLock lock(all.mutex);
  const auto found =
      all.storages.find(storage.storage().unsafeGetStorageImpl());
  if (found == all.storages.end()) return;
  removed = found->second;
  all.storages.erase(found);
  all.storages.erase(storage.stand_in().unsafeGetStorageImpl());
}

std::shared_ptr<PagedStorage> TouchedStorages::find(
    const at::Tensor& tensor) const {
  const c10::StorageImpl* const storage = storage_of(tensor);
  State& all = state();
  const MutexLock lock(all.mutex);
  const auto found = all.storages.find(storage);
  return found == all.storages.end() ? nullptr : found->second;
}

void TouchedStorages::sweep() noexcept {
  std::vector<std::shared_ptr<PagedStorage>> dropped;
  try {
    State& all = state();
    const MutexLock lock(all.mutex);
    for (const auto& [storage, paged] : all.storages) {
      if (storage == paged->storage().unsafeGetStorageImpl() &&
          paged->is_dropped()) {
        dropped.push_back(paged);
      }
    }
  } catch (...) {
    // The next call finds the others.
  }
  for (const auto& paged : dropped) remove(*paged);
}

bool is_touched(const at::Tensor& tensor) noexcept {
  return tensor.key_set().has(kKey);
}

void set_touch_error_translator(std::function<void()> translate) {
  translator() = std::move(translate);
}

}  // namespace torch_ext
