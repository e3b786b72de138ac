#pragma once

#include <fcntl.h>

#include <cerrno>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "support/faulty_engine.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"

namespace torch_ext::test {

inline constexpr std::size_t kForGood = std::numeric_limits<std::size_t>::max();

/// One fault of one request, or of one poll.
struct FaultKind {
  std::string name;
  bool for_good = false;
  /// It may be met by trying again: the call is to end without an error.
  bool survives = false;
  /// The kernel says "not now" for as long as the library asks.
  bool tries_patience = false;
  int error = 0;
  std::size_t transfer = 0;
  std::size_t refusals = 0;
  std::size_t polls = 0;
};

/// Whether the library asks again.
inline bool is_transient(int error) {
  return error == EINTR || error == EAGAIN || error == ENOMEM ||
         error == ECANCELED;
}

/// Every errno, length and refusal, once and for good.
inline std::vector<FaultKind> fault_kinds() {
  std::vector<FaultKind> all;
  for (const int error :
       {EIO,    ENOSPC,    EAGAIN, EINTR,  ENOMEM, EDQUOT, EROFS,     ENODEV,
        EBADF,  ETIMEDOUT, EINVAL, EFAULT, EPERM,  EACCES, ECANCELED, ENXIO,
        ESTALE, EFBIG,     ENOSYS, EILSEQ, EBUSY,  EPIPE,  EOPNOTSUPP}) {
    const bool transient = is_transient(error);
    const std::string name = errno_name(error);
    all.push_back(
        {.name = name + " once", .survives = transient, .error = error});
    all.push_back({.name = name + " for good",
                   .for_good = true,
                   .tries_patience = transient,
                   .error = error});
  }
  for (const std::size_t bytes : {0u, 1u, 512u, 32u << 10}) {
    const std::string name = std::to_string(bytes) + " bytes move";
    all.push_back(
        {.name = name + " once", .survives = true, .transfer = bytes});
    all.push_back({.name = name + " for good",
                   .for_good = true,
                   .survives = bytes > 4096,
                   .transfer = bytes});
  }
  all.push_back({.name = "refused once", .survives = true, .refusals = 1});
  all.push_back({.name = "refused 5 times", .survives = true, .refusals = 5});
  all.push_back({.name = "refused for good",
                 .for_good = true,
                 .tries_patience = true,
                 .refusals = kForGood});
  all.push_back({.name = "poll fails once", .survives = true, .polls = 1});
  all.push_back({.name = "poll fails 5 times", .survives = true, .polls = 5});
  all.push_back(
      {.name = "poll fails for good", .for_good = true, .polls = kForGood});
  return all;
}

/// What befalls `request`.
inline Fault fault_of(const FaultKind& kind, const IoRequest& request) {
  if (kind.error != 0) return Fault::fail(kind.error);
  if (kind.refusals > 0) return Fault::refuse(kind.refusals);
  // A real engine would refuse direct I/O of less than a sector.
  const bool direct = (fcntl(request.fd, F_GETFL) & O_DIRECT) != 0;
  return direct && kind.transfer < File::open(request.fd).offset_alignment()
             ? Fault::claimed(kind.transfer)
             : Fault::cut(kind.transfer);
}

}  // namespace torch_ext::test
