#include "torch_ext/base/error.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <type_traits>

namespace torch_ext {
namespace {

TEST(IoErrorTest, SaysWhatWasTriedWhereAndWhyItFailed) {
  const IoError error({.op = "pwrite",
                       .path = "/nvme/x",
                       .offset = 4096,
                       .length = 1048576,
                       .error = ENOSPC});
  EXPECT_STREQ(error.what(),
               "pwrite /nvme/x offset=4096 length=1048576: No space left on "
               "device (ENOSPC)");
}

TEST(IoErrorTest, LeavesOutWhatIsNotKnown) {
  EXPECT_STREQ(IoError({.op = "io_setup", .error = EAGAIN}).what(),
               "io_setup: Resource temporarily unavailable (EAGAIN)");
}

TEST(IoErrorTest, ShowsAnOffsetAndALengthOfZero) {
  const IoError error(
      {.op = "pread", .path = "f", .offset = 0, .length = 0, .error = EIO});
  EXPECT_STREQ(error.what(),
               "pread f offset=0 length=0: Input/output error (EIO)");
}

TEST(IoErrorTest, EndsWithTheDetail) {
  const IoError error({.op = "io_setup",
                       .error = EAGAIN,
                       .detail = "raise fs.aio-max-nr (65536)"});
  EXPECT_TRUE(std::string(error.what())
                  .ends_with("(EAGAIN); raise fs.aio-max-nr (65536)"));
}

TEST(IoErrorTest, CanLeaveThePathToPython) {
  const IoError error(
      {.op = "open", .path = "/nvme/x", .length = 7, .error = ENOENT});
  EXPECT_EQ(error.text_without_path(),
            "open length=7: No such file or directory (ENOENT)");
}

TEST(IoErrorTest, CarriesItsFields) {
  const IoError error(
      {.op = "pread", .path = "/p", .offset = 1, .length = 2, .error = EIO});
  EXPECT_EQ(error.error(), EIO);
  EXPECT_EQ(error.failure().op, "pread");
  EXPECT_EQ(error.failure().path, "/p");
  EXPECT_EQ(error.failure().offset, 1u);
  EXPECT_EQ(error.failure().length, 2u);
}

TEST(IoErrorTest, TakesAnErrnoThatNobodyKnows) {
  EXPECT_STREQ(IoError({.op = "odd", .error = 4242}).what(),
               "odd: unknown error (errno 4242)");
}

TEST(ErrnoNameTest, NamesKnownOnesAndCountsOthers) {
  EXPECT_EQ(errno_name(ENOSPC), "ENOSPC");
  EXPECT_EQ(errno_name(EINVAL), "EINVAL");
  EXPECT_EQ(errno_name(4242), "errno 4242");
}

// The binding tells the kinds apart, so none may be caught as another.
TEST(ErrorKindsTest, OnlyTypeErrorIsAnInvalidArgument) {
  EXPECT_TRUE((std::is_base_of_v<std::invalid_argument, TypeError>));
  EXPECT_FALSE((std::is_base_of_v<std::invalid_argument, KeyError>));
  EXPECT_FALSE((std::is_base_of_v<std::invalid_argument, IoError>));
  EXPECT_FALSE((std::is_base_of_v<std::invalid_argument, TimeoutError>));
  EXPECT_FALSE((std::is_base_of_v<std::invalid_argument, StateError>));
}

}  // namespace
}  // namespace torch_ext
