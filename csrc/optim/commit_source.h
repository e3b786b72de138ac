#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "commit_document.h"
#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/optim/update_kernel.h"

namespace torch_ext {

/// How a store is read by somebody who is not its owner.
struct SourceOptions {
  /// In the order of the store's drives.
  std::vector<std::filesystem::path> files = {};
  AioConfig aio = {};
  std::string engine = "auto";
  IoEngineFactory engine_factory = {};  ///< As in StoreOptions.
};

/// A commit that is read where it lies, in any order: to divide its state
/// anew, or to write it elsewhere. commit_source.cpp tells how. It takes no
/// lock and writes nothing.
///
/// Memory: the tiles that were read last, kTiles of them at most.
/// Threads: one at a time.
class CommitSource {
 public:
  static constexpr std::size_t kTiles = 6;

  /// `generation`: the commit's. Errors: IoError: ENOENT if the store does not
  /// have it, EIO for damage. std::invalid_argument if the files are not those
  /// of a store.
  CommitSource(const SourceOptions& options, std::uint64_t generation);
  ~CommitSource();
  CommitSource(const CommitSource&) = delete;
  CommitSource& operator=(const CommitSource&) = delete;

  /// What a store has, as OptimizerOffload::find_commits() says it. Errors:
  /// those of the constructor; ENOENT if nothing was committed.
  static std::vector<std::vector<OptimizerOffload::Committed>> list(
      const SourceOptions& options);

  const CommitDocument& document() const noexcept;
  const std::string& path() const noexcept;  ///< The first file's.

  /// Returns the segment that has an element of a parameter with state, or of a
  /// value, whose bytes are field 0. Its memory is this object's, and stays
  /// until a call after the next one.
  /// Errors: IoError: EIO for damage; ESTALE if the store's owner has made
  /// another commit in place of this one. std::out_of_range.
  const StateSegment& state_at(std::size_t parameter, std::uint64_t element);
  const StateSegment& value_at(std::size_t value, std::uint64_t element);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
