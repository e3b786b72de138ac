// Commits of an optimizer's state, and how a later process goes on from one.
//
// A tile's place on the drive is an extent. After a commit, the places of all
// tiles are the commit's, and each tile has a spare for its next write
// (TileLanes). So a step moves as many bytes as without commits. When a later
// commit has become durable, the places of the one before are spares again.
//
// A commit writes what is not on the drive yet: the values, the resident tiles
// that have changed, and those that no step has visited. It sees to it first
// that every tile has a place now and a spare afterwards, so that a full drive
// refuses here and not in a step. CommitLog does the rest. running_commit.cpp
// has the order of all that, and what may go on beside it.
//
// Values are laid out in tiles of their own, and pass through the same buffers
// in a round of their own.

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <utility>

#include "base/cut_point.h"
#include "base/error_detail.h"
#include "commit_document.h"
#include "optimizer_impl.h"
#include "running_commit.h"
#include "torch_ext/base/size.h"
#include "torch_ext/io/file.h"

namespace torch_ext {
void OptimizerOffload::Impl::disown(const std::vector<Tile*>& gone) {
  const std::set<Tile*> all(gone.begin(), gone.end());
  for (auto& [generation, tiles_of_it] : owners) {
    for (Tile*& tile : tiles_of_it) {
      if (all.contains(tile)) tile = nullptr;
    }
  }
}

// A commit may find no room for other values than those of the commit before.
// So what is replaced is kept until it has found some, and then disowned.
void OptimizerOffload::Impl::lay_out_values(
    RunningCommit& commit, std::span<const CommittedValue> wanted) {
  if (std::ranges::equal(wanted, values)) return;
  TileList laid_out;
  TileLayout filler(laid_out, plan.tile_bytes);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i].element_bytes < 1 || wanted[i].element_bytes > 64) {
      throw std::invalid_argument("commit: a value's elements have " +
                                  std::to_string(wanted[i].element_bytes) +
                                  " bytes; they may have 1 to 64");
    }
    filler.add(i, wanted[i].elements, fields_of(wanted[i]));
  }
  for (const auto& tile : laid_out) tile->holds_state = false;
  for (std::size_t i = 0; i < std::min(laid_out.size(), value_tiles.size());
       ++i) {
    if (laid_out[i]->bytes == value_tiles[i]->bytes) {
      laid_out[i]->spares.swap(value_tiles[i]->spares);
    }
  }
  commit.replaced =
      ValueLayout{std::move(values), std::exchange(value_tiles, {})};
  value_tiles = std::move(laid_out);
  values.assign(wanted.begin(), wanted.end());
  layout.clear();
}

void OptimizerOffload::Impl::put_back_values(RunningCommit& commit) {
  if (!commit.replaced) return;
  TileList& before = commit.replaced->tiles;
  for (std::size_t i = 0; i < std::min(before.size(), value_tiles.size());
       ++i) {
    Tile& tile = *value_tiles[i];
    if (tile.extent != nullptr) tile.spares.push_back(std::move(tile.extent));
    for (auto& spare : tile.spares) {
      before[i]->spares.push_back(std::move(spare));
    }
  }
  value_tiles = std::move(before);
  values = std::move(commit.replaced->values);
  layout.clear();
  commit.replaced.reset();
}

// Gives every tile a place for what this commit writes of it, and sees to it
// that it has a spare afterwards: all tiles or none.
void OptimizerOffload::Impl::make_room_for_commit(std::size_t keep,
                                                  bool commits_now) {
  std::set<const Tile*> get_one_back;
  const std::vector<Commit>& commits = log->commits();
  const std::size_t after = commits.size() + 1;
  for (std::size_t i = 0; i + keep < after; ++i) {
    const auto& owners_of_it = owners[commits[i].generation];
    for (std::size_t j = 0; j < owners_of_it.size(); ++j) {
      const Tile* tile = owners_of_it[j];
      const std::shared_ptr<Extent>& extent = commits[i].extents[j];
      if (tile == nullptr) continue;
      const bool leaves_it = extent == tile->extent && is_written_anew(*tile);
      if (extent.use_count() == (leaves_it ? 2 : 1)) get_one_back.insert(tile);
    }
  }
  std::vector<Tile*> needed;
  std::uint64_t bytes = 0;
  for (const TileList* list : {&tiles, &value_tiles}) {
    for (const auto& tile : *list) {
      // If its place could not be written, it needs another one now: one that
      // comes back later will not do.
      tile->take_spare_if_nowhere();
      const std::size_t places = tile->spares.size() +
                                 (tile->extent != nullptr ? 1 : 0) +
                                 (get_one_back.contains(tile.get()) ? 1 : 0);
      const std::size_t wanted = commits_now && is_written_anew(*tile) ? 3 : 2;
      for (std::size_t i = places; i < wanted; ++i) {
        needed.push_back(tile.get());
        bytes += align_up(tile->bytes, granule);
      }
    }
  }
  if (needed.empty()) return;
  std::vector<std::shared_ptr<Extent>> found;
  try {
    store->check_room(bytes);
    for (const Tile* tile : needed)
      found.push_back(store->allocate(tile->bytes));
  } catch (...) {
    found.clear();
    store->trim();
    std::rethrow_exception(with_detail(
        std::current_exception(),
        "a commit needs " + format_size(bytes) +
            " more here: space for a second copy of state and parameters, and "
            "for each further commit that keep= retains"));
  }
  for (std::size_t i = 0; i < needed.size(); ++i) {
    Tile& tile = *needed[i];
    if (tile.extent == nullptr) {
      tile.extent = std::move(found[i]);
    } else {
      tile.spares.push_back(std::move(found[i]));
    }
  }
}

// Writes the tiles that no step has written: their parameters have room, or
// state that is all zeros. Readers compare the checksums of all bytes, whoever
// has no state there.
void OptimizerOffload::Impl::write_untouched() {
  TileLanes::Round round;
  round.read = round.repeat = false;
  round.for_commit = true;
  for (const auto& tile : tiles) {
    if (!tile->on_disk && !tile->in_memory) round.tiles.push_back(tile.get());
  }
  const std::vector<Tile*> untouched = round.tiles;
  if (untouched.empty()) return;
  // Zeros are not lost if a write fails.
  for (Tile* tile : untouched) tile->holds_state = false;
  std::exception_ptr error;
  try {
    lanes->run(std::move(round), [](Tile& tile, bool) {
      std::fill_n(tile.buffer.data(), tile.buffer.size(), std::byte{0});
    });
  } catch (...) {
    error = std::current_exception();
  }
  try {
    lanes->settle();
  } catch (...) {
    if (error == nullptr) error = std::current_exception();
  }
  for (Tile* tile : untouched) {
    tile->holds_state = true;
    // The space that could not be written is not used again.
    tile->take_spare_if_nowhere();
  }
  if (error != nullptr) std::rethrow_exception(error);
}

void OptimizerOffload::Impl::visit_values(TileLanes::Round round,
                                          UpdateKernel& kernel) {
  round.tiles = tile_pointers(value_tiles);
  if (round.tiles.empty()) return;
  // Resident tiles may have all buffers. Some give theirs back for a while.
  const std::size_t wanted =
      std::min({round.tiles.size(), plan.lanes, std::size_t{3}});
  if (!lanes->make_way(tiles, wanted)) {
    lanes->write_residents(tiles);
    lanes->settle();
    if (!lanes->make_way(tiles, wanted)) {
      throw StateError(
          "host memory is full of state that no commit has: commit first");
    }
  }
  lanes->run(std::move(round), [&kernel](Tile& tile, bool fresh) {
    if (fresh)
      std::fill_n(tile.buffer.data(), tile.buffer.size(), std::byte{0});
    std::vector<StateSegment> segments;
    for (const Segment& in : tile.segments) {
      segments.push_back({.parameter = in.parameter,
                          .first = in.first,
                          .count = in.count,
                          .fields = {tile.buffer.data() + in.offset}});
    }
    kernel.update(segments);
  });
}

std::string OptimizerOffload::Impl::document_of(const std::string& of_caller) {
  if (layout.empty()) {
    layout = layout_json(tiles, values, value_tiles, plan.tile_bytes);
  }
  std::vector<CommitDocument::Parameter> all;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = parameters[i];
    all.push_back({i, p.elements, p.fields, p.step, p.has_state});
  }
  return make_document(layout, all, of_caller);
}

// Makes parameters and tiles of a commit. There are no tiles yet.
void OptimizerOffload::Impl::take_commit(const Commit& commit,
                                         const CommitDocument& document) {
  for (const CommitDocument::Parameter& in : document.parameters) {
    if (in.number >= parameters.size()) parameters.resize(in.number + 1);
    parameters[in.number] = {.elements = in.elements,
                             .fields = in.fields,
                             .step = in.step,
                             .placed = in.has_state,
                             .has_state = in.has_state};
  }
  std::size_t next = 0;
  const auto take = [&](const CommitDocument::TileContent& in, TileList& list) {
    auto tile = std::make_unique<Tile>();
    tile->number = list.size();
    tile->segments = in.segments;
    tile->bytes = in.bytes;
    tile->extent = commit.extents[next++];
    tile->committed = tile->on_disk = true;
    list.push_back(std::move(tile));
  };
  for (const auto& in : document.tiles) take(in, tiles);
  for (const auto& in : document.value_tiles) take(in, value_tiles);
  values = document.values;
  const std::size_t stay = plan.resident(tiles.size());
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    Tile* const tile = tiles[i].get();
    tile->resident = is_chosen(i, tiles.size(), stay);
    order.push_back(tile);
    for (const Segment& segment : tile->segments) {
      Parameter& p = parameters[segment.parameter];
      p.placed = true;
      p.tiles.push_back(tile);
    }
  }
  for (const auto& tile : value_tiles) tile->holds_state = false;
  std::vector<Tile*> all = tile_pointers(tiles);
  for (const auto& tile : value_tiles) all.push_back(tile.get());
  owners[commit.generation] = std::move(all);
  make_room_for_commit(log->commits().size() + 1, /*commits_now=*/false);
}

OptimizerOffload::OptimizerOffload(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)) {}

namespace {

/// A store that was committed, and how it was made.
struct Found {
  TileOptions options;
  std::unique_ptr<Store> store;
  std::unique_ptr<CommitLog> log;
};

/// Reads a commit's document. `path` is for errors.
CommitDocument read_document(const Commit& commit, const std::string& path) {
  try {
    CommitDocument document = parse_document(commit.document);
    const auto& tiles = document.tiles;
    const auto& values = document.value_tiles;
    if (tiles.size() + values.size() != commit.extents.size()) {
      throw FormatError("its document has other tiles");
    }
    for (std::size_t i = 0; i < commit.extents.size(); ++i) {
      const auto& tile = i < tiles.size() ? tiles[i] : values[i - tiles.size()];
      if (commit.extents[i]->size() != tile.bytes) {
        throw FormatError("its document has tiles of other sizes");
      }
    }
    return document;
  } catch (const FormatError& error) {
    throw IoError({.op = "read commit",
                   .path = path,
                   .error = EIO,
                   .detail = error.what()});
  }
}

const Commit& find_generation(const CommitLog& log, std::uint64_t generation) {
  const std::vector<Commit>& all = log.commits();
  const auto found =
      generation == 0 ? std::ranges::max_element(all, {}, &Commit::generation)
                      : std::ranges::find(all, generation, &Commit::generation);
  if (found != all.end()) return *found;
  throw std::invalid_argument("commit: there is no generation " +
                              std::to_string(generation));
}

std::vector<OptimizerOffload::Committed> describe(const CommitLog& log,
                                                  const std::string& path) {
  std::vector<OptimizerOffload::Committed> all;
  for (const Commit& commit : log.commits()) {
    all.push_back({commit.generation, commit.step, commit.time,
                   read_document(commit, path).of_caller});
  }
  std::ranges::sort(all, {}, &OptimizerOffload::Committed::generation);
  return all;
}

/// How many drives a store has, if its first file says so.
std::size_t drives_of(const std::filesystem::path& first_file) {
  try {
    return read_header(File::open(first_file, File::Mode::kRead))
        .weights.size();
  } catch (const std::exception&) {
    return 0;
  }
}

/// Each directory has the file of its number, or none has any: then nothing was
/// committed.
void check_files(const StoreOptions& how, const StoreName& name) {
  const auto& directories = how.directory.all();
  std::map<std::size_t, std::filesystem::path> found;  // By drive.
  std::size_t missing = directories.size();
  for (std::size_t i = 0; i < directories.size(); ++i) {
    const std::filesystem::path& directory = directories[i].path;
    if (File::exists(directory / how.files[i])) {
      found[i] = directory;
    } else if (missing == directories.size()) {
      missing = i;
    }
    for (const StoreName::File& file : name.files_in(directory)) {
      if (file.store == name) found.try_emplace(file.directory, directory);
    }
  }
  if (missing == directories.size() || found.empty()) return;
  const std::string wanted =
      directories[missing].path.string() + " has no " + how.files[missing];
  const std::string seen =
      absolute_path(found.begin()->second / name.of_file(found.begin()->first));
  if (!found.contains(0)) {
    throw std::invalid_argument(
        wanted + ", but another file of this store is there, " + seen +
        ": give all of its directories, in the order in which it was made. If "
        "its first commit was cut off, remove that file");
  }
  std::string text = wanted + ": ";
  const std::size_t drives = drives_of(seen);
  if (drives != 0 && drives != directories.size()) {
    text += other_directories(drives, directories.size());
  } else {
    text +=
        "the directories are not all of the store's, or not in its order. "
        "Python's resume() moves the state to others with nvme_path=";
  }
  for (const auto& [drive, directory] : found) {
    text += (drive == 0 ? " (drive " : ", drive ") + std::to_string(drive) +
            ": " + directory.string();
  }
  throw std::invalid_argument(text + ")");
}

Found find(const TileOptions& options, std::uint64_t newest = 0) {
  Found found{options, nullptr, nullptr};
  StoreOptions& how = found.options.store;
  how.files.clear();
  for (std::size_t i = 0; i < how.directory.all().size(); ++i) {
    how.files.push_back(options.name.of_file(i));
  }
  check_files(how, options.name);
  found.store = std::make_unique<Store>(how);
  const std::uint64_t block_size = read_header(*found.store).block_size;
  if (block_size != how.aio.block_size) {
    // Blocks are as large as they were.
    how.aio.block_size = block_size;
    found.store.reset();
    found.store = std::make_unique<Store>(how);
  }
  found.log = CommitLog::open(*found.store, options.name, newest);
  return found;
}

}  // namespace

const Commit& OptimizerOffload::Impl::kept_commit(
    std::uint64_t generation) const {
  if (log == nullptr || log->commits().empty()) {
    throw std::invalid_argument("commit: nothing was committed");
  }
  return find_generation(*log, generation);
}

CommitDocument OptimizerOffload::Impl::document_of(const Commit& commit) const {
  CommitDocument document = read_document(commit, store->file().path());
  if (document.tile_bytes == plan.tile_bytes) return document;
  throw IoError({.op = "read commit",
                 .path = store->file().path(),
                 .error = EIO,
                 .detail = "its document has tiles of another size"});
}

std::unique_ptr<OptimizerOffload> OptimizerOffload::resume(
    const TileOptions& options, const CommitChoice& choice) {
  Found found = find(options, choice.newest);
  const CommitDocument document =
      read_document(find_generation(*found.log, choice.generation),
                    found.store->file().path());
  auto impl = std::make_unique<Impl>(found.options, std::move(found.store),
                                     document.tile_bytes);
  {
    const Impl::Call call(*impl);
    const std::vector<std::string>& said = found.log->notes();
    impl->notes.insert(impl->notes.end(), said.begin(), said.end());
    impl->log = std::move(found.log);
    impl->take_commit(impl->kept_commit(choice.generation), document);
  }
  return std::unique_ptr<OptimizerOffload>(
      new OptimizerOffload(std::move(impl)));
}

std::vector<std::vector<OptimizerOffload::Committed>>
OptimizerOffload::find_commits(const TileOptions& options) {
  Found found = find(options);
  const std::string path = found.store->file().path();
  std::vector<std::vector<Committed>> all{describe(*found.log, path)};
  const std::uint64_t last = found.log->commits().back().generation;
  found.log.reset();  // It has the lock, and the space of its commits.
  if (last == 1) return all;
  try {
    found.log = CommitLog::open(*found.store, options.name, last - 1);
    all.push_back(describe(*found.log, path));
  } catch (const std::exception&) {
    // It was given up long ago.
  }
  return all;
}

std::vector<OptimizerOffload::Committed> OptimizerOffload::commits() const {
  const Impl::Call call(*impl_);
  if (impl_->log == nullptr) return {};
  return describe(*impl_->log, impl_->store->file().path());
}

void OptimizerOffload::renew(std::uint64_t generation) {
  const Impl::Call call(*impl_);
  impl_->kept_commit(generation);
  impl_->log->renew(generation);
}

std::uint64_t OptimizerOffload::same_commit(const std::string& document) {
  const Impl::Call call(*impl_);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  if (impl_->log == nullptr) return 0;
  impl_->log->check();
  impl_->lanes->settle();
  std::vector<std::shared_ptr<Extent>> extents;
  for (const auto& tile : impl_->tiles) {
    if (!tile->committed || tile->dirty) return 0;
    extents.push_back(tile->extent);
  }
  const std::string text = impl_->document_of(document);
  for (const Commit& commit : impl_->log->commits()) {
    if (commit.extents == extents && commit.document == text) {
      return commit.generation;
    }
  }
  return 0;
}

OptimizerOffload::Contents OptimizerOffload::contents(
    std::uint64_t generation) const {
  const Impl::Call call(*impl_);
  CommitDocument document = impl_->document_of(impl_->kept_commit(generation));
  Contents contents{{}, std::move(document.values)};
  for (const CommitDocument::Parameter& in : document.parameters) {
    contents.parameters.push_back(
        {in.elements, in.fields, in.step, in.has_state});
  }
  return contents;
}

void OptimizerOffload::rollback(std::uint64_t generation,
                                UpdateKernel& reader) {
  const Impl::Call call(*impl_);
  const Commit& commit = impl_->kept_commit(generation);
  const CommitDocument document = impl_->document_of(commit);
  if (impl_->log->must_stop() != nullptr) {
    std::rethrow_exception(impl_->log->must_stop());
  }
  impl_->give_up_open_step();
  impl_->clear_tiles();  // Their failure goes with them.
  impl_->disown(tile_pointers(impl_->value_tiles));
  impl_->value_tiles.clear();
  impl_->values.clear();
  impl_->unused.clear();
  impl_->refusal = nullptr;
  cut_point("state given up");
  try {
    impl_->take_commit(commit, document);
    cut_point("commit taken");
    impl_->read_values(reader);
    cut_point("rolled back");
  } catch (...) {
    impl_->refusal = with_detail(
        std::current_exception(),
        "the optimizer is not wholly back at the commit: roll back again, or "
        "load a state");
    std::rethrow_exception(impl_->refusal);
  }
}

SnapshotReport OptimizerOffload::snapshot(const DirectoryList& directory,
                                          const SnapshotGroup& group) {
  const auto start = std::chrono::steady_clock::now();
  return voted(group.vote, [&](const CommitLog::Vote& vote) {
    const Impl::Call call(*impl_);
    StoreCopy copy = impl_->copy_to(directory, group.place);
    const StoreCopy::Report made = copy.make(group.replace, vote);
    const std::chrono::duration<double> seconds =
        std::chrono::steady_clock::now() - start;
    return SnapshotReport{.step = impl_->log->commits().back().step,
                          .reflink = made.reflink,
                          .bytes = made.bytes,
                          .seconds = seconds.count()};
  });
}

OptimizerOffload::SnapshotPlace OptimizerOffload::look_at_snapshot(
    const DirectoryList& directory, const SnapshotGroup& group) const {
  const Impl::Call call(*impl_);
  switch (impl_->copy_to(directory, group.place).there()) {
    case StoreCopy::There::kNothing:
      return SnapshotPlace::kFree;
    case StoreCopy::There::kUnfinished:
      return SnapshotPlace::kUnfinished;
    case StoreCopy::There::kCopy:
      return SnapshotPlace::kSnapshot;
    case StoreCopy::There::kOther:
      break;
  }
  return SnapshotPlace::kOther;
}

void OptimizerOffload::refuse_others_at_snapshot(
    const DirectoryList& directory, const SnapshotGroup& group) const {
  const Impl::Call call(*impl_);
  impl_->copy_to(directory, group.place).refuse_others();
}

StoreCopy OptimizerOffload::Impl::copy_to(const DirectoryList& directory,
                                          const std::string& place) {
  if (log == nullptr || log->commits().empty()) {
    throw StateError("snapshot: nothing was committed yet");
  }
  return {*store, *log, directory, place};
}

std::uint64_t OptimizerOffload::next_generation() const {
  const Impl::Call call(*impl_);
  return impl_->log != nullptr ? impl_->log->next_generation() : 1;
}

std::size_t OptimizerOffload::parameters() const {
  const Impl::Call call(*impl_, Impl::After::kNoCommit);
  return impl_->parameters.size();
}

void OptimizerOffload::Impl::read_values(UpdateKernel& kernel) {
  TileLanes::Round round;
  round.write = round.repeat = false;
  visit_values(std::move(round), kernel);
}

void OptimizerOffload::read_values(UpdateKernel& kernel) {
  const Impl::Call call(*impl_);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  if (impl_->log == nullptr || impl_->log->commits().empty()) {
    throw StateError("read_values: there is no commit");
  }
  impl_->read_values(kernel);
}

}  // namespace torch_ext
