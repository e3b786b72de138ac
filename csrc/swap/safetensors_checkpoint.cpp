#include "torch_ext/swap/safetensors_checkpoint.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "torch_ext/base/error.h"
#include "torch_ext/swap/safetensors.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileEnd = ".safetensors";
constexpr const char* kIndexEnd = ".safetensors.index.json";
constexpr std::uintmax_t kMostIndexBytes = 100'000'000;

[[noreturn]] void refuse(const fs::path& path, const std::string& why) {
  throw std::invalid_argument(path.string() + ": " + why);
}

[[noreturn]] void fail(const char* op, const fs::path& path,
                       const std::error_code& error) {
  throw IoError({.op = op, .path = path.string(), .error = error.value()});
}

// Caches of models have links to their files.
fs::path resolved(const fs::path& path) {
  std::error_code error;
  fs::path real = fs::canonical(path, error);
  if (error) fail("open", path, error);
  return real;
}

/// In which file each tensor is, by the file's name.
std::map<std::string, std::set<std::string>> names_by_file(
    const fs::path& path) {
  std::error_code error;
  const std::uintmax_t size = fs::file_size(path, error);
  if (error) fail("open", path, error);
  if (size > kMostIndexBytes) {
    refuse(path, "an index has at most " + std::to_string(kMostIndexBytes) +
                     " bytes, and this has " + std::to_string(size));
  }
  std::ifstream file(path);
  if (!file) {
    throw IoError({.op = "open", .path = path.string(), .error = errno});
  }
  const auto index = nlohmann::json::parse(file, nullptr,
                                           /*allow_exceptions=*/false);
  const bool has_map = index.is_object() && index.contains("weight_map") &&
                       index["weight_map"].is_object();
  if (!has_map) {
    refuse(path,
           "it is no index of safetensors files: an object \"weight_map\" "
           "says in which file a tensor is");
  }
  std::map<std::string, std::set<std::string>> names;
  for (const auto& [name, value] : index["weight_map"].items()) {
    const std::string where =
        value.is_string() ? value.get<std::string>() : std::string();
    if (where.empty() || where != fs::path(where).filename() ||
        where.find('\0') != std::string::npos) {
      refuse(path,
             "\"weight_map\" must name files in the index's directory, "
             "but does not for '" +
                 name.substr(0, 200) + "'");
    }
    names[where].insert(name);
  }
  return names;
}

}  // namespace

SafetensorsCheckpoint::SafetensorsCheckpoint(const fs::path& path) {
  static_cast<void>(absolute_path(path));  // Refuses what is no path.
  // A name may end otherwise than the file that a link leads to.
  const fs::path real = resolved(path);
  path_ = real.string();
  std::error_code error;
  if (fs::is_directory(real, error)) {
    add_directory(real);
  } else if (path.string().ends_with(".json")) {
    add_index(path);
  } else {
    add_file(path);
  }
}

const SafetensorsCheckpoint::Tensor* SafetensorsCheckpoint::find(
    const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void SafetensorsCheckpoint::add_file(const fs::path& path) {
  const auto file = std::make_shared<const File>(
      File::open(resolved(path), File::Mode::kRead));
  SafetensorsHeader header = read_safetensors_header(*file);
  for (SafetensorsHeader::Tensor& each : header.tensors) {
    const bool fresh =
        tensors_
            .try_emplace(each.name, Tensor{.file = file,
                                           .offset = header.bytes + each.begin,
                                           .bytes = each.end - each.begin,
                                           .dtype = std::move(each.dtype),
                                           .shape = std::move(each.shape)})
            .second;
    if (!fresh) {
      refuse(path, "the tensor '" + each.name.substr(0, 200) +
                       "' is in another file too");
    }
  }
}

void SafetensorsCheckpoint::add_index(const fs::path& path) {
  for (const auto& [file, names] : names_by_file(path)) {
    const fs::path where = path.parent_path() / file;
    add_file(where);
    for (const std::string& name : names) {
      if (!tensors_.contains(name)) {
        refuse(path, "'" + name.substr(0, 200) + "' should be in " +
                         where.string() + ", but is not");
      }
    }
  }
}

void SafetensorsCheckpoint::add_directory(const fs::path& path) {
  std::vector<fs::path> files;
  std::vector<fs::path> indexes;
  std::error_code error;
  for (fs::directory_iterator each(path, error);
       !error && each != fs::directory_iterator(); each.increment(error)) {
    const std::string name = each->path().filename().string();
    if (name.ends_with(kFileEnd)) files.push_back(each->path());
    if (name.ends_with(kIndexEnd)) indexes.push_back(each->path());
  }
  if (error) fail("open", path, error);
  if (indexes.size() > 1) {
    refuse(path, "it has several indexes *.safetensors.index.json: name one");
  }
  if (indexes.size() == 1) {
    add_index(indexes.front());
    return;
  }
  if (files.empty()) refuse(path, "it has no file *.safetensors");
  std::ranges::sort(files);
  for (const fs::path& file : files) add_file(file);
}

}  // namespace torch_ext
