#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "fill.h"
#include "radix_tree.h"
#include "sharing.h"

namespace pyrl::host {

// Segments row after row, each row in depth-first preorder; see pyrl.packing.prefix_tree.
struct Layout {
  std::vector<int64_t> row, parent, subtree, sequence, begin, end;  // [segment]
  std::vector<int64_t> leaf;                                        // [sequence]
};

// Segments as a forest with one root a row. Ids below `nodes` are those of the tree of segments;
// those above are copies of nodes that are too large for one row, copies of node 0 being the rows.
struct Forest {
  std::vector<Id> parent, node;
  std::vector<Id> last;  // [sequence]
};

// A node whose subtree fits in a row below its prefix stays whole. Of a larger one, the children
// (in parts, where they are too large themselves) are put by best-fit decreasing into parts that
// leave room for the node's own prefix, which every part repeats. The root is such a node, with an
// empty prefix: its parts are the rows, and as few as two ways of packing find. Two parts of a node
// never share a row, since best fit leaves no two parts that fit in one.
inline Forest place(const Tree& tree, int64_t capacity) {
  const Id n = static_cast<Id>(tree.parent.size());
  std::vector<int64_t> size(static_cast<size_t>(n), 0);
  std::vector<uint8_t> large(static_cast<size_t>(n), 0);
  for (Id v = n - 1; v > 0; --v) {
    const Id up = tree.parent[v];
    size[v] += tree.end[v] - tree.end[up];
    size[up] += size[v];
    large[v] = size[v] > capacity - tree.end[up];
  }
  large[0] = 1;

  Forest forest{tree.parent, std::vector<Id>(static_cast<size_t>(n)), tree.last};
  std::iota(forest.node.begin(), forest.node.end(), Id{0});
  std::vector<Id> front(static_cast<size_t>(n), -1), next(static_cast<size_t>(n), -1);
  std::vector<Id> part_of_ends(static_cast<size_t>(n), -1);
  const auto push = [&](Id piece, Id up) {
    next[piece] = front[up];
    front[up] = piece;
  };
  std::vector<Id> pieces;
  std::vector<int64_t> lengths, bins, filled;
  for (Id v = n - 1; v >= 0; --v) {  // children first, the lists so in rising order
    const Id up = tree.parent[v];
    if (!large[v]) {
      if (large[up]) push(v, up);
      continue;
    }
    pieces.clear();
    lengths.clear();
    for (Id piece = front[v]; piece >= 0; piece = next[piece]) {
      pieces.push_back(piece);
      lengths.push_back(size[piece]);
    }
    const Id count = static_cast<Id>(pieces.size());
    bins.resize(pieces.size());
    const auto pack = v == 0 ? few_bins : best_fit;
    pack(lengths.data(), count, capacity - tree.end[v], bins.data());
    const Id first = static_cast<Id>(forest.parent.size());
    filled.assign(count ? *std::max_element(bins.begin(), bins.end()) + 1 : 0, 0);
    for (Id j = 0; j < count; ++j) {
      forest.parent[pieces[j]] = first + static_cast<Id>(bins[j]);
      filled[bins[j]] += lengths[j];
    }
    const int64_t own = v == 0 ? 0 : tree.end[v] - tree.end[up];
    for (const int64_t content : filled) {
      forest.parent.push_back(kRoot);
      forest.node.push_back(v);
      size.push_back(own + content);
      next.push_back(-1);
    }
    if (v > 0) {
      for (Id piece = static_cast<Id>(forest.parent.size()); piece-- > first;) push(piece, up);
    }
    forest.parent[v] = kAbsent;
    part_of_ends[v] = first;
  }
  for (Id& last : forest.last) {
    if (part_of_ends[last] >= 0) last = part_of_ends[last];
  }
  return forest;
}

inline Layout lay_out(const Tree& tree, Forest forest, Id sequences) {
  const Id n = static_cast<Id>(forest.parent.size());
  const Id nodes = static_cast<Id>(tree.parent.size());
  // The smallest sequence of each; ways on from it, a sequence's end being one.
  std::vector<Id> smallest(static_cast<size_t>(n), sequences), ways(static_cast<size_t>(n), 0);
  for (Id i = 0; i < sequences; ++i) {
    const Id v = forest.last[i];
    smallest[v] = std::min(smallest[v], i);
    ways[v] = 1;
  }
  const auto raise = [&](Id v) {
    const Id up = forest.parent[v];
    if (up < 0) return;
    smallest[up] = std::min(smallest[up], smallest[v]);
    ++ways[up];
  };
  for (Id v = nodes; v-- > 0;) raise(v);
  for (Id v = nodes; v < n; ++v) raise(v);
  Id rows = 0;
  for (Id v = nodes; v < n; ++v) {
    if (forest.node[v] == 0) smallest[v] = rows++;
  }
  // A part with one way on is no branching: its tokens go to the segment below. Parents first.
  std::vector<Id> through(static_cast<size_t>(n), -1);  // what is above such a part
  const auto pass = [&](Id v) {
    Id& up = forest.parent[v];
    if (up < 0) return;
    if (through[up] >= 0) up = through[up];
    if (v >= nodes && ways[v] == 1) {
      through[v] = up;
      up = kAbsent;
    }
  };
  for (Id v = n; v-- > nodes;) pass(v);
  for (Id v = 0; v < nodes; ++v) pass(v);

  const std::vector<Id> order = preorder(forest.parent, smallest, sequences + 1);
  const size_t segments = order.size() - static_cast<size_t>(rows);
  Layout out;
  for (auto* column : {&out.row, &out.parent, &out.subtree, &out.sequence, &out.begin, &out.end}) {
    column->reserve(segments);
  }
  std::vector<Id> index(static_cast<size_t>(n), -1);  // of a row's root: -1
  int64_t row = -1;
  for (const Id v : order) {
    const Id up = forest.parent[v];
    if (up == kRoot) {
      ++row;
      continue;
    }
    index[v] = static_cast<Id>(out.row.size());
    out.row.push_back(row);
    out.parent.push_back(index[up]);
    out.subtree.push_back(index[v] + 1);
    out.sequence.push_back(smallest[v]);
    out.begin.push_back(tree.end[forest.node[up]]);
    out.end.push_back(tree.end[forest.node[v]]);
  }
  for (size_t j = out.row.size(); j-- > 0;) {
    const int64_t up = out.parent[j];
    if (up >= 0) out.subtree[up] = std::max(out.subtree[up], out.subtree[j]);
  }
  out.leaf.reserve(static_cast<size_t>(sequences));
  for (const Id v : forest.last) out.leaf.push_back(index[v]);
  return out;
}

inline Layout plan_tree(const Sequences& sequences, int64_t capacity, const Costs& cost) {
  std::vector<Id> at(static_cast<size_t>(sequences.count));
  RadixTree prefixes(sequences);
  for (Id i = 0; i < sequences.count; ++i) at[i] = prefixes.insert(i);
  const Tree tree = share(prefixes.finish(at), cost);
  return lay_out(tree, place(tree, capacity), sequences.count);
}

}  // namespace pyrl::host
