#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

#include "commit_reader.h"

namespace torch_ext {

/// How read_store() reads.
struct StoreCheck {
  bool extents = false;  ///< Read all extents too, and compare checksums.
  /// Bytes of extents that were read, and of all. It is called now and then, on
  /// the calling thread. What it throws ends the reading.
  std::function<void(std::uint64_t, std::uint64_t)> progress = {};
};

/// What a store has.
struct StoreReport {
  StoreHeader header;
  /// Oldest first, those that cannot be read too. Extents and tables tell only
  /// where they lie.
  std::vector<CommitReader::Found> commits;
  std::vector<StoreDamage> damage;
  /// Bytes of extents, tables and heads, padded; what commits share once.
  std::uint64_t committed = 0;
  std::uint64_t checked = 0;  ///< Bytes of extents that were read.
};

/// Reads the store in these files, in the order of their drives. It takes no
/// lock and writes nothing. If the owner has gone on with what was being read,
/// it begins again once.
/// Errors: IoError: EIO for a damaged header, EBUSY if the owner has gone on
/// twice, and what opening and reading say. std::invalid_argument if the files
/// are not those of a store of ours, or of a later version.
StoreReport read_store(const std::vector<std::filesystem::path>& files,
                       const StoreCheck& check);

/// Removes these files of a store, the first drive's first, if they are what
/// `store` says and nobody owns them. Links are not followed. The file of drive
/// 0 may be missing.
/// Errors: IoError: EAGAIN if a process uses the store, ESTALE if a name is
/// another file's now, and what unlink() says. Some may be gone then.
/// std::invalid_argument if a file is not of this store: nothing was removed.
void remove_store(const std::vector<std::filesystem::path>& files,
                  const StoreId& store);

}  // namespace torch_ext
