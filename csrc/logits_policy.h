// logits -> objective -> gradient of a row in one read and one write: the algorithm of
// cuda/logits_policy.cu, over a Team that supplies copies, exchanges and barriers. Plain C++ apart
// from that, so tests/native/cluster_emulation.cpp runs this very code on the host.
//
// A cluster of CTAs works one row at a time; its warps share the row's 16-byte packs evenly. Every
// warp has a ring of segments in shared memory of its own: lane 0 has segments copied in as far
// ahead as the ring allows (the next rows' too), all lanes sum over them as they arrive, and after
// one exchange over the cluster the gradient replaces them in the ring and is copied out, which
// frees them for the next rows. Packs begin at the row's first 16-byte boundary; up to 14 elements
// outside them are read and written by single lanes of the last warp.
#pragma once

#include "row_plan.h"

namespace pyrl::one_read {

constexpr int kLanes = 32;
#ifndef PYRL_ROW_WARPS
#define PYRL_ROW_WARPS 8
#endif
#ifndef PYRL_SEGMENT_PACKS
#define PYRL_SEGMENT_PACKS 128
#endif
constexpr int kWarps = PYRL_ROW_WARPS;             // of a CTA
constexpr int kSegmentPacks = PYRL_SEGMENT_PACKS;  // of one copy
constexpr int kPackBytes = 16;
constexpr int kSegmentBytes = kSegmentPacks * kPackBytes;
constexpr int kMaxCtas = 16;
constexpr int kPortableCtas = 8;  // more is a launch attribute, and a choice of fewer places
static_assert(kSegmentPacks % kLanes == 0, "lanes share a segment evenly");

// Sums of one warp over its part of a row, relative to 2^m: s = sum 2^(y - m), t = sum of that
// times (y - m).
struct alignas(16) Partial {
  float m, s, t, unused;
};

// Bytes of shared memory beside the ring, rounded up to keep it aligned.
constexpr int64_t shared_overhead(int ctas, int slots) {
  const int64_t bytes = 2 * ctas * kWarps * static_cast<int64_t>(sizeof(Partial)) + sizeof(Plan) +
                        kWarps * slots * 8;
  return (bytes + 127) / 128 * 128;
}
constexpr int64_t shared_bytes(int ctas, int slots) {
  return shared_overhead(ctas, slots) + static_cast<int64_t>(kWarps) * slots * kSegmentBytes;
}

// How a row is spread: CTAs of a cluster, segments in the ring of each warp; ctas 0: no way.
struct Spread {
  int ctas, slots;
};

// Segments that the busiest warp has of a row.
inline int64_t segments_needed(int64_t row_bytes, int ctas) {
  const int64_t packs = row_bytes / kPackBytes, warps = ctas * static_cast<int64_t>(kWarps);
  const int64_t each = (packs + warps - 1) / warps;
  return (each + kSegmentPacks - 1) / kSegmentPacks;
}

// The smallest cluster whose rings hold this row and the next one; failing that the largest
// portable one that holds the row, then 16 CTAs. `wanted` fixes the number instead.
inline Spread spread_of(int64_t row_bytes, int64_t shared_per_cta, int wanted) {
  Spread holds{0, 0};
  for (int ctas = 1; ctas <= kMaxCtas; ctas *= 2) {
    if (wanted != 0 && ctas != wanted) continue;
    int slots = 0;
    while (slots < 64 && shared_bytes(ctas, slots + 1) <= shared_per_cta) ++slots;
    const int64_t needed = segments_needed(row_bytes, ctas);
    if (slots == 0 || needed > slots) continue;
    if (ctas <= kPortableCtas || holds.ctas == 0) holds = {ctas, slots};
    if (2 * needed <= slots && ctas <= kPortableCtas) break;
  }
  return holds;
}

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = kPackBytes / sizeof(T);
  T value[kSize];
};

// A row in memory and the packs [begin, end) that one of `warps` warps works.
template <class T>
struct Part {
  static constexpr int kPer = Pack<T>::kSize;
  const T* in;
  T* out;
  int head, packs, vocab, begin, end;
  bool alike;  // the packs of `in` are packs of `out`
  bool last;   // this warp works the elements outside the packs

  PYRL_TEAM Part(const T* in, T* out, int64_t v, int warp, int warps)
      : in(in), out(out), vocab(static_cast<int>(v)) {
    const auto from = reinterpret_cast<uintptr_t>(in), to = reinterpret_cast<uintptr_t>(out);
    const int misaligned = static_cast<int>(from % kPackBytes / sizeof(T));
    head = misaligned ? kPer - misaligned : 0;
    head = head < vocab ? head : vocab;
    packs = (vocab - head) / kPer;
    alike = (from - to) % kPackBytes == 0;
    const int each = (packs + warps - 1) / warps;
    begin = warp * each < packs ? warp * each : packs;
    end = begin + each < packs ? begin + each : packs;
    last = warp == warps - 1;
  }
  PYRL_TEAM int segments() const { return (end - begin + kSegmentPacks - 1) / kSegmentPacks; }
  // Packs of segment s, and its first element.
  PYRL_TEAM int size(int s) const {
    const int rest = end - begin - s * kSegmentPacks;
    return rest < kSegmentPacks ? rest : kSegmentPacks;
  }
  PYRL_TEAM int element(int s) const { return head + (begin + s * kSegmentPacks) * kPer; }
  // This lane's element outside the packs, -1: none.
  PYRL_TEAM int single(int lane) const {
    if (!last || lane >= vocab - packs * kPer) return -1;
    return lane < head ? lane : lane + packs * kPer;
  }
};

// What a row needs before its logits are there, read one row ahead.
struct Place {
  int in, out;  // rows of the matrices
  float inv_temperature;
  bool keep;

  PYRL_TEAM Place(const LogitsPolicy& b, int i, int n)
      : in(i), out(i), inv_temperature(0.0f), keep(false) {
    if (i >= n) return;
    if (b.rows.at.index) in = static_cast<int>(b.rows.at.index[i]);
    if (b.at.index) out = static_cast<int>(b.at.index[i]);
    inv_temperature = b.rows.inv_temperature[i];
    keep = b.keep[i];
  }
};

// The copies into one warp's ring, as far ahead as it has room.
template <class T>
struct Feed {
  const LogitsPolicy& b;
  int n, step, warp, warps, slots;
  int row;      // whose segments are being copied in
  Place ahead;  // the row after it
  const unsigned char* from = nullptr;
  int rest = 0;  // bytes of it left
  int slot = 0, issued = 0;

  PYRL_TEAM Feed(const LogitsPolicy& b, int first, int step, int n, int warp, int warps, int slots)
      : b(b), n(n), step(step), warp(warp), warps(warps), slots(slots), row(first - step),
        ahead(b, first, n) {
    next();
  }
  // To the next kept row that this warp has a part of.
  PYRL_TEAM void next() {
    while (rest == 0 && row < n) {
      row += step;
      const Place now = ahead;
      ahead = Place(b, row + step, n);
      if (!now.keep) continue;
      const T* z = static_cast<const T*>(b.rows.z) + now.in * b.rows.at.stride;
      const Part<T> part(z, nullptr, b.rows.vocab, warp, warps);
      from = reinterpret_cast<const unsigned char*>(z + part.element(0));
      rest = (part.end - part.begin) * kPackBytes;
    }
  }
  // `used` segments have left the ring.
  template <class Team>
  PYRL_TEAM void fill(Team& team, int used) {
    while (issued - used < slots && rest > 0) {
      const int bytes = rest < kSegmentBytes ? rest : kSegmentBytes;
      if (team.lane() == 0) team.load(slot, from, bytes);
      from += bytes;
      rest -= bytes;
      ++issued;
      slot = slot + 1 == slots ? 0 : slot + 1;
      next();
    }
  }
};

template <class T, class Team>
PYRL_TEAM void zero_row(Team& team, T* out, int64_t vocab, int warp, int warps) {
  const Part<T> part(out, out, vocab, warp, warps);
  auto* packs = reinterpret_cast<Pack<T>*>(out + part.head);
  for (int i = part.begin + team.lane(); i < part.end; i += kLanes) {
    Pack<T> zero;
    PYRL_UNROLL
    for (int k = 0; k < Part<T>::kPer; ++k) zero.value[k] = Team::template from_float<T>(0.0f);
    packs[i] = zero;
  }
  const int single = part.single(team.lane());
  if (single >= 0) out[single] = Team::template from_float<T>(0.0f);
}

// The largest of a pack, or the smallest; NaN counts for nothing.
template <int kSize>
PYRL_TEAM float largest(const float (&v)[kSize], bool smallest) {
  float top = smallest ? INFINITY : -INFINITY;
  if (smallest) {
    PYRL_UNROLL
    for (int k = 0; k < kSize; ++k) top = fminf(top, v[k]);
  } else {
    PYRL_UNROLL
    for (int k = 0; k < kSize; ++k) top = fmaxf(top, v[k]);
  }
  return top;
}

// The warp's sums over one segment of its ring.
template <class T, bool kCapped, class Team>
PYRL_TEAM void sum_segment(const Pack<T>* ring, int size, int lane, const Scale<kCapped>& scale,
                           Sums& mine) {
  for (int i = lane; i < size; i += kLanes) {
    const Pack<T> pack = ring[i];
    float y[Part<T>::kPer];  // uncapped: z, whose product with the factor is not rounded below
    PYRL_UNROLL
    for (int k = 0; k < Part<T>::kPer; ++k) {
      const float z = Team::to_float(pack.value[k]);
      y[k] = kCapped ? scale.y(z) : z;
    }
    const float top = kCapped ? largest(y, false) : scale.y(largest(y, scale.factor < 0.0f));
    mine.raise(top);
    const float shift = mine.shift();
    PYRL_UNROLL
    for (int k = 0; k < Part<T>::kPer; ++k) {
      mine.add(kCapped ? y[k] - shift : fmaf(y[k], scale.factor, -shift));
    }
  }
}

// The gradient over one segment, in the ring, or where `out` lies otherwise to memory directly.
template <class T, bool kCapped, class Team>
PYRL_TEAM void grad_segment(Pack<T>* ring, const Part<T>& part, int s, int lane, const Plan& plan,
                            const Scale<kCapped>& scale) {
  const int first = part.element(s), size = part.size(s);
  for (int i = lane; i < size; i += kLanes) {
    Pack<T> pack = ring[i];
    PYRL_UNROLL
    for (int k = 0; k < Part<T>::kPer; ++k) {
      const float dz = plan.zero ? 0.0f : gradient(plan, scale, Team::to_float(pack.value[k]));
      pack.value[k] = Team::template from_float<T>(dz);
    }
    if (part.alike) {
      ring[i] = pack;
    } else {
      PYRL_UNROLL
      for (int k = 0; k < Part<T>::kPer; ++k) {
        part.out[first + i * Part<T>::kPer + k] = pack.value[k];
      }
    }
  }
  // The target's own term, by the lane that has just written its pack.
  const int at = plan.target - first;
  if (at < 0 || at >= size * Part<T>::kPer || at / Part<T>::kPer % kLanes != lane) return;
  T* to = part.alike ? reinterpret_cast<T*>(ring) + at : part.out + plan.target;
  *to = Team::template from_float<T>(plan.target_dz);
}

// All rows of one cluster: rows first, first + step, ...
template <class T, bool kCapped, class Team>
PYRL_TEAM void policy_rows(Team& team, const LogitsPolicy& b, const ObjectiveParams& p, int n, int first,
                           int step) {
  const int lane = team.lane(), ctas = team.ctas(), slots = team.slots();
  const int warps = ctas * kWarps, warp = team.rank() * kWarps + team.warp();
  int used = 0, slot = 0, phase = 0, parity = 0;
  Feed<T> feed(b, first, step, n, warp, warps, slots);
  feed.fill(team, 0);
  Place next(b, first, n);
  for (int row = first; row < n; row += step) {
    const Place at = next;
    next = Place(b, row + step, n);
    T* out = static_cast<T*>(b.dz) + at.out * b.at.stride;
    if (!at.keep) {
      zero_row<T>(team, out, b.rows.vocab, warp, warps);
      if (warp == 0 && lane == 0) b.stats.logprob[row] = b.stats.entropy[row] = b.stats.lse[row] = 0;
      continue;
    }
    const T* in = static_cast<const T*>(b.rows.z) + at.in * b.rows.at.stride;
    const Part<T> part(in, out, b.rows.vocab, warp, warps);
    const Scale<kCapped> scale(b.rows, at.inv_temperature);
    const int single = part.single(lane);
    const float raw = single >= 0 ? Team::to_float(in[single]) : 0.0f;
    Fields fields;
    if (team.warp() == 0) fields.read<Team>(b, row, in);  // before any CTA writes the row

    Sums mine;
    const int segments = part.segments(), start = slot;
    for (int s = 0; s < segments; ++s) {
      // The last segment of the row before may still be on its way out.
      if (s == 1 || used + s == feed.issued) {
        team.wait_stores(0);
        feed.fill(team, used);
      }
      team.wait_load(slot, phase);
      sum_segment<T, kCapped, Team>(team.template ring<Pack<T>>(slot), part.size(s), lane, scale,
                                    mine);
      if (++slot == slots) {
        slot = 0;
        phase ^= 1;
      }
    }
    if (single >= 0) {
      float unused;
      mine.raise(scale.y(raw));
      mine.add(scale.d(raw, mine.shift(), &unused));
    }
    const float top = team.warp_max(mine.m);
    const Sums moved = mine.at(top);
    const Partial partial{top, team.warp_sum(moved.s), team.warp_sum(moved.t), 0.0f};
    if (lane < ctas) team.post(lane, parity, warp, partial);
    team.cluster_sync();
    if (team.warp() == 0) {
      float m = -INFINITY;
      for (int i = lane; i < warps; i += kLanes) m = fmaxf(m, team.board(parity, i).m);
      m = team.warp_max(m);
      double s = 0.0, t = 0.0;
      for (int i = lane; i < warps; i += kLanes) {
        const Partial one = team.board(parity, i);
        Sums sums;
        sums.m = one.m;
        sums.s = one.s;
        sums.t = one.t;
        sums = sums.at(m);
        s += sums.s;
        t += sums.t;
      }
      s = team.warp_sum(s);
      t = team.warp_sum(t);
      Stats stats;
      const Plan plan = plan_row<kCapped>(p, scale, fields, m, s, t, &stats);
      if (lane == 0) {
        team.plan() = plan;
        if (team.rank() == 0) {
          b.stats.logprob[row] = stats.logprob;
          b.stats.entropy[row] = stats.entropy;
          b.stats.lse[row] = stats.lse;
        }
      }
    }
    team.block_sync();
    const Plan plan = team.plan();
    int place = start;
    for (int s = 0; s < segments; ++s) {
      grad_segment<T, kCapped, Team>(team.template ring<Pack<T>>(place), part, s, lane, plan,
                                     scale);
      team.written();  // by this lane, for the copy out and for the next copy in
      if (part.alike && lane == 0) {
        team.store(part.out + part.element(s), place, part.size(s) * kPackBytes);
      }
      ++used;
      // The newest store may go on reading: the segment before it is free.
      team.wait_stores(part.alike ? 1 : 0);
      feed.fill(team, part.alike ? used - 1 : used);
      place = place + 1 == slots ? 0 : place + 1;
    }
    if (single >= 0) {
      const float dz = single == plan.target ? plan.target_dz
                       : plan.zero           ? 0.0f
                                             : gradient(plan, scale, raw);
      part.out[single] = Team::template from_float<T>(dz);
    }
    parity ^= 1;
  }
  team.wait_stores(0);  // others post to this CTA before its last cluster_sync only: it may leave
}

}  // namespace pyrl::one_read
