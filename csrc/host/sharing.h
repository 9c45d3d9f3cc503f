#pragma once

#include <cstdint>
#include <iterator>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "radix_tree.h"

namespace pyrl::host {

// In units of one computed token: a segment besides its tokens, an attended (query, key) pair.
struct Costs {
  double segment, area;

  // Tokens 0:x of a sequence; tokens a:b below a prefix of a tokens cost prefix(b) - prefix(a).
  double prefix(int64_t x) const {
    const double tokens = static_cast<double>(x);
    return tokens + area * (tokens * (tokens + 1) / 2);
  }
};

// limit[v]: node v is worth a segment of its own iff prefix(a) < limit[v], where a is the end of
// the nearest ancestor that has one. It gives the least total cost over all choices.
//
// Where v has no segment its tokens go to its children (and to the sequences that end there, which
// then get a segment of their own), so all that a subtree must know of the nodes above is
// w = prefix(a). Its least cost f(v, w) is
//     own segment:  prefix(end) - w + segment + sum over children c of f(c, prefix(end))
//     none:         sum over children c of f(c, w)   (+ prefix(end) - w + segment if v ends one)
// whichever is less: concave, piecewise linear and falling in w, with slope -1 at the left, where
// an own segment pays; and the difference of the two falls, so they cross once, at limit[v].
// A function is kept as its line at the left, its value and slope at the right end of its domain
// (the end of v's parent) and the breakpoints between. A breakpoint is dropped when a crossing
// passes it or the domain shrinks below it, so all is O(n log^2 n) with small-to-large merging.
inline std::vector<double> sharing_limits(const Tree& tree, const Costs& cost) {
  using Breaks = std::multiset<std::pair<double, int64_t>>;  // (w, fall of the slope there), below
  const size_t n = tree.parent.size();
  const double never = -std::numeric_limits<double>::infinity();
  std::vector<double> limit(n, never);
  std::vector<int64_t> ways(n, 0);  // children, and 1 more where sequences end
  for (size_t v = 1; v < n; ++v) {
    ways[v] += tree.ends[v];
    ++ways[tree.parent[v]];
  }
  if (cost.segment == 0) {  // every token saved is a gain
    for (size_t v = 1; v < n; ++v) {
      if (ways[v] > 1) limit[v] = -never;
    }
    return limit;
  }
  // Sums over the children seen so far, of the lines at the left (intercept - slope * w; the slope
  // of each child is 1) and of the values and slopes at the right end.
  std::vector<double> intercept(n, 0.0), value(n, 0.0);
  std::vector<int64_t> slope(n, 0);
  std::vector<Breaks> breaks(n);
  for (size_t v = n - 1; v > 0; --v) {
    const Id up = tree.parent[v];
    const double right = cost.prefix(tree.end[v]), left = cost.prefix(tree.end[up]);
    const double own = right + cost.segment + value[v];
    double line = intercept[v], at_end = value[v];
    int64_t steep = slope[v];
    if (tree.ends[v]) {
      line += right + cost.segment;
      at_end += cost.segment;
      ++steep;
    }
    Breaks& points = breaks[v];
    if (ways[v] > 1) {
      int64_t fall = ways[v];
      double crossing = (line - own) / static_cast<double>(fall - 1);
      while (!points.empty() && points.begin()->first < crossing) {
        line += static_cast<double>(points.begin()->second) * points.begin()->first;
        fall += points.begin()->second;
        points.erase(points.begin());
        crossing = (line - own) / static_cast<double>(fall - 1);
      }
      limit[v] = crossing;
      line = own;
      if (crossing < left) {
        points.emplace(crossing, fall - 1);
      } else {
        points.clear();
        at_end = own - right;
        steep = 1;
      }
    }
    double w = right;
    while (!points.empty() && points.rbegin()->first >= left) {
      const auto last = std::prev(points.end());
      at_end += static_cast<double>(steep) * (w - last->first);
      w = last->first;
      steep -= last->second;
      points.erase(last);
    }
    at_end += static_cast<double>(steep) * (w - left);
    intercept[up] += line;
    value[up] += at_end;
    slope[up] += steep;
    if (points.size() > breaks[up].size()) points.swap(breaks[up]);
    breaks[up].insert(points.begin(), points.end());
    Breaks().swap(points);
  }
  return limit;
}

// The tree of segments: nodes not worth one are gone, their children hang from the node above.
inline Tree share(const Tree& tree, const Costs& cost) {
  const std::vector<double> limit = sharing_limits(tree, cost);
  const size_t n = tree.parent.size();
  Tree kept;
  std::vector<Id> above(n, 0), place(n, 0);  // nearest kept node at or above; own new id
  kept.parent.push_back(kRoot);
  kept.end.push_back(0);
  kept.ends.push_back(0);
  for (size_t v = 1; v < n; ++v) {
    const Id up = above[tree.parent[v]];
    const bool keep = cost.prefix(kept.end[up]) < limit[v];
    above[v] = up;
    if (!keep && !tree.ends[v]) continue;
    place[v] = static_cast<Id>(kept.parent.size());
    if (keep) above[v] = place[v];
    kept.parent.push_back(up);
    kept.end.push_back(tree.end[v]);
    kept.ends.push_back(tree.ends[v]);
  }
  kept.last.reserve(tree.last.size());
  for (const Id v : tree.last) kept.last.push_back(place[v]);
  return kept;
}

}  // namespace pyrl::host
