// How an extent's bytes are laid out on the drives.
//
// Each block of an extent has a slot. The slots of an extent begin where those
// of the last extent ended. StripeMap says which drive a slot belongs to. So
// the blocks of an extent go to the drives in turn, and in each drive's file
// they lie side by side: an extent has one offset for each drive.
//
// A read or write walks through the slots of its bytes, and cuts them into
// parts that lie side by side on one drive. Each part is one operation in the
// queue of its drive. With several parts, Join counts their ends and reports
// the first error. With one drive there is one part, and no Join. All
// operations are prepared before the first is started, so that all start or
// none.
//
// Each block has a checksum in the extent. The I/O threads write it when they
// write the block, and compare it when they read the block.
//
// Drives on the same block device share a queue. A drive's file grows in steps
// of 16 MiB where there is room, with its space reserved. Freed space goes back
// to the drive's SpaceMap. Space whose write failed with EIO is never used
// again.

#include "torch_ext/store/store.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <stdexcept>
#include <utility>

#include "base/cut_point.h"
#include "base/mutex.h"
#include "drive.h"
#include "io/ticket_state.h"
#include "stripe_map.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/make_queue.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kNoSpace = Place::kNowhere;

std::vector<int> weights_of(const DirectoryList& directories) {
  if (directories.all().empty()) {
    throw std::invalid_argument("store: no directory is given");
  }
  std::vector<int> weights;
  for (const WeightedDirectory& directory : directories.all()) {
    if (directory.weight < 1 || directory.weight > 100) {
      throw std::invalid_argument("the weight of " + directory.path.string() +
                                  " must be from 1 to 100, got " +
                                  std::to_string(directory.weight));
    }
    weights.push_back(directory.weight);
  }
  return weights;
}

}  // namespace

// Makes operations on several drives one operation, which ends with the last.
class Store::Join final : public Ticket::State {
 public:
  Join(std::size_t count, Store::Done done)
      : left_(count), done_(std::move(done)) {}

  void end(std::exception_ptr failure) {
    {
      const MutexLock lock(mutex_);
      if (error_ == nullptr) error_ = std::move(failure);
      if (--left_ > 0) return;
      failure = error_;
    }
    done_(failure);
    finish(failure);
  }

  /// The parts, once all are started.
  void set_parts(std::vector<std::pair<IoQueue*, Ticket>> parts) {
    const MutexLock lock(mutex_);
    parts_ = std::move(parts);
  }
  std::vector<std::pair<IoQueue*, Ticket>> parts() const {
    const MutexLock lock(mutex_);
    return parts_;
  }

 private:
  mutable Mutex mutex_;
  std::size_t left_ GUARDED_BY(mutex_);
  std::exception_ptr error_ GUARDED_BY(mutex_);
  std::vector<std::pair<IoQueue*, Ticket>> parts_ GUARDED_BY(mutex_);
  Store::Done done_;
};

struct Store::Impl {
  explicit Impl(const StoreOptions& options)
      : config(options.aio),
        wanted_engine(options.engine),
        engine_factory(options.engine_factory),
        verify(options.verify),
        stripes(weights_of(options.directory)) {
    const auto& directories = options.directory.all();
    if (!options.files.empty() && options.files.size() != directories.size()) {
      throw std::invalid_argument(
          "store: files of " + std::to_string(options.files.size()) +
          " directories, not of " + std::to_string(directories.size()));
    }
    for (std::size_t i = 0; i < directories.size(); ++i) {
      const std::filesystem::path& path = directories[i].path;
      add_drive(path,
                options.files.empty()
                    ? File::scratch(path)
                    : File::open(path / options.files[i],
                                 options.read_only ? File::Mode::kRead
                                                   : File::Mode::kExisting));
    }
    config.validate();
    if (!is_aligned(config.block_size, granule)) {
      const std::uint64_t next = align_up(config.block_size, granule);
      throw std::invalid_argument(
          "aio: block_size must be a multiple of " + std::to_string(granule) +
          " for scratch files in " + granule_of + ", got " +
          std::to_string(config.block_size) + ": " + std::to_string(next) +
          " is the next that will do");
    }
    add_queues(options);
  }

  void add_drive(const std::filesystem::path& directory, File file);
  void add_queues(const StoreOptions& options);
  void add_note(const std::string& note);

  /// The slots of an extent's blocks: [first, last).
  std::uint64_t last_slot(const Extent& extent) const {
    return extent.first_slot_ +
           align_up(extent.padded_size_, config.block_size) / config.block_size;
  }
  std::uint64_t bytes_on(std::size_t drive, const Extent& extent) const;
  std::span<std::uint64_t> checksums_of(Extent& extent, std::uint64_t offset,
                                        std::uint64_t length) const;
  void check(const Request& request) const;

  /// What one drive has to do for a request. The bytes lie side by side there.
  struct Part {
    IoQueue* queue;
    IoOperation operation;
  };
  std::vector<Part> parts_of(IoRequest::Op op, const Request& request) const;
  Ticket submit(IoRequest::Op op, Request request, bool compare = true);
  Ticket move_head(IoRequest::Op op, std::size_t directory,
                   std::uint64_t offset, std::span<std::byte> bytes) const;
  void ended(IoRequest::Op op, Extent& extent, std::uint64_t length,
             const std::exception_ptr& error);

  AioConfig config;
  const std::string wanted_engine;
  const IoEngineFactory engine_factory;
  bool verify;
  StripeMap stripes;
  std::vector<std::unique_ptr<Drive>> drives;
  std::size_t granule = 0;
  std::string granule_of;  ///< Which directory demands it.
  std::size_t memory_alignment = 0;
  std::string engine;
  std::vector<std::string> notes;
  std::atomic<std::uint64_t> next_slot = 0;

  mutable Mutex mutex;
  StoreStats stats GUARDED_BY(mutex);  ///< Only the operations'.

  /// One per block device. The last member: their threads use the others.
  std::vector<std::unique_ptr<IoQueue>> queues;
};

void Store::Impl::add_drive(const std::filesystem::path& directory,
                            File scratch_or_other) {
  auto drive = std::make_unique<Drive>(std::move(scratch_or_other));
  const File& file = *drive->file;
  if (file.granule() > granule) {
    granule = file.granule();
    granule_of = directory.string();
  }
  memory_alignment = std::max(memory_alignment, file.memory_alignment());
  drives.push_back(std::move(drive));
}

void Store::Impl::add_queues(const StoreOptions& options) {
  std::map<std::uint64_t, IoQueue*> of_device;
  for (const std::unique_ptr<Drive>& drive : drives) {
    const File& file = *drive->file;
    IoQueue*& queue = of_device[file.identity().device];
    if (queue == nullptr) {
      MadeQueue made = make_queue(config, options.engine, file.direct(),
                                  options.engine_factory);
      queue = made.queue.get();
      queues.push_back(std::move(made.queue));
      if (!made.note.empty()) add_note(made.note);
      if (engine.find(made.engine) == std::string::npos) {
        engine += (engine.empty() ? "" : ", ") + made.engine;
      }
    }
    if (!file.direct()) add_note(file.buffered_reason());
    if (!file.reserves()) add_note(file.unreserved_note());
    if (file.in_memory()) {
      add_note(file.path() +
               " is on a file system in memory (tmpfs): what is moved there "
               "stays in host memory; give a directory on a drive");
    }
    drive->queue = queue;
  }
}

void Store::Impl::add_note(const std::string& note) {
  if (std::find(notes.begin(), notes.end(), note) == notes.end()) {
    notes.push_back(note);
  }
}

std::uint64_t Store::Impl::bytes_on(std::size_t drive,
                                    const Extent& extent) const {
  const std::uint64_t last = last_slot(extent);
  const std::uint64_t blocks = stripes.count(drive, extent.first_slot_, last);
  if (blocks == 0) return 0;
  const std::uint64_t missing =
      (last - extent.first_slot_) * config.block_size - extent.padded_size_;
  return blocks * config.block_size -
         (stripes.drive_of(last - 1) == drive ? missing : 0);
}

void Store::Impl::check(const Request& request) const {
  const auto& [extent, offset, bytes, done, priority, caller] = request;
  if (extent == nullptr || extent->store_.get() != this) {
    throw std::invalid_argument("store: the extent is not of this store");
  }
  const std::uint64_t padded = extent->padded_size_;
  if (!is_aligned(offset, config.block_size) || offset > padded ||
      bytes.size() > padded - offset ||
      (!is_aligned(bytes.size(), config.block_size) &&
       offset + bytes.size() != padded) ||
      !is_aligned(bytes.data(), memory_alignment)) {
    throw std::invalid_argument(
        "store: offset " + std::to_string(offset) + " and length " +
        std::to_string(bytes.size()) + " do not fit an extent of " +
        std::to_string(padded) + " bytes in blocks of " +
        std::to_string(config.block_size) +
        ", or the address is not a multiple of " +
        std::to_string(memory_alignment));
  }
}

std::span<std::uint64_t> Store::Impl::checksums_of(Extent& extent,
                                                   std::uint64_t offset,
                                                   std::uint64_t length) const {
  if (!verify || length == 0) return {};
  const std::uint64_t first = offset / config.block_size;
  const std::uint64_t last =
      align_up(offset + length, config.block_size) / config.block_size;
  return std::span(extent.checksums_).subspan(first, last - first);
}

std::vector<Store::Impl::Part> Store::Impl::parts_of(
    IoRequest::Op op, const Request& request) const {
  Extent& extent = *request.extent;
  const std::span<std::byte> bytes = request.bytes;
  std::vector<Part> parts;
  std::uint64_t slot = extent.first_slot_ + request.offset / config.block_size;
  std::size_t begin = 0;
  do {
    const std::size_t drive = stripes.drive_of(slot);
    const std::uint64_t before =
        stripes.count(drive, extent.first_slot_, slot) * config.block_size;
    std::size_t end = begin;
    do {
      end += std::min<std::size_t>(config.block_size, bytes.size() - end);
      ++slot;
    } while (end < bytes.size() && stripes.drive_of(slot) == drive);
    IoOperation part{
        .op = op,
        .file = drives[drive]->file,
        // Without bytes there may be no space.
        .offset = bytes.empty() ? 0 : extent.offsets_[drive] + before,
        .bytes = bytes.subspan(begin, end - begin),
        .checksums = checksums_of(extent, request.offset + begin, end - begin),
        .priority = request.priority,
        .caller = request.caller};
    parts.push_back({drives[drive]->queue, std::move(part)});
    begin = end;
  } while (begin < bytes.size());
  return parts;
}

Ticket Store::Impl::move_head(IoRequest::Op op, std::size_t directory,
                              std::uint64_t offset,
                              std::span<std::byte> bytes) const {
  const Drive& drive = *drives.at(directory);
  if (offset > kHeadBytes || bytes.size() > kHeadBytes - offset ||
      !is_aligned(offset, granule) || !is_aligned(bytes.size(), granule) ||
      !is_aligned(bytes.data(), memory_alignment)) {
    throw std::invalid_argument("store: offset " + std::to_string(offset) +
                                " and length " + std::to_string(bytes.size()) +
                                " do not fit the head of a file");
  }
  return drive.queue->submit(
      {.op = op, .file = drive.file, .offset = offset, .bytes = bytes});
}

Ticket Store::Impl::submit(IoRequest::Op op, Request request, bool compare) {
  check(request);
  std::vector<Part> parts = parts_of(op, request);
  if (!compare) {
    for (Part& part : parts) part.operation.checksums = {};
  }
  Done last = [this, op, length = request.bytes.size(),
               extent = std::move(request.extent),
               done =
                   std::move(request.done)](std::exception_ptr error) mutable {
    ended(op, *extent, length, error);
    // Whoever hears of the end may count on the space being free.
    extent.reset();
    if (done) done(error);
  };
  if (parts.size() == 1) {
    parts[0].operation.on_done = std::move(last);
    Ticket ticket = parts[0].queue->submit(std::move(parts[0].operation));
    if (op == IoRequest::Op::kWrite) cut_point("write issued");
    return ticket;
  }
  const auto join = std::make_shared<Join>(parts.size(), std::move(last));
  // All are started or none. If only some were started, this thread would have
  // to report the end, and it may hold a lock that `done` needs.
  std::vector<IoQueue::Prepared> prepared;
  prepared.reserve(parts.size());
  std::vector<std::pair<IoQueue*, Ticket>> started;
  started.reserve(parts.size());
  for (auto& [queue, operation] : parts) {
    operation.on_done = [join](std::exception_ptr error) { join->end(error); };
    prepared.push_back(queue->prepare(std::move(operation)));
  }
  for (std::size_t i = 0; i < parts.size(); ++i) {
    started.emplace_back(parts[i].queue,
                         parts[i].queue->start(std::move(prepared[i])));
    if (op == IoRequest::Op::kWrite) cut_point("write issued");
  }
  join->set_parts(std::move(started));
  return Ticket(join);
}

void Store::Impl::ended(IoRequest::Op op, Extent& extent, std::uint64_t length,
                        const std::exception_ptr& error) {
  if (op == IoRequest::Op::kWrite) cut_point("write ended");
  const MutexLock lock(mutex);
  if (error == nullptr) {
    const bool read = op == IoRequest::Op::kRead;
    (read ? stats.bytes_read : stats.bytes_written) += length;
    (read ? stats.read_ops : stats.write_ops) += 1;
    return;
  }
  try {
    std::rethrow_exception(error);
  } catch (const IoError& failed) {
    // Space that the drive could not write is not offered again.
    if (op == IoRequest::Op::kWrite && failed.error() == EIO) {
      extent.quarantined_ = true;
    }
  } catch (...) {
  }
}

Store::Store(const StoreOptions& options)
    : impl_(std::make_shared<Impl>(options)) {}

Store::~Store() {
  // Extents may live on, and keep the space maps. The threads may not.
  impl_->queues.clear();
}

std::shared_ptr<Extent> Store::allocate(std::uint64_t bytes) {
  try {
    return allocate(bytes, true);
  } catch (...) {
    trim();
    throw;
  }
}

void Store::trim() noexcept {
  for (const std::unique_ptr<Drive>& drive : impl_->drives) drive->trim();
}

void Store::check_room(std::uint64_t bytes) const {
  for (std::size_t i = 0; i < impl_->drives.size(); ++i) {
    const StripeMap& stripes = impl_->stripes;
    impl_->drives[i]->check_room(bytes / stripes.period() *
                                 stripes.count(i, 0, stripes.period()));
  }
}

std::shared_ptr<Extent> Store::try_allocate(std::uint64_t bytes) {
  return allocate(bytes, false);
}

std::shared_ptr<Extent> Store::allocate(std::uint64_t bytes, bool may_grow) {
  if (bytes > std::uint64_t{1} << 62) {
    throw std::invalid_argument("store: an extent of " + std::to_string(bytes) +
                                " bytes");
  }
  const std::uint64_t first =
      impl_->next_slot.fetch_add(blocks_of(bytes)) % impl_->stripes.period();
  return allocate_at(first, bytes, may_grow);
}

std::shared_ptr<Extent> Store::allocate_at(std::uint64_t first_slot,
                                           std::uint64_t bytes, bool may_grow) {
  std::shared_ptr<Extent> extent(new Extent);
  if (impl_->verify) extent->checksums_.resize(blocks_of(bytes));
  extent->offsets_.assign(impl_->drives.size(), kNoSpace);
  extent->first_slot_ = first_slot;
  extent->size_ = bytes;
  extent->padded_size_ = align_up(bytes, granule());
  // If a drive has no space, the extent gives back what it took of the drives
  // before.
  extent->store_ = impl_;
  for (std::size_t i = 0; i < impl_->drives.size(); ++i) {
    const std::uint64_t part = impl_->bytes_on(i, *extent);
    if (part == 0) continue;
    const auto offset = impl_->drives[i]->take(part, may_grow);
    if (!offset) return nullptr;
    extent->offsets_[i] = *offset;
  }
  return extent;
}

std::shared_ptr<Extent> Store::adopt(const Place& place,
                                     std::vector<std::uint64_t> checksums) {
  const auto refuse = [&place](const std::string& why) {
    throw std::invalid_argument("store: an extent of " +
                                std::to_string(place.size) + " bytes " + why);
  };
  const std::size_t drives = impl_->drives.size();
  if (place.size > std::uint64_t{1} << 62) refuse("is too large");
  if (place.offsets.size() != drives) refuse("is not of so many directories");
  if (place.first_slot >= impl_->stripes.period()) refuse("has no such slot");
  const std::uint64_t blocks = blocks_of(place.size);
  if (impl_->verify && !checksums.empty() && checksums.size() != blocks) {
    refuse("has " + std::to_string(checksums.size()) + " checksums, not " +
           std::to_string(blocks));
  }
  std::shared_ptr<Extent> extent(new Extent);
  extent->offsets_.assign(drives, kNoSpace);
  extent->first_slot_ = place.first_slot;
  extent->size_ = place.size;
  extent->padded_size_ = align_up(place.size, granule());
  extent->store_ = impl_;
  for (std::size_t i = 0; i < drives; ++i) {
    const std::uint64_t part = impl_->bytes_on(i, *extent);
    const std::uint64_t offset = place.offsets[i];
    if (part == 0 && offset == kNoSpace) continue;
    if (part == 0 || !is_aligned(offset, granule()) ||
        !impl_->drives[i]->take_at(offset, part)) {
      refuse("cannot lie at " + std::to_string(offset) + " in " +
             impl_->drives[i]->file->path());
    }
    extent->offsets_[i] = offset;
  }
  if (impl_->verify) {
    extent->checksums_ = std::move(checksums);
    extent->checksums_.resize(blocks);
  }
  return extent;
}

std::shared_ptr<Extent> Store::allocate_like(const Place& place) {
  try {
    return allocate_at(place.first_slot % impl_->stripes.period(), place.size,
                       true);
  } catch (...) {
    trim();
    throw;
  }
}

bool Store::share(const Extent& from, const std::shared_ptr<Extent>& extent) {
  const Impl& theirs = *from.store_;
  if (from.padded_size_ != extent->padded_size_ ||
      from.offsets_.size() != extent->offsets_.size()) {
    return false;
  }
  for (std::size_t i = 0; i < extent->offsets_.size(); ++i) {
    const std::uint64_t part = impl_->bytes_on(i, *extent);
    if (part != theirs.bytes_on(i, from)) return false;
    if (part == 0) continue;
    if (!impl_->drives[i]->file->share(*theirs.drives[i]->file,
                                       from.offsets_[i], extent->offsets_[i],
                                       part)) {
      return false;
    }
  }
  extent->checksums_ = from.checksums_;
  return true;
}

StoreOptions Store::options_for(const DirectoryList& directory) const {
  return {.directory = directory,
          .aio = impl_->config,
          .engine = impl_->wanted_engine,
          .verify = impl_->verify,
          .engine_factory = impl_->engine_factory};
}

std::uint64_t Store::blocks_of(std::uint64_t bytes) const noexcept {
  const std::uint64_t block = impl_->config.block_size;
  return align_up(align_up(bytes, granule()), block) / block;
}

Place Extent::place() const { return {size_, first_slot_, offsets_}; }

Ticket Store::write_head(std::size_t directory, std::uint64_t offset,
                         std::span<const std::byte> bytes) {
  auto* const data = const_cast<std::byte*>(bytes.data());
  return impl_->move_head(IoRequest::Op::kWrite, directory, offset,
                          {data, bytes.size()});
}

Ticket Store::read_head(std::size_t directory, std::uint64_t offset,
                        std::span<std::byte> bytes) {
  return impl_->move_head(IoRequest::Op::kRead, directory, offset, bytes);
}

void Store::sync(std::size_t directory) {
  const Drive& drive = *impl_->drives.at(directory);
  drive.queue->submit({.op = IoRequest::Op::kSync, .file = drive.file}).wait();
}

void Store::sync() {
  std::vector<Ticket> tickets;
  std::exception_ptr error;
  for (const std::unique_ptr<Drive>& drive : impl_->drives) {
    tickets.push_back(drive->queue->submit(
        {.op = IoRequest::Op::kSync, .file = drive->file}));
  }
  for (const Ticket& ticket : tickets) {
    try {
      ticket.wait();
    } catch (...) {
      if (error == nullptr) error = std::current_exception();
    }
  }
  if (error != nullptr) std::rethrow_exception(error);
}

void Store::give_names(const std::vector<std::string>& names) {
  // Whoever finds the first file finds all.
  for (std::size_t i = impl_->drives.size(); i-- > 0;) {
    impl_->drives[i]->give_name(names.at(i));
  }
}

bool Store::verifies() const noexcept { return impl_->verify; }

std::size_t Store::directories() const noexcept { return impl_->drives.size(); }

const File& Store::file(std::size_t directory) const {
  return *impl_->drives.at(directory)->file;
}

std::vector<std::uint32_t> Store::weights() const {
  const StripeMap& stripes = impl_->stripes;
  std::vector<std::uint32_t> weights;
  for (std::size_t i = 0; i < stripes.drives(); ++i) {
    weights.push_back(
        static_cast<std::uint32_t>(stripes.count(i, 0, stripes.period())));
  }
  return weights;
}

Ticket Store::read_unchecked(const std::shared_ptr<Extent>& extent,
                             std::span<std::byte> bytes) {
  return impl_->submit(IoRequest::Op::kRead, {.extent = extent, .bytes = bytes},
                       /*compare=*/false);
}

std::uint64_t Extent::offset(std::size_t directory) const {
  return offsets_.at(directory);
}

Extent::~Extent() {
  if (store_ == nullptr) return;
  for (std::size_t i = 0; i < offsets_.size(); ++i) {
    if (offsets_[i] == kNoSpace) continue;
    Drive& drive = *store_->drives[i];
    const std::uint64_t bytes = store_->bytes_on(i, *this);
    quarantined_ ? drive.give_up(bytes) : drive.give(offsets_[i], bytes);
  }
}

Ticket Store::write(Request request) {
  return impl_->submit(IoRequest::Op::kWrite, std::move(request));
}

Ticket Store::read(Request request) {
  return impl_->submit(IoRequest::Op::kRead, std::move(request));
}

bool Store::promote(const Ticket& ticket, IoPriority priority) {
  if (const auto* join = dynamic_cast<const Join*>(ticket.state_.get())) {
    bool some = false;
    for (const auto& [queue, part] : join->parts()) {
      some |= queue->promote(part, priority);
    }
    return some;
  }
  return std::ranges::any_of(impl_->queues, [&](const auto& queue) {
    return queue->promote(ticket, priority);
  });
}

const AioConfig& Store::config() const noexcept { return impl_->config; }

std::size_t Store::granule() const noexcept { return impl_->granule; }

std::size_t Store::memory_alignment() const noexcept {
  return impl_->memory_alignment;
}

const std::string& Store::engine() const noexcept { return impl_->engine; }

const std::vector<std::string>& Store::notes() const noexcept {
  return impl_->notes;
}

StoreStats Store::stats() const {
  StoreStats result;
  {
    const MutexLock lock(impl_->mutex);
    result = impl_->stats;
  }
  for (const std::unique_ptr<Drive>& drive : impl_->drives) {
    result.allocated += drive->allocated();
    result.file_size += drive->file_size();
  }
  return result;
}

}  // namespace torch_ext
