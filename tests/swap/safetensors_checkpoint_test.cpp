#include "torch_ext/swap/safetensors_checkpoint.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

#include "support/temp_dir.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;

/// Its files are written by hand, as the format's description says.
class SafetensorsCheckpointTest : public testing::Test {
 protected:
  /// A file with one tensor of four bytes.
  fs::path file(const std::string& name, const std::string& tensor) const {
    std::string json = "{\"" + tensor +
                       "\":{\"dtype\":\"U8\",\"shape\":[4],"
                       "\"data_offsets\":[0,4]}}";
    std::string content(8, '\0');
    content[0] = static_cast<char>(json.size());
    return text(name, content + json + "abcd");
  }

  fs::path text(const std::string& name, const std::string& content) const {
    const fs::path path = dir_.path() / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  fs::path index(const std::string& map) const {
    return text("model.safetensors.index.json",
                R"({"metadata":{"total_size":8},"weight_map":)" + map + "}");
  }

  void expect_refused(const fs::path& path, const std::string& why) const {
    try {
      const SafetensorsCheckpoint checkpoint(path);
      ADD_FAILURE() << path;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos)
          << error.what();
    }
  }

  test::TempDir dir_;
};

TEST_F(SafetensorsCheckpointTest, AFileSaysWhereItsTensorsAre) {
  const fs::path path = file("model.safetensors", "a");
  const SafetensorsCheckpoint checkpoint(path);
  const auto* const tensor = checkpoint.find("a");
  ASSERT_NE(tensor, nullptr);
  EXPECT_EQ(tensor->offset, fs::file_size(path) - 4);
  EXPECT_EQ(tensor->bytes, 4u);
  EXPECT_EQ(tensor->dtype, "U8");
  EXPECT_EQ(tensor->shape, std::vector<std::uint64_t>{4});
  EXPECT_EQ(tensor->file->path(), path);
  EXPECT_EQ(checkpoint.find("b"), nullptr);
}

TEST_F(SafetensorsCheckpointTest, AnIndexADirectoryAndLinksLeadToTheFiles) {
  file("one.safetensors", "a");
  file("two.safetensors", "b");
  file("old/three.safetensors", "c");
  fs::create_symlink(dir_.path() / "old/three.safetensors",
                     dir_.path() / "three.safetensors");
  EXPECT_EQ(SafetensorsCheckpoint(dir_.path()).tensors().size(), 3u);
  const fs::path map =
      index(R"({"a":"one.safetensors","c":"three.safetensors"})");
  for (const fs::path& path : {dir_.path(), map}) {
    const SafetensorsCheckpoint checkpoint(path);
    EXPECT_EQ(checkpoint.tensors().size(), 2u);
    EXPECT_NE(checkpoint.find("c"), nullptr);
    EXPECT_EQ(checkpoint.find("b"), nullptr);
  }
  fs::create_directory_symlink(dir_.path(), dir_.path() / "old/link");
  EXPECT_EQ(SafetensorsCheckpoint(dir_.path() / "old/link").tensors().size(),
            2u);
}

TEST_F(SafetensorsCheckpointTest, WhatIsNoCheckpointIsRefused) {
  expect_refused(dir_.path(), "it has no file *.safetensors");
  expect_refused(text("damaged.safetensors", "12345678"), "damaged");
  expect_refused(text("text.json", "{"), "it is no index");
  expect_refused(text("list.json", "[]"), "it is no index");
  expect_refused(text("no.json", R"({"weight_map":[]})"), "it is no index");
  const std::string deep = std::string(100000, '[');
  expect_refused(text("deep.json", deep), "it is no index");
  fs::remove(dir_.path() / "damaged.safetensors");
  file("one.safetensors", "a");
  file("two.safetensors", "a");
  expect_refused(dir_.path(), "'a' is in another file too");
  expect_refused(index(R"({"b":"one.safetensors"})"), "'b' should be in");
  for (const std::string name :
       {"\"\"", "3", R"("../one.safetensors")", R"("/one.safetensors")",
        R"("sub/one.safetensors")", R"("one.safetensors\u0000")"}) {
    expect_refused(index("{\"a\":" + name + "}"), "must name files");
  }
  text("other.safetensors.index.json", "{}");
  expect_refused(dir_.path(), "several indexes");
  EXPECT_THROW(SafetensorsCheckpoint(""), std::invalid_argument);
}

TEST_F(SafetensorsCheckpointTest, WhatIsMissingIsAnErrorWithItsPath) {
  try {
    const SafetensorsCheckpoint checkpoint(dir_.path() / "none");
    ADD_FAILURE();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), ENOENT);
    EXPECT_NE(std::string(error.what()).find("none"), std::string::npos);
  }
  EXPECT_THROW(SafetensorsCheckpoint(index(R"({"a":"gone.safetensors"})")),
               IoError);
}

}  // namespace
}  // namespace torch_ext
