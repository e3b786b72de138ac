#include "torch_ext/swap/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

#include "support/temp_dir.h"

namespace torch_ext {
namespace {

using test::TempDir;

const auto kCorpus =
    std::filesystem::path(TORCH_EXT_FUZZ_CORPUS) / "safetensors";

SafetensorsHeader read(const std::filesystem::path& path) {
  return read_safetensors_header(File::open(path, File::Mode::kRead));
}

std::string refusal_of(const std::filesystem::path& path) {
  try {
    read(path);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(SafetensorsTest, AHeaderIsTheBytesThatTheFormatSays) {
  SafetensorsHeader header;
  header.metadata = {{"format", "pt"}, {"quote\"", "line\n"}};
  header.tensors = {
      {.name = "b", .dtype = "U8", .shape = {}, .begin = 8, .end = 9},
      {.name = "a", .dtype = "F32", .shape = {2, 1}, .begin = 0, .end = 8}};
  const std::string text = encode_safetensors(header, 256);
  ASSERT_EQ(text.size(), 256u);
  EXPECT_EQ(text.substr(0, 8), std::string("\xf8\0\0\0\0\0\0\0", 8));
  const std::string json =
      R"({"__metadata__":{"format":"pt","quote\"":"line\n"},)"
      R"("b":{"dtype":"U8","shape":[],"data_offsets":[8,9]},)"
      R"("a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}})";
  EXPECT_EQ(text.substr(8, json.size()), json);
  EXPECT_EQ(text.find_first_not_of(' ', 8 + json.size()), std::string::npos);
  EXPECT_EQ(encode_safetensors({}, 1), std::string("\2\0\0\0\0\0\0\0{}", 10));
}

TEST(SafetensorsTest, AHeaderIsReadInItsOwnOrder) {
  const SafetensorsHeader header = read(kCorpus / "order");
  ASSERT_EQ(header.tensors.size(), 2u);
  EXPECT_EQ(header.tensors[0].name, "b");
  EXPECT_EQ(header.tensors[0].begin, 4u);
  EXPECT_EQ(header.tensors[1].dtype, "F32");
  EXPECT_EQ(header.tensors[1].shape, std::vector<std::uint64_t>{1});
  EXPECT_EQ(header.bytes + 5, std::filesystem::file_size(kCorpus / "order"));
  const SafetensorsHeader other = read(kCorpus / "metadata");
  ASSERT_EQ(other.metadata.size(), 2u);
  EXPECT_EQ(other.metadata[1].first, "k\xc3\xa9");
  EXPECT_EQ(other.metadata[1].second, "\xf0\x9f\x98\x80");
}

// The names of the corpus say what each file is. These are whole files, as the
// safetensors library sees them too; tests/python/test_save.py asks it.
const std::set<std::string> kWhole = {
    "empty_dict",    "every_dtype",   "metadata",
    "metadata_null", "name_empty",    "name_nul",
    "newlines",      "odd_address",   "one",
    "order",         "padded",        "scalar",
    "zero",          "unknown_field", "shape_64_dimensions"};

TEST(SafetensorsTest, WholeFilesAreReadAndTheOthersRefusedByPath) {
  std::size_t refused = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kCorpus)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("found_")) continue;
    const std::string refusal = refusal_of(entry.path());
    if (kWhole.contains(name)) {
      EXPECT_EQ(refusal, "") << name;
    } else {
      EXPECT_TRUE(refusal.starts_with(entry.path().native() + " is no whole"))
          << name << ": " << refusal;
      ++refused;
    }
  }
  EXPECT_GT(refused, 40u);
}

TEST(SafetensorsTest, ARefusalSaysWhatIsWrong) {
  const auto says = [](const char* name, std::string_view words) {
    const std::string refusal = refusal_of(kCorpus / name);
    EXPECT_NE(refusal.find(words), std::string::npos) << refusal;
  };
  says("gap",
       "tensor 'b' begins at byte 2 of the data, but those before it "
       "end at byte 1");
  says("overlap",
       "begins at byte 1 of the data, but those before it end at "
       "byte 2");
  says("trailing",
       "the tensors end at byte 1 of the data, of which there are "
       "2");
  says("offsets_outside", "ends at byte 2 of the data, of which there are 1");
  says("wrong_size", "has 8 bytes, but dtype and shape make 4");
  says("name_twice", "has the tensor 'a' twice");
  says("dtype_unknown", "has the unknown dtype 'F31'");
  says("shape_overflow", "counts to more bytes than a file can have");
  says("shape_wraps_to_zero", "counts to more bytes than a file can have");
  says("shape_zero_and_huge", "counts to more bytes than a file can have");
  says("length_max", "its header says that it has 18446744073709551615 bytes");
  says("length_of_file_and_one",
       "its header says that it has 3 bytes, and the "
       "file has 10");
  says("nothing", "it has 0 bytes");
  says("nul_after", "a NUL byte");
  says("deep", "nested too deep");
  says("cut", "bad JSON at byte");
  says("dtype_missing", "tensor 'a' lacks dtype");
}

TEST(SafetensorsTest, AHeaderBeyondTheLimitIsRefusedUnread) {
  const TempDir directory;
  std::ofstream(directory / "x") << std::string("\1\xe1\xf5\5\0\0\0\0", 8);
  std::filesystem::resize_file(directory / "x", 200'000'000);  // A hole.
  EXPECT_NE(refusal_of(directory / "x").find("limit of 100000000"),
            std::string::npos);
  EXPECT_THROW(encode_safetensors({}, kMostSafetensorsJson + 16),
               std::invalid_argument);
}

TEST(SafetensorsTest, NamesThatCannotBeWrittenAreRefused) {
  const auto with_name = [](const std::string& name) {
    return SafetensorsHeader{.tensors = {{.name = name, .dtype = "U8"}}};
  };
  EXPECT_THROW(encode_safetensors(with_name("\xff"), 1), std::invalid_argument);
  EXPECT_THROW(encode_safetensors(with_name("__metadata__"), 1),
               std::invalid_argument);
  SafetensorsHeader twice = with_name("a");
  twice.tensors.push_back(twice.tensors[0]);
  EXPECT_THROW(encode_safetensors(twice, 1), std::invalid_argument);
  SafetensorsHeader metadata;
  metadata.metadata = {{"a", "\xc3"}};
  EXPECT_THROW(encode_safetensors(metadata, 1), std::invalid_argument);
}

}  // namespace
}  // namespace torch_ext
