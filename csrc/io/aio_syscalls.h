#pragma once

// Linux's native AIO, through libaio or without it. The same five functions
// work on libaio's types or on the kernel's own. Both return -errno.

#if !defined(TORCH_EXT_RAW_AIO) && !__has_include(<libaio.h>)
#define TORCH_EXT_RAW_AIO 1
#endif

#ifdef TORCH_EXT_RAW_AIO
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <libaio.h>
#endif

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <ctime>

#include "torch_ext/io/io_engine.h"

namespace torch_ext::aio {

#ifdef TORCH_EXT_RAW_AIO

using Context = aio_context_t;

inline int checked(long result) {
  return result < 0 ? -errno : static_cast<int>(result);
}

inline int setup(unsigned count, Context* context) {
  return checked(syscall(SYS_io_setup, count, context));
}

inline int destroy(Context context) {
  return checked(syscall(SYS_io_destroy, context));
}

inline int submit(Context context, std::size_t count, iocb** requests) {
  return checked(
      syscall(SYS_io_submit, context, static_cast<long>(count), requests));
}

inline int get_events(Context context, std::size_t at_least, std::size_t most,
                      io_event* events, timespec* timeout) {
  return checked(syscall(SYS_io_getevents, context, static_cast<long>(at_least),
                         static_cast<long>(most), events, timeout));
}

inline iocb prepare(const IoRequest& request, std::size_t length) {
  iocb block = {};
  block.aio_data = request.cookie;
  block.aio_fildes = static_cast<std::uint32_t>(request.fd);
  if (request.op == IoRequest::Op::kSync) {
    block.aio_lio_opcode = IOCB_CMD_FSYNC;
    return block;
  }
  block.aio_lio_opcode =
      request.op == IoRequest::Op::kRead ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE;
  block.aio_buf = reinterpret_cast<std::uintptr_t>(request.data);
  block.aio_nbytes = length;
  block.aio_offset = static_cast<std::int64_t>(request.offset);
  return block;
}

inline bool is_of(const io_event& event, const iocb& block) {
  return event.obj == reinterpret_cast<std::uintptr_t>(&block);
}

inline std::uint64_t cookie(const io_event& event) { return event.data; }

#else

using Context = io_context_t;

inline int setup(unsigned count, Context* context) {
  return io_setup(static_cast<int>(count), context);
}

inline int destroy(Context context) { return io_destroy(context); }

inline int submit(Context context, std::size_t count, iocb** requests) {
  return io_submit(context, static_cast<long>(count), requests);
}

inline int get_events(Context context, std::size_t at_least, std::size_t most,
                      io_event* events, timespec* timeout) {
  return io_getevents(context, static_cast<long>(at_least),
                      static_cast<long>(most), events, timeout);
}

inline iocb prepare(const IoRequest& request, std::size_t length) {
  iocb block = {};
  const auto offset = static_cast<long long>(request.offset);
  switch (request.op) {
    case IoRequest::Op::kSync:
      io_prep_fsync(&block, request.fd);
      break;
    case IoRequest::Op::kRead:
      io_prep_pread(&block, request.fd, request.data, length, offset);
      break;
    case IoRequest::Op::kWrite:
      io_prep_pwrite(&block, request.fd, request.data, length, offset);
      break;
  }
  block.data = reinterpret_cast<void*>(request.cookie);
  return block;
}

inline bool is_of(const io_event& event, const iocb& block) {
  return event.obj == &block;
}

inline std::uint64_t cookie(const io_event& event) {
  return reinterpret_cast<std::uintptr_t>(event.data);
}

#endif

/// Bytes moved, or -errno. libaio's field is unsigned.
inline std::int64_t result(const io_event& event) {
  return static_cast<std::int64_t>(event.res);
}

}  // namespace torch_ext::aio
