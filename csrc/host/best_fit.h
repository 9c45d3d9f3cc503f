#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <queue>
#include <vector>

namespace pyrl::host {

// bin[i] of every item by best-fit decreasing; lengths are in [0, capacity].
inline void best_fit(const int64_t* length, int64_t n, int64_t capacity, int64_t* bin) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length[a] > length[b]; });
  // Room left -> bins with exactly that room, lowest number first. There are at most `capacity`
  // different rooms however many bins there are, so the tree stays small and in cache.
  using Bins = std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>>;
  std::map<int64_t, Bins> open;
  int64_t bins = 0;
  for (const int64_t item : order) {
    const auto best = open.lower_bound(length[item]);
    int64_t room = capacity, chosen = bins;
    if (best == open.end()) {
      ++bins;
    } else {
      room = best->first;
      chosen = best->second.top();
      best->second.pop();
      if (best->second.empty()) open.erase(best);
    }
    bin[item] = chosen;
    open[room - length[item]].push(chosen);
  }
}

}  // namespace pyrl::host
