#pragma once

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace torch_ext::test {

/// Where tests put their files: $TORCH_EXT_TEST_DIR, else /var/tmp, which is
/// a disk where /tmp is often memory.
inline std::filesystem::path temp_parent() {
  const char* chosen = std::getenv("TORCH_EXT_TEST_DIR");
  return chosen != nullptr && *chosen != '\0' ? chosen : "/var/tmp";
}

/// A new directory, removed with all that is in it. Move-only.
class TempDir {
 public:
  explicit TempDir(const std::filesystem::path& parent = temp_parent()) {
    std::string name = (parent / "torch_ext_test.XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) {
      throw std::system_error(errno, std::generic_category(), name);
    }
    path_ = name;
  }
  TempDir(TempDir&& other) noexcept
      : path_(std::exchange(other.path_, std::filesystem::path())) {}
  TempDir& operator=(TempDir&&) = delete;
  ~TempDir() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }

  const std::filesystem::path& path() const noexcept { return path_; }
  std::filesystem::path operator/(std::string_view name) const {
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace torch_ext::test
