#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace pyrl::host {

using Id = int32_t;  // of a sequence or a node: there are fewer than 2 nodes a sequence, 2 more

// Sequence i is tokens[offsets[i]:offsets[i + 1]]; its first shareable[i] tokens may be shared.
struct Sequences {
  const int64_t* tokens;
  const int64_t* offsets;
  const int64_t* shareable;
  Id count;

  int64_t length(Id i) const { return offsets[i + 1] - offsets[i]; }
};

// Nodes in depth-first preorder, node 0 an empty root. Node v holds tokens end[parent[v]]:end[v].
struct Tree {
  std::vector<Id> parent;
  std::vector<int64_t> end;
  std::vector<uint8_t> ends;  // [node]: some sequence ends there
  std::vector<Id> last;       // [sequence]: the node it ends at
};

// Ids of a forest in depth-first preorder, siblings by rising key (in 0..keys-1, distinct among
// siblings). parent is kRoot for a root and kAbsent for an id that is left out.
constexpr Id kRoot = -1, kAbsent = -2;
inline std::vector<Id> preorder(const std::vector<Id>& parent, const std::vector<Id>& key,
                                Id keys) {
  const Id n = static_cast<Id>(parent.size());
  std::vector<Id> start(static_cast<size_t>(keys) + 1, 0);
  for (Id v = 0; v < n; ++v) {
    if (parent[v] != kAbsent) ++start[key[v] + 1];
  }
  for (Id k = 0; k < keys; ++k) start[k + 1] += start[k];
  std::vector<Id> order(static_cast<size_t>(start[keys]));
  for (Id v = 0; v < n; ++v) {
    if (parent[v] != kAbsent) order[start[key[v]]++] = v;
  }
  // Children in a linked list, pushed to its front by falling key.
  std::vector<Id> child(static_cast<size_t>(n), -1), next(static_cast<size_t>(n), -1);
  Id root = -1;
  for (size_t j = order.size(); j-- > 0;) {
    const Id v = order[j];
    Id& front = parent[v] == kRoot ? root : child[parent[v]];
    next[v] = front;
    front = v;
  }
  size_t filled = 0;
  for (Id v = root; v >= 0;) {
    order[filled++] = v;
    if (child[v] >= 0) {
      v = child[v];
      continue;
    }
    while (v >= 0 && next[v] < 0) v = parent[v];
    if (v >= 0) v = next[v];
  }
  return order;
}

// Radix tree of the shareable prefixes: (node, first token) -> child, in one hash table.
class RadixTree {
 public:
  explicit RadixTree(const Sequences& sequences) : s_(sequences), slots_(1024) {
    nodes_.push_back({0, kRoot, nullptr, 0, 0});
  }

  // The node where the shareable prefix of sequence i ends.
  Id insert(Id i) {
    const int64_t* own = s_.tokens + s_.offsets[i];
    const int64_t limit = s_.shareable[i];
    Id at = 0;
    for (int64_t depth = 0; depth < limit;) {
      Slot& slot = find(at, own[depth]);
      if (slot.child == 0) {
        at = add(slot, {i, at, own, depth, limit});
        break;
      }
      const Id child = slot.child;
      const Node node = nodes_[child];
      const int64_t stop = node.end < limit ? node.end : limit;
      // The hash table compared the first token.
      depth = common(node.text, own, depth + 1, stop);
      at = child;
      if (depth < node.end) {
        // The child keeps its id, so what points to its end stays right; the part above is new.
        at = static_cast<Id>(nodes_.size());
        slot.child = at;
        nodes_.push_back({node.sequence, node.parent, node.text, node.begin, depth});
        nodes_[child].parent = at;
        nodes_[child].begin = depth;
        put(at, node.text[depth], child);
      }
    }
    return at;
  }

  // The finished tree; at[i] = insert(i) of all sequences in order. What a sequence has beyond its
  // shareable prefix becomes a node of its own.
  Tree finish(const std::vector<Id>& at) {
    Tree tree;
    tree.last = at;
    for (Id i = 0; i < s_.count; ++i) {
      if (s_.shareable[i] == s_.length(i)) continue;
      tree.last[i] = static_cast<Id>(nodes_.size());
      nodes_.push_back({i, at[i], nullptr, s_.shareable[i], s_.length(i)});
    }
    const size_t n = nodes_.size();
    std::vector<Id> parent(n), key(n);
    for (size_t v = 0; v < n; ++v) {
      parent[v] = nodes_[v].parent;
      // The first sequence through a node is the smallest: they were inserted in order.
      key[v] = nodes_[v].sequence;
    }
    const std::vector<Id> order = preorder(parent, key, s_.count + 1);
    std::vector<Id> place(n);
    tree.parent.resize(n);
    tree.end.resize(n);
    tree.ends.assign(n, 0);
    for (size_t j = 0; j < n; ++j) {
      place[order[j]] = static_cast<Id>(j);
      tree.parent[j] = j == 0 ? kRoot : place[parent[order[j]]];
      tree.end[j] = nodes_[order[j]].end;
    }
    for (Id& v : tree.last) {
      v = place[v];
      tree.ends[v] = 1;
    }
    return tree;
  }

 private:
  struct Node {
    Id sequence, parent;
    const int64_t* text;  // of the sequence, so that a walk does not look it up
    int64_t begin, end;
  };
  struct Slot {
    int64_t token = 0;
    Id node = 0, child = 0;  // child 0: free, since the root is nobody's child
  };

  // First position in from:to where the two differ, `to` if none.
  static int64_t common(const int64_t* a, const int64_t* b, int64_t from, int64_t to) {
    if (from < to && std::memcmp(a + from, b + from, (to - from) * sizeof(int64_t)) == 0) return to;
    while (from < to && a[from] == b[from]) ++from;
    return from;
  }

  // The slot of (node, token), or the free one where it belongs.
  Slot& find(Id node, int64_t token) {
    uint64_t hash = (static_cast<uint64_t>(token) + 1) * 0x9e3779b97f4a7c15u;
    hash ^= (static_cast<uint64_t>(node) + 1) * 0xd1b54a32d192ed03u;
    hash = (hash ^ (hash >> 32)) * 0x9e3779b97f4a7c15u;
    size_t at = static_cast<size_t>(hash >> 20) & (slots_.size() - 1);
    while (slots_[at].child != 0 && (slots_[at].token != token || slots_[at].node != node)) {
      at = (at + 1) & (slots_.size() - 1);
    }
    return slots_[at];
  }

  Id add(Slot& slot, const Node& node) {
    const Id id = static_cast<Id>(nodes_.size());
    const int64_t token = node.text[node.begin];
    nodes_.push_back(node);
    slot = {token, node.parent, id};
    grow();
    return id;
  }

  void put(Id node, int64_t token, Id child) {
    find(node, token) = {token, node, child};
    grow();
  }

  void grow() {
    if (++used_ * 2 < slots_.size()) return;
    std::vector<Slot> old(slots_.size() * 4);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.child != 0) find(slot.node, slot.token) = slot;
    }
  }

  const Sequences s_;
  std::vector<Node> nodes_;
  std::vector<Slot> slots_;
  size_t used_ = 0;
};

}  // namespace pyrl::host
