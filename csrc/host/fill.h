#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "best_fit.h"

namespace pyrl::host {

// The lengths that wait, by size: how many of each, and the largest that still fits somewhere.
class Waiting {
 public:
  Waiting(const int64_t* length, int64_t n) : order_(static_cast<size_t>(n)) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return length[a] < length[b]; });
    for (int64_t at = 0; at < n; ++at) {
      const int64_t size = length[order_[at]];
      if (size_.empty() || size_.back() != size) {
        size_.push_back(size);
        next_.push_back(at);
        end_.push_back(at);
        below_.push_back(static_cast<int64_t>(below_.size()));
      }
      ++end_.back();
      kind_.push_back(static_cast<int64_t>(size_.size()) - 1);
      sum_ += size;
    }
    left_ = n;
    // About the golden section of n: successive draws from the sorted items lie far apart.
    stride_ = n * 618 / 1000 + 1;
    while (std::gcd(stride_, n) != 1) ++stride_;
  }

  int64_t left() const { return left_; }
  int64_t sum() const { return sum_; }
  int64_t kinds() const { return static_cast<int64_t>(size_.size()); }
  int64_t size(int64_t kind) const { return size_[kind]; }

  // The largest waiting kind <= `kind`, or -1.
  int64_t at_most_kind(int64_t kind) {
    int64_t found = kind;
    while (found >= 0 && below_[found] != found) found = below_[found];
    while (kind >= 0 && below_[kind] != kind) {
      const int64_t up = below_[kind];
      below_[kind] = found;
      kind = up;
    }
    return found;
  }

  // The largest waiting kind of size <= `room`, or -1; one of `held` is thought of as taken.
  int64_t at_most(int64_t room, int64_t held = -1) {
    const auto above = std::upper_bound(size_.begin(), size_.end(), room);
    int64_t kind = at_most_kind(static_cast<int64_t>(above - size_.begin()) - 1);
    if (kind >= 0 && kind == held && end_[kind] - next_[kind] == 1) kind = at_most_kind(kind - 1);
    return kind;
  }

  // A kind that is typical of the whole, of size <= `room`, or -1.
  int64_t draw(int64_t room) {
    const int64_t n = static_cast<int64_t>(order_.size());
    for (; drawn_ < n; ++drawn_) {
      const int64_t kind = kind_[place_];
      if (next_[kind] < end_[kind]) {
        return size_[kind] <= room ? (advance(), kind) : at_most(room);
      }
      place_ = (place_ + stride_) % n;
    }
    return at_most(room);
  }

  int64_t take(int64_t kind) {
    const int64_t item = order_[next_[kind]++];
    if (next_[kind] == end_[kind]) below_[kind] = kind - 1;
    sum_ -= size_[kind];
    --left_;
    return item;
  }

 private:
  void advance() {
    ++drawn_;
    place_ = (place_ + stride_) % static_cast<int64_t>(order_.size());
  }

  std::vector<int64_t> order_, kind_;               // [item], by rising length
  std::vector<int64_t> size_, next_, end_, below_;  // [kind]
  int64_t left_ = 0, sum_ = 0, stride_ = 1, place_ = 0, drawn_ = 0;
};

// One bin after the other: the largest that waits, then typical ones while there is room for more
// than two, then the two (or the one) that leave the least room.
inline void fill(const int64_t* length, int64_t n, int64_t capacity, int64_t* bin) {
  constexpr int64_t kTries = 32;
  Waiting waiting(length, n);
  for (int64_t b = 0; waiting.left() > 0; ++b) {
    int64_t room = capacity;
    const auto put = [&](int64_t kind) {
      room -= waiting.size(kind);
      bin[waiting.take(kind)] = b;
    };
    put(waiting.at_most(room));
    while (waiting.left() > 0) {
      const auto mean_rooms = static_cast<__int128>(room) * waiting.left();
      if (2 * mean_rooms >= 5 * static_cast<__int128>(waiting.sum())) {
        const int64_t kind = waiting.draw(room);
        if (kind < 0) break;
        put(kind);
        continue;
      }
      int64_t first = waiting.at_most(room), second = -1;
      if (first < 0) break;
      int64_t least = room - waiting.size(first);
      for (int64_t t = 0; t < kTries && least > 0; ++t) {
        const int64_t a = waiting.at_most_kind(t * (waiting.kinds() - 1) / (kTries - 1));
        if (a < 0 || waiting.size(a) > room) continue;
        const int64_t c = waiting.at_most(room - waiting.size(a), a);
        if (c >= 0 && room - waiting.size(a) - waiting.size(c) < least) {
          least = room - waiting.size(a) - waiting.size(c);
          first = a;
          second = c;
        }
      }
      put(first);
      if (second >= 0) put(second);
    }
  }
}

// Best-fit decreasing or `fill`, whichever takes fewer bins. Best fit is near the bound for items
// that are small beside the capacity; where some ten fill a bin, it leaves rooms too small for any.
inline void few_bins(const int64_t* length, int64_t n, int64_t capacity, int64_t* bin) {
  best_fit(length, n, capacity, bin);
  if (n == 0) return;
  const int64_t sum = std::accumulate(length, length + n, int64_t{0});
  const int64_t bins = *std::max_element(bin, bin + n) + 1;
  if ((bins - 1) * 1000 <= sum / capacity * 1001) return;  // near the bound
  std::vector<int64_t> other(static_cast<size_t>(n));
  fill(length, n, capacity, other.data());
  if (*std::max_element(other.begin(), other.end()) + 1 < bins) {
    std::copy(other.begin(), other.end(), bin);
  }
}

}  // namespace pyrl::host
