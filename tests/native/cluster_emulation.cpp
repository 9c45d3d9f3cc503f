// csrc/logits_policy.h on the host: every thread of a cluster is a coroutine, so the code that runs
// is the GPU's, its ring, phases and exchanges included. Copies take effect late and in a random
// order, a slot being filled holds NaN until then, and threads run in a random order: a wait that is
// missing gives wrong numbers or a deadlock, which is reported.
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "logits_policy.h"

namespace {

using namespace pyrl;
using one_read::kLanes;
using one_read::kWarps;
using one_read::Partial;
using one_read::Plan;

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

float widen(float v) { return v; }
float widen(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float widen(Half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float f = exponent == 31  ? (mantissa ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                            : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return v.bits >> 15 ? -f : f;
}
void narrow(float f, float* to) { *to = f; }
void narrow(float f, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  to->bits = f != f ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void narrow(float f, Half* to) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  uint16_t bits;
  if (a != a) {
    bits = 0x7e00;
  } else if (a >= 65520.0f) {
    bits = 0x7c00;
  } else if (a < std::ldexp(1.0f, -14)) {
    bits = static_cast<uint16_t>(std::nearbyint(std::ldexp(a, 24)));
  } else {
    int e;
    std::frexp(a, &e);
    const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(a, 11 - e)));  // 1024 ... 2048
    bits = static_cast<uint16_t>(((e + 14) << 10) + mantissa - 1024);
  }
  to->bits = bits | sign;
}

struct Barrier {
  int expected, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
  int* completed;  // counts
};

// What the lanes of a warp share.
struct Warp {
  Barrier barrier{kLanes};
  std::vector<unsigned char> memory;
  unsigned char* ring;
  std::vector<int> loads;  // completed, of each slot
  std::vector<std::unique_ptr<int>> stores;
  double value[kLanes];
};

struct Cta {
  Barrier barrier{kWarps * kLanes};
  std::vector<Warp> warps = std::vector<Warp>(kWarps);
  std::vector<Partial> board;
  Plan plan;
  int left = 0;  // threads that have returned
};

struct Cluster;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;
  bool finished = false;
  int cta, warp, lane;
  Cluster* cluster;
};

struct Cluster {
  int slots;
  Barrier barrier;
  std::vector<Cta> ctas;
  std::vector<Fiber> fibers;
  std::vector<Copy> copies;
  std::mt19937 random;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::string failure;
  std::function<void(Fiber&)> body;

  Cluster(int count, int slots, unsigned seed)
      : slots(slots), barrier{count * kWarps * kLanes}, ctas(count), random(seed) {
    for (Cta& cta : ctas) {
      cta.board.resize(2 * count * kWarps);
      for (Warp& warp : cta.warps) {
        warp.memory.resize(slots * one_read::kSegmentBytes + 16);
        const auto at = reinterpret_cast<uintptr_t>(warp.memory.data());
        warp.ring = warp.memory.data() + (16 - at % 16) % 16;
        warp.loads.assign(slots, 0);
      }
    }
  }
  void block(std::function<bool()> ready) {
    running->ready = std::move(ready);
    swapcontext(&running->context, &scheduler);
  }
  void sync(Barrier& b) {
    const unsigned mine = b.generation;
    if (++b.arrived == b.expected) {
      b.arrived = 0;
      ++b.generation;
    } else {
      block([&b, mine] { return b.generation != mine; });
    }
  }
  void complete(size_t i) {
    std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
    ++*copies[i].completed;
    copies[i] = copies.back();
    copies.pop_back();
  }
  static void enter(unsigned high, unsigned low) {
    auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    fiber->cluster->body(*fiber);
    fiber->finished = true;
    ++fiber->cluster->ctas[fiber->cta].left;
    swapcontext(&fiber->context, &fiber->cluster->scheduler);
  }
  void run() {
    constexpr size_t kStack = 64 << 10;
    fibers = std::vector<Fiber>(ctas.size() * kWarps * kLanes);
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& f = fibers[i];
      f.lane = i % kLanes;
      f.warp = i / kLanes % kWarps;
      f.cta = i / kLanes / kWarps;
      f.cluster = this;
      f.stack.reset(new char[kStack]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      const auto address = reinterpret_cast<uintptr_t>(&f);
      makecontext(&f.context, reinterpret_cast<void (*)()>(enter), 2,
                  static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
    }
    std::vector<int> stalled(ctas.size() * kWarps);  // rounds that a warp sits out
    for (size_t left = fibers.size(); left > 0;) {
      for (int& rounds : stalled) rounds -= rounds > 0;
      if (random() % 8 == 0) stalled[random() % stalled.size()] = static_cast<int>(random() % 80);
      if (!failure.empty()) throw std::runtime_error(failure);
      bool moved = false;
      const size_t begin = random() % fibers.size();
      const bool backward = random() % 2;
      for (size_t k = 0; k < fibers.size(); ++k) {
        const size_t i = (backward ? 2 * fibers.size() - k : k) + begin;
        Fiber& f = fibers[i % fibers.size()];
        if (f.finished || stalled[f.cta * kWarps + f.warp] || (f.ready && !f.ready())) continue;
        if (f.lane == 0 && random() % 4 == 0) continue;  // a warp's leader may be slow
        f.ready = nullptr;
        running = &f;
        swapcontext(&scheduler, &f.context);
        left -= f.finished;
        moved = true;
      }
      const bool all = !moved && random() % 2;
      const size_t before = copies.size();
      for (size_t i = copies.size(); i-- > 0;) {
        if (all || random() % 4 == 0) complete(i);
      }
      bool can = false;
      if (!moved && before == 0) {
        for (Fiber& f : fibers) can = can || (!f.finished && (!f.ready || f.ready()));
        if (!can && left > 0) throw std::runtime_error("deadlock");
      }
    }
    if (!copies.empty()) throw std::runtime_error("copies left behind");
  }
};

class Team {
 public:
  explicit Team(Fiber& f) : f_(f), all_(*f.cluster), cta_(all_.ctas[f.cta]),
                            warp_(cta_.warps[f.warp]) {
    cluster_sync();
  }
  template <class T>
  static float to_float(T v) { return widen(v); }
  template <class T>
  static T from_float(float v) {
    T to;
    narrow(v, &to);
    return to;
  }
  int lane() const { return f_.lane; }
  int warp() const { return f_.warp; }
  int rank() const { return f_.cta; }
  int ctas() const { return static_cast<int>(all_.ctas.size()); }
  int slots() const { return all_.slots; }
  template <class P>
  P* ring(int slot) const {
    return reinterpret_cast<P*>(warp_.ring + slot * one_read::kSegmentBytes);
  }
  void load(int slot, const void* from, int bytes) {
    aligned(from, bytes);
    auto* to = ring<unsigned char>(slot);
    std::memset(to, 0xff, bytes);
    all_.copies.push_back({to, static_cast<const unsigned char*>(from),
                           static_cast<size_t>(bytes), &warp_.loads[slot]});
  }
  void wait_load(int slot, int phase) {
    const int* completed = &warp_.loads[slot];
    all_.block([=] { return (*completed & 1) != phase; });
  }
  void written() { all_.sync(warp_.barrier); }
  void store(void* to, int slot, int bytes) {
    aligned(to, bytes);
    warp_.stores.push_back(std::make_unique<int>(0));
    all_.copies.push_back({static_cast<unsigned char*>(to), ring<unsigned char>(slot),
                           static_cast<size_t>(bytes), warp_.stores.back().get()});
  }
  void wait_stores(int newest) {
    if (lane() != 0) return;
    const auto* stores = &warp_.stores;
    all_.block([=] {
      for (size_t i = 0; i + newest < stores->size(); ++i) {
        if (*(*stores)[i] == 0) return false;
      }
      return true;
    });
  }
  float warp_max(float v) {
    return static_cast<float>(reduce(v, [](double a, double b) { return std::fmax(a, b); }));
  }
  template <class V>
  V warp_sum(V v) {
    return static_cast<V>(reduce(v, [](double a, double b) { return static_cast<V>(a + b); }));
  }
  void post(int to, int parity, int at, const Partial& p) {
    if (all_.ctas[to].left > 0) throw std::runtime_error("posted to a CTA that is leaving");
    all_.ctas[to].board[parity * ctas() * kWarps + at] = p;
  }
  Partial board(int parity, int at) const { return cta_.board[parity * ctas() * kWarps + at]; }
  void cluster_sync() { all_.sync(all_.barrier); }
  void block_sync() { all_.sync(cta_.barrier); }
  Plan& plan() { return cta_.plan; }

 private:
  static void aligned(const void* p, int bytes) {
    if (reinterpret_cast<uintptr_t>(p) % 16 || bytes % 16 || bytes <= 0 ||
        bytes > one_read::kSegmentBytes) {
      throw std::runtime_error("a bulk copy of " + std::to_string(bytes) + " bytes");
    }
  }
  // In the order of a butterfly of shuffles.
  template <class Merge>
  double reduce(double v, Merge merge) {
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      warp_.value[lane()] = v;
      all_.sync(warp_.barrier);
      v = merge(v, warp_.value[lane() ^ distance]);
      all_.sync(warp_.barrier);
    }
    return v;
  }
  Fiber& f_;
  Cluster& all_;
  Cta& cta_;
  Warp& warp_;
};

}  // namespace

extern "C" {

struct Job {
  LogitsPolicy batch;
  const double* params;
  int64_t n;
  int32_t ctas, slots, clusters;
  uint32_t seed;
};

int job_size() { return sizeof(Job); }

// CTAs and slots that a GPU with this much shared memory for a CTA would take; 0: none.
void spread(int64_t row_bytes, int64_t shared, int wanted, int32_t* out) {
  const one_read::Spread of = one_read::spread_of(row_bytes, shared, wanted);
  out[0] = of.ctas;
  out[1] = of.slots;
  out[2] = static_cast<int32_t>(one_read::shared_bytes(of.ctas, of.slots));
}

// 0, or 1 with the reason in `message` [200].
int emulate(const Job* job, char* message) {
  try {
    const ObjectiveParams p = ObjectiveParams::from(job->params);
    const LogitsPolicy& b = job->batch;
    for (int k = 0; k < job->clusters; ++k) {
      Cluster cluster(job->ctas, job->slots, job->seed + k);
      cluster.body = [&](Fiber& f) {
        try {
          Team team(f);
          const bool capped = b.rows.softcap > 0;
          const auto go = [&](auto element) {
            using T = decltype(element);
            capped ? one_read::policy_rows<T, true>(team, b, p, static_cast<int>(job->n), k, job->clusters)
                   : one_read::policy_rows<T, false>(team, b, p, static_cast<int>(job->n), k, job->clusters);
          };
          b.rows.dtype == DType::kF32    ? go(float())
          : b.rows.dtype == DType::kBF16 ? go(Bf16())
                                         : go(Half());
        } catch (const std::exception& e) {
          f.cluster->failure = e.what();
        }
      };
      cluster.run();
    }
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), 199);
    return 1;
  }
}

}  // extern "C"
