#include "file_syncs.h"

#include <algorithm>

namespace torch_ext {

std::shared_ptr<FileSyncs::Writer> FileSyncs::begin(
    std::shared_ptr<const File> file) {
  std::shared_ptr<Line> line;
  {
    const MutexLock lock(mutex_);
    if (lines_.size() >= most_lines_) {
      std::erase_if(lines_,
                    [](const auto& each) { return each.second.expired(); });
      most_lines_ = std::max<std::size_t>(64, 2 * lines_.size());
    }
    auto& known = lines_[file.get()];
    line = known.lock();
    if (line == nullptr) known = line = std::make_shared<Line>();
  }
  return std::make_shared<Writer>(std::move(file), std::move(line));
}

void FileSyncs::Writer::sync(Start start, Done done) {
  {
    const MutexLock lock(line_->mutex);
    const bool waits = !line_->running.empty();
    (waits ? line_->waiting : line_->running)
        .push_back({shared_from_this(), std::move(start), std::move(done)});
    if (waits) return;
  }
  // It gets a copy, since this writer may be gone before run() returns.
  run(std::shared_ptr(line_));
}

void FileSyncs::run(const std::shared_ptr<Line>& line) {
  // Moved out of the request, which end() may take away before this returns.
  Start start;
  {
    const MutexLock lock(line->mutex);
    start = std::move(line->running.front().start);
  }
  try {
    start([line](std::exception_ptr error) { end(line, std::move(error)); });
  } catch (...) {
    end(line, std::current_exception());
  }
}

void FileSyncs::end(const std::shared_ptr<Line>& line,
                    std::exception_ptr error) {
  std::vector<Request> ended, too_late;
  std::exception_ptr failure;
  std::uint64_t failures = 0;
  bool goes_on = false;
  {
    const MutexLock lock(line->mutex);
    ended.swap(line->running);
    if (error != nullptr) {
      ++line->failures;
      line->failure = std::move(error);
      // The failed sync was to write their pages too, and no later sync will
      // tell.
      too_late.swap(line->waiting);
    } else {
      line->running.swap(line->waiting);
    }
    goes_on = !line->running.empty();
    failure = line->failure;
    failures = line->failures;
  }
  for (std::vector<Request>* all : {&ended, &too_late}) {
    for (Request& each : *all) {
      const bool lost = each.writer->seen_ != failures;
      each.writer = nullptr;
      each.done(lost ? failure : nullptr);
    }
  }
  if (goes_on) run(line);
}

}  // namespace torch_ext
