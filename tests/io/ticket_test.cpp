#include "torch_ext/io/ticket.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <thread>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using std::chrono::milliseconds;

TEST(TicketTest, WithoutAnOperationIsDone) {
  const Ticket ticket;
  EXPECT_TRUE(ticket.done());
  EXPECT_TRUE(ticket.wait_for(milliseconds(0)));
  ticket.wait(milliseconds(0));
  EXPECT_EQ(ticket.error(), nullptr);
}

TEST(TicketTest, WaitTimesOutWhileTheOperationRunsAndSucceedsAfterwards) {
  TicketSource source;
  const Ticket ticket = source.ticket();
  EXPECT_FALSE(ticket.done());
  EXPECT_THROW(ticket.wait(milliseconds(1)), TimeoutError);
  source.finish();
  EXPECT_TRUE(ticket.done());
  ticket.wait(milliseconds(0));
}

TEST(TicketTest, EveryWaitThrowsTheOperationsError) {
  TicketSource source;
  source.finish(std::make_exception_ptr(std::out_of_range("gone")));
  const Ticket copy = source.ticket();
  EXPECT_THROW(copy.wait(), std::out_of_range);
  EXPECT_THROW(copy.wait(), std::out_of_range);
  EXPECT_NE(copy.error(), nullptr);
}

TEST(TicketTest, AnotherThreadsFinishEndsAWaitWithoutTimeout) {
  TicketSource source;
  std::thread finisher([&source] { source.finish(); });
  source.ticket().wait();
  source.ticket().wait_for(std::chrono::nanoseconds::max());
  finisher.join();
}

}  // namespace
}  // namespace torch_ext
