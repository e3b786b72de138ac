#include "torch_ext/optim/adamw_commit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using std::string;

AdamWCommit make_commit() {
  AdamWCommit commit;
  commit.state_format = StateFormat::kInt8;
  commit.seed = std::numeric_limits<std::uint64_t>::max();
  commit.next_slot = 5;
  commit.defaults = {.lr = 0.1};
  commit.groups = {{{.lr = std::numeric_limits<double>::infinity(),
                     .beta1 = 0.8,
                     .beta2 = 0.99,
                     .eps = 1e-6,
                     .weight_decay = 0,
                     .maximize = true},
                    {"0.0", "0.1"}}};
  commit.parameters["0.0"] = {
      .slot = 4,
      .kind = AdamWCommit::Kind{{2, 3}, "bfloat16", {1, 0}},
      .value = 0};
  commit.parameters["0.1"] = {.slot = 0};
  commit.extra = string("\0\xff~", 3);
  return commit;
}

/// The same as JSON, written by hand after docs/file_format.md.
const string kText =
    R"({"class":"OffloadedAdamW",)"
    R"("defaults":{"dict":[["lr",0.1],["betas",{"tuple":[0.9,0.999]}],)"
    R"(["eps",1e-08],["weight_decay",0.01],["amsgrad",false],)"
    R"(["maximize",false],["foreach",null],["capturable",false],)"
    R"(["differentiable",false],["fused",true],)"
    R"(["decoupled_weight_decay",true]]},)"
    R"("extra":{"bytes":"AP9+"},"foreign":{"dict":[]},"format":1,)"
    R"("groups":[{"options":{"dict":[["lr",{"float":"inf"}],)"
    R"(["betas",{"tuple":[0.8,0.99]}],["eps",1e-06],["weight_decay",0.0],)"
    R"(["amsgrad",false],["maximize",true],["foreach",null],)"
    R"(["capturable",false],["differentiable",false],["fused",true],)"
    R"(["decoupled_weight_decay",true]]},"params":["0.0","0.1"]}],)"
    R"("next":5,"others":{"dict":[]},)"
    R"("parameters":{"0.0":{"dtype":"bfloat16","first":0,"order":[1,0],)"
    R"("shape":[2,3],"slot":4,"value":0},)"
    R"("0.1":{"first":0,"slot":0,"value":null}},)"
    R"("seed":18446744073709551615,"state_format":"int8"})";

string with(string text, const string& old, const string& now) {
  const std::size_t at = text.find(old);
  EXPECT_NE(at, string::npos) << old;
  return text.replace(at, old.size(), now);
}

AdamWCommit parse(const string& text) {
  return parse_adamw_commit(text, "some/store");
}

TEST(AdamWCommitTest, TheTextIsTheOneOfTheFormat) {
  EXPECT_EQ(adamw_commit_text(make_commit()), kText);
  EXPECT_EQ(parse(kText), make_commit());
}

TEST(AdamWCommitTest, ExtraOfAnyBytesAndLengthComesBack) {
  AdamWCommit commit = make_commit();
  for (std::size_t length = 0; length < 260; ++length) {
    commit.extra.clear();
    for (std::size_t i = 0; i < length; ++i) {
      commit.extra += static_cast<char>(length - i);
    }
    EXPECT_EQ(parse(adamw_commit_text(commit)).extra, commit.extra);
  }
}

TEST(AdamWCommitTest, NumbersOfPythonAreRead) {
  // What Python's struct and base64 make of these numbers.
  const std::vector<std::pair<string, double>> numbers = {
      {"3", 3},
      {"true", 1},
      {R"({"int":"1180591620717411303424"})", 0x1p70},
      {R"({"float":"inf"})", std::numeric_limits<double>::infinity()},
      {R"({"dtype":"float32","shape":[],"small":"zczMPQ=="})", 0.1f},
      {R"({"dtype":"float32","shape":[1,1],"small":"zczMPQ=="})", 0.1f},
      {R"({"small":"mpmZmZmZuT8=","dtype":"float64","shape":[]})", 0.1},
      {R"({"small":"gD8=","dtype":"bfloat16","shape":[]})", 1.0},
      {R"({"small":"ADw=","dtype":"float16","shape":[]})", 1.0},
      {R"({"small":"ZrA=","dtype":"float16","shape":[]})", -0.137451171875},
      {R"({"small":"AQA=","dtype":"float16","shape":[]})", 0x1p-24},
      {R"({"small":"AHw=","dtype":"float16","shape":[]})",
       std::numeric_limits<double>::infinity()},
      {R"({"small":"/////////38=","dtype":"int64","shape":[]})", 0x1p63},
  };
  for (const auto& [json, number] : numbers) {
    EXPECT_EQ(parse(with(kText, "0.1]", json + "]")).defaults.lr, number)
        << json;
  }
  const AdamWCommit nan = parse(with(kText, "0.1]", R"({"float":"nan"}])"));
  EXPECT_TRUE(std::isnan(nan.defaults.lr));
  EXPECT_EQ(parse(with(kText, "tuple", "list")), make_commit());
}

TEST(AdamWCommitTest, WhatOnlyPythonKeepsIsSaid) {
  const AdamWCommit options =
      parse(with(kText, R"(["eps",1e-06])",
                 R"(["initial_lr",0.5],["eps",1e-06],["mine",{"list":[]}])"));
  EXPECT_EQ(options.notes,
            std::vector<string>{"options of the commit's groups have no place "
                                "in C++ and are left out: initial_lr, mine"});
  const AdamWCommit extra =
      parse(with(kText, R"({"bytes":"AP9+"})", R"({"dict":[["a",1]]})"));
  ASSERT_EQ(extra.notes.size(), 1u);
  EXPECT_NE(extra.notes[0].find("only Python reads"), string::npos);
  EXPECT_EQ(extra.extra, "");
  const AdamWCommit foreign = parse(
      with(kText, R"("foreign":{"dict":[])", R"("foreign":{"dict":[["a",1]])"));
  ASSERT_EQ(foreign.notes.size(), 1u);
  EXPECT_NE(foreign.notes[0].find("state of others"), string::npos);
  EXPECT_EQ(parse(with(kText, R"({"bytes":"AP9+"})", R"("\u2603")")).extra,
            "\xe2\x98\x83");
  EXPECT_EQ(parse(with(kText, R"("bytes")", R"("bytearray")")).extra,
            make_commit().extra);
  EXPECT_TRUE(parse(kText).notes.empty());
}

TEST(AdamWCommitTest, DeepExtraIsDroppedAndTheRestIsRead) {
  string deep = "1";
  for (int i = 0; i < 100; ++i) deep = R"({"dict":[["a",)" + deep + "]]}";
  AdamWCommit expected = make_commit();
  expected.extra.clear();
  AdamWCommit found = parse(with(kText, R"({"bytes":"AP9+"})", deep));
  EXPECT_EQ(found.notes.size(), 1u);
  found.notes.clear();
  EXPECT_EQ(found, expected);
  constexpr std::size_t kLevels = 200'000;
  const string arrays = string(kLevels, '[') + string(kLevels, ']');
  found = parse(with(kText, R"({"bytes":"AP9+"})", arrays));
  found.notes.clear();
  EXPECT_EQ(found, expected);
}

TEST(AdamWCommitTest, WhatCommitDoesNotWriteIsAnErrorInWords) {
  struct Case {
    string old, now, text;
  };
  const std::vector<Case> cases = {
      {"{\"class", "[{\"class", "no object of JSON"},
      {R"("next":5,)", "", "no \"next\""},
      {R"("next":5)", R"("next":-5)", "\"next\" is no whole number: -5"},
      {R"("next":5)", R"("next":1e3)", "no whole number"},
      {R"("seed":1)", R"("seed":"1")", "no object of JSON"},
      {"18446744073709551615", "18446744073709551616", "no whole number"},
      {R"("int8")", R"("int9")", "\"state_format\" is \"int9\""},
      {R"("parameters":{)", R"("parameters":[{)", "no object of JSON"},
      {R"("0.1":{)", R"("0.0":{)", "parameter \"0.0\" twice"},
      {R"("slot":0)", R"("slot":4)", "share a slot"},
      {R"("slot":0)", R"("slot":{})", "\"slot\" is no whole number"},
      {R"("value":null)", R"("value":3)", "values of a frozen"},
      {R"("slot":0,"value":null)",
       R"("slot":0,"value":0,"shape":[],"dtype":"float32","order":[])",
       "share a slot or a value"},
      {R"("dtype":"bfloat16",)", "", "no \"dtype\""},
      {R"("dtype":"bfloat16")", R"("dtype":null)", "\"dtype\" is no text"},
      {"[2,3]", "[2,-3]", "no whole number: -3"},
      {"[2,3]", "[2,9223372036854775808]", "has 9223372036854775808"},
      {R"(["0.0","0.1"])", R"(["0.0"])", "in no group"},
      {R"(["0.0","0.1"])", R"(["0.0","0.0"])", "twice"},
      {R"(["0.0","0.1"])", R"(["0.0","0.2"])", "does not have"},
      {R"(["0.0","0.1"])", R"(["0.0",1])", "\"params\" is no text"},
      {R"(["lr",0.1],)", "", "without \"lr\""},
      {R"(["lr",0.1])", R"(["lr"])", "no pair"},
      {R"(["lr",0.1])", R"(["lr",0.1],["lr",0.1])", "option twice"},
      {R"(["lr",0.1])", R"(["lr",null])", "something else for a number: null"},
      {R"(["lr",0.1])", R"(["lr",{"float":"1x"}])", "something else"},
      {R"(["lr",0.1])", R"(["lr",{"float":""}])", "something else"},
      {R"(["lr",0.1])", R"(["lr",{"int":3}])", "\"int\" is no text"},
      {R"(["lr",0.1])",
       R"(["lr",{"small":"zczMPQ==","dtype":"float64","shape":[]}])",
       "no number"},
      {R"(["lr",0.1])",
       R"(["lr",{"small":"zczMPQ==","dtype":"quint8","shape":[]}])",
       "no number"},
      {R"(["lr",0.1])",
       R"(["lr",{"small":"zczMPQ==","dtype":"float32","shape":[2]}])",
       "many elements"},
      {R"(["lr",0.1])", R"(["lr",{"small":"zczMPQ=="}])", "no \"dtype\""},
      {R"({"tuple":[0.9,0.999]})", R"({"tuple":[0.9]})", "not two"},
      {R"({"tuple":[0.9,0.999]})", "0.9", "no \"tuple\""},
      {"AP9+", "AP9", "base64"},
      {"AP9+", "AP9!", "base64"},
      {"AP9+", "====", "base64"},
      {"AP9+", "A=9+", "base64"},
      {R"("others":{"dict":[]})", R"("others":null)", "no \"dict\""},
  };
  for (const auto& [old, now, text] : cases) {
    try {
      parse(with(kText, old, now));
      ADD_FAILURE() << now << " was taken";
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EIO);
      EXPECT_EQ(error.failure().path, "some/store");
      EXPECT_NE(string(error.what()).find(text), string::npos)
          << now << ": " << error.what();
      EXPECT_NE(string(error.what()).find("document is damaged"), string::npos);
    }
  }
}

TEST(AdamWCommitTest, OtherClassesVersionsAndOptionsAreRefused) {
  const std::vector<std::pair<string, string>> cases = {
      {R"("format":1)", R"("format":2)"},
      {"OffloadedAdamW", "OffloadedOptimizer"},
      {R"(["amsgrad",false])", R"(["amsgrad",true])"},
      {R"(["decoupled_weight_decay",true])",
       R"(["decoupled_weight_decay",false])"},
  };
  for (const auto& [old, now] : cases) {
    EXPECT_THROW(parse(with(kText, old, now)), std::invalid_argument) << now;
  }
  AdamWCommit commit = make_commit();
  commit.groups[0].parameters[0] = "\xff";
  EXPECT_THROW(adamw_commit_text(commit), std::invalid_argument);
}

TEST(AdamWCommitTest, ATextThatIsCutOrChangedIsAnErrorOrAnotherCommit) {
  for (std::size_t i = 0; i < kText.size(); ++i) {
    EXPECT_THROW(parse(kText.substr(0, i)), IoError) << i;
    for (const char byte : {'\0', '"', '9', '[', '}', '\xff'}) {
      string changed = kText;
      changed[i] = byte;
      try {
        parse(changed);
      } catch (const IoError& error) {
        EXPECT_EQ(error.error(), EIO);
      } catch (const std::invalid_argument&) {
        // Another class, version or option.
      }
    }
  }
}

}  // namespace
}  // namespace torch_ext
