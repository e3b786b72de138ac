#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "torch_ext/io/io_queue.h"

namespace torch_ext {

/// The order that IoQueue promises, for whatever waits for a share of
/// something: a piece of the drive's time, a host buffer.
///
/// An item has a priority and a caller. next() gives the item whose share is
/// next, by three rules:
///  1. The most urgent priority that waits has the share. But each less urgent
///     priority that waits has one share in 16, so none stands still. If
///     several are overdue, the most urgent of them comes first.
///  2. Within a priority, callers take turns. Each has a line, in the order of
///     push(). Callers whose numbers are equal modulo 64 share a line.
///  3. A turn is the first item in the line, or `turn` shares of it. The rest
///     of the item then goes to the end of its line.
///
/// How it does that: each priority has 64 lines and a bit for each line that is
/// not empty, so the next line is found without a search. A priority that is
/// passed over counts the share; at 16 it is overdue. The owner calls next(),
/// hands out the share, then calls served(), which counts it towards the turn,
/// or remove().
///
/// The queue is intrusive. It allocates nothing, so an order can be changed
/// where no error can be reported. Items are borrowed while they are in it. An
/// Item is a FairQueue<Item>::Link.
/// Threads: none of its own; its owner locks.
template <typename Item>
class FairQueue {
 public:
  /// What the queue keeps in an item.
  class Link {
    friend class FairQueue;
    Item* previous_ = nullptr;
    Item* next_ = nullptr;
    std::uint8_t priority_ = 0;
    std::uint8_t line_ = 0;
  };

  static constexpr std::size_t kPriorities =
      static_cast<std::size_t>(IoPriority::kWriteBack) + 1;
  /// For each priority, whether next() shall pass it over.
  using Blocked = std::array<bool, kPriorities>;

  /// `turn`: how many shares an item has before another's turn comes.
  explicit FairQueue(std::size_t turn = std::numeric_limits<std::size_t>::max())
      : turn_(turn) {}

  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }

  void push(Item* item, IoPriority priority, std::uint64_t caller) {
    link(item).priority_ = static_cast<std::uint8_t>(priority);
    link(item).line_ = static_cast<std::uint8_t>(caller % kLines);
    class_of(item).push_back(item);
    ++size_;
  }

  /// Takes an item out, wherever it is in its line.
  void remove(Item* item) {
    class_of(item).remove(item);
    --size_;
  }

  /// The item that has the next share. Null if none waits whose priority is not
  /// blocked.
  Item* next(const Blocked& blocked = {}) {
    Class* next = nullptr;
    bool overdue = false;
    for (std::size_t i = 0; i < kPriorities; ++i) {
      Class& each = classes_[i];
      if (each.empty() || blocked[i]) continue;
      if (next == nullptr) {
        next = &each;
      } else if (++each.passed_over >= kShare && !overdue) {
        overdue = true;
        next = &each;
      }
    }
    if (next == nullptr) return nullptr;
    next->passed_over = 0;
    return next->front();
  }

  /// The item that next() gave has had its share. If it wants no more, call
  /// remove() next.
  void served(Item* item) {
    Class& its = class_of(item);
    if (++its.shares < turn_) return;
    its.remove(item);
    its.push_back(item);
  }

 private:
  static constexpr std::size_t kShare = 16;
  static constexpr std::size_t kLines = 64;

  static Link& link(Item* item) { return *item; }

  class List {
   public:
    bool empty() const { return first_ == nullptr; }
    Item* front() const { return first_; }

    void push_back(Item* item) {
      link(item).previous_ = last_;
      link(item).next_ = nullptr;
      (last_ != nullptr ? link(last_).next_ : first_) = item;
      last_ = item;
    }

    void remove(Item* item) {
      Item* previous = link(item).previous_;
      Item* next = link(item).next_;
      (previous != nullptr ? link(previous).next_ : first_) = next;
      (next != nullptr ? link(next).previous_ : last_) = previous;
    }

   private:
    Item* first_ = nullptr;
    Item* last_ = nullptr;
  };

  /// Items of one priority.
  class Class {
   public:
    bool empty() const { return waiting_ == 0; }

    /// REQUIRES: It is not empty.
    Item* front() {
      // An empty line has no turn. In the middle of a turn the line is not
      // empty.
      const int empty_lines =
          std::countr_zero(std::rotr(waiting_, static_cast<int>(current_)));
      current_ = (current_ + static_cast<std::size_t>(empty_lines)) % kLines;
      return lines_[current_].front();
    }

    void push_back(Item* item) {
      const std::size_t line = link(item).line_;
      lines_[line].push_back(item);
      waiting_ |= std::uint64_t{1} << line;
    }

    // A turn ends when the item that has it is removed.
    void remove(Item* item) {
      const std::size_t line = link(item).line_;
      if (shares > 0 && item == lines_[current_].front()) {
        shares = 0;
        current_ = (current_ + 1) % kLines;
      }
      lines_[line].remove(item);
      if (lines_[line].empty()) waiting_ &= ~(std::uint64_t{1} << line);
    }

    std::size_t passed_over = 0;  ///< Shares of others that it waited for.
    std::size_t shares = 0;       ///< The first item has had in this turn.

   private:
    std::array<List, kLines> lines_;
    std::uint64_t waiting_ = 0;  ///< Bit i: line i is not empty.
    std::size_t current_ = 0;    ///< The line whose turn it is.
  };

  Class& class_of(Item* item) { return classes_[link(item).priority_]; }

  const std::size_t turn_;
  std::array<Class, kPriorities> classes_;  ///< Most urgent first.
  std::size_t size_ = 0;
};

}  // namespace torch_ext
