// Rows whose softmax runs over a sampling support: its logits are gathered into a short row, which
// the kernels of rows.h take as they take any other, and the gradient is scattered back.
#include <algorithm>
#include <vector>

#include "check.h"

namespace pyrl::cpu {
namespace {

// Fewer elements than this are not worth waking a thread for.
constexpr int64_t kGrain = 32768;

template <class Id>
struct Support {
  const int64_t* spans;
  const Id* ids;

  explicit Support(const SupportRows& s) : spans(s.spans), ids(static_cast<const Id*>(s.ids)) {}
  const Id* begin(int64_t row) const { return ids + spans[2 * row]; }
  int64_t size(int64_t row) const { return spans[2 * row + 1] - spans[2 * row]; }
};

inline int64_t offset(const RowIndex& at, int64_t i) {
  return (at.index ? at.index[i] : i) * at.stride;
}

// Where the target of each row that `used` names is in its support. What is outside is an error.
template <class Id, class Used>
std::vector<int64_t> places(const LogitsRows& rows, const SupportRows& s, int64_t n,
                            const Used& used) {
  const Support<Id> support(s);
  std::vector<int64_t> found(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!used(i)) continue;
    const int64_t begin = s.spans[2 * i], end = s.spans[2 * i + 1];
    PYRL_CHECK(begin >= 0 && begin <= end && end <= s.entries, "spans[", i, "]=[", begin, ", ",
               end, "): expected a part of the ", s.entries, " ids");
    int64_t place = -1;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t id = support.ids[k];
      PYRL_CHECK(id >= 0 && id < rows.vocab, "ids[", k, "]=", id, ": expected a token id in [0, ",
                 rows.vocab, ")");
      if (id == rows.target[i]) place = k - begin;
    }
    PYRL_CHECK(place >= 0, "target[", i, "]=", rows.target[i], ": outside its support of ",
               end - begin, " tokens");
    found[i] = place;
  }
  return found;
}

// Row `row` of `rows` as the first row of a matrix of its own, its logits in `compact`.
template <class Element, class Id>
LogitsRows gather(const LogitsRows& rows, const Support<Id>& support, int64_t row,
                  const int64_t* place, std::vector<Element>& compact) {
  const auto* z = static_cast<const Element*>(rows.z) + offset(rows.at, row);
  const Id* ids = support.begin(row);
  const int64_t count = support.size(row);
  compact.resize(count);
  for (int64_t k = 0; k < count; ++k) compact[k] = z[ids[k]];
  return {compact.data(),   {count, nullptr},           rows.dtype,       count,
          place,            rows.inv_temperature + row, rows.logit_scale, rows.softcap};
}

template <class Element, class Id>
void stats(const LogitsRows& rows, const SupportRows& s, const LogitsStats& out, int64_t n) {
  const std::vector<int64_t> place = places<Id>(rows, s, n, [](int64_t) { return true; });
  const RowKernels& kernels = chosen_rows();
  const Support<Id> support(s);
  const int64_t grain = std::max<int64_t>(1, kGrain / (1 + s.entries / n));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<Element> compact;
    for (int64_t i = begin; i < end; ++i) {
      const LogitsRows row = gather(rows, support, i, &place[i], compact);
      kernels.stats(row, {out.logprob + i, out.entropy + i, out.lse + i}, 0, 1);
    }
  });
}

template <class Element, class Id>
void grad(const LogitsRows& rows, const SupportRows& s, const LogitsGrad& in, int64_t n) {
  const auto used = [&](int64_t i) {
    return in.c[i] != 0 || in.h[i] != 0 || (in.g && in.g[i] != 0);
  };
  const std::vector<int64_t> place = places<Id>(rows, s, n, used);
  const RowKernels& kernels = chosen_rows();
  const Support<Id> support(s);
  const int64_t grain = std::max<int64_t>(1, kGrain / rows.vocab);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<Element> compact;
    for (int64_t i = begin; i < end; ++i) {
      auto* dz = static_cast<Element*>(in.dz) + offset(in.at, i);
      if (!used(i)) {
        std::fill_n(dz, rows.vocab, Element{});
        continue;
      }
      const LogitsRows row = gather(rows, support, i, &place[i], compact);
      kernels.grad(row,
                   {compact.data(), row.at, in.lse + i, in.entropy + i, in.c + i, in.h + i,
                    in.g ? in.g + i : nullptr},
                   0, 1);
      std::fill_n(dz, rows.vocab, Element{});
      const Id* ids = support.begin(i);
      for (size_t k = 0; k < compact.size(); ++k) dz[ids[k]] = compact[k];
    }
  });
}

// Calls body with an element of z's size and an id of the support's: only their bits are moved here.
template <class Body>
void dispatch(const LogitsRows& rows, const SupportRows& support, const Body& body) {
  const auto with = [&](auto element) {
    support.wide ? body(element, int64_t{}) : body(element, int32_t{});
  };
  rows.dtype == DType::kF32 ? with(uint32_t{}) : with(uint16_t{});
}

}  // namespace

void support_stats(const LogitsRows& rows, const SupportRows& support, const LogitsStats& out,
                   int64_t n) {
  if (n == 0) return;
  dispatch(rows, support, [&](auto element, auto id) {
    stats<decltype(element), decltype(id)>(rows, support, out, n);
  });
}

void support_grad(const LogitsRows& rows, const SupportRows& support, const LogitsGrad& in,
                  int64_t n) {
  if (n == 0) return;
  dispatch(rows, support, [&](auto element, auto id) {
    grad<decltype(element), decltype(id)>(rows, support, in, n);
  });
}

}  // namespace pyrl::cpu
