// Safetensors files: any bytes are read, or refused with std::invalid_argument
// in a few words. What is read fills the file, and says the same after it was
// written again.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "targets.h"
#include "torch_ext/io/file.h"
#include "torch_ext/swap/safetensors.h"

namespace {

using torch_ext::File;
using torch_ext::SafetensorsHeader;
using torch_ext::fuzz::check;

File file_of(const std::uint8_t* data, std::size_t size) {
  const int fd = memfd_create("safetensors", MFD_CLOEXEC);
  check(fd >= 0);
  for (std::size_t done = 0; done < size;) {
    const ssize_t written = write(fd, data + done, size - done);
    check(written > 0);
    done += static_cast<std::size_t>(written);
  }
  File file = File::open(fd);
  close(fd);
  return file;
}

void check_header(const SafetensorsHeader& header, std::size_t size) {
  std::uint64_t bytes = header.bytes;
  for (const auto& tensor : header.tensors) {
    check(tensor.begin <= tensor.end && header.bytes + tensor.end <= size);
    check(torch_ext::safetensors_bits(tensor.dtype).has_value());
    bytes += tensor.end - tensor.begin;
  }
  check(bytes == size);
  const std::string again = torch_ext::encode_safetensors(header, 1);
  const SafetensorsHeader second = torch_ext::decode_safetensors(
      std::string_view(again).substr(8), size - header.bytes);
  check(second.tensors == header.tensors);
  check(second.metadata == header.metadata);
}

}  // namespace

bool fuzz_safetensors(const std::uint8_t* data, std::size_t size) {
  const File file = file_of(data, size);
  try {
    check_header(torch_ext::read_safetensors_header(file), size);
    return true;
  } catch (const std::invalid_argument& error) {
    const std::size_t length = std::strlen(error.what());
    check(length > 0 && length <= torch_ext::fuzz::kLongestMessage);
    return false;
  }
}
