// head_stats and head_grad_: checks, choice of the instruction set, threads. The arithmetic is in
// head.h, compiled once per instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "check.h"

namespace pyrl::cpu {
namespace {

std::optional<HeadKernels> choose(DType dtype) {
#ifdef PYRL_X86
  const std::string set = chosen_rows().name;
  if (dtype == DType::kF32 && set == "avx512") return avx512_head();
  if (dtype == DType::kF32 && set == "avx2") return avx2_head();
  // bf16 only where its products are the CPU's own: of bf16 widened to f32 the logits may be rounded
  // to other neighbours than plain torch's, and a case of the parity rule then failed.
  if (dtype == DType::kBF16 && set == "avx512" && __builtin_cpu_supports("avx512bf16")) {
    return avx512_bf16_head();
  }
#endif
  return std::nullopt;
}

bool is_matrix(const Tensor& t) { return t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1); }

// What a chunk's kernels read, with the vectors they read it from.
struct Chunk {
  HeadChunk head{};
  HeadKernels kernels{};
  std::vector<float> lanes;
  int64_t blocks = 0, parts = 0;

  // Lanes [rows, lanes()) of every vector are 0.
  float* vector(int which) { return lanes.data() + which * head.lanes(); }
  // run(part, begin, end): blocks of the vocabulary, the same ones whichever thread runs a part.
  template <class Run>
  void each_part(const Run& run) const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) run(p, blocks * p / parts, blocks * (p + 1) / parts);
    });
  }
};

// `near` rows of logits are in dweight, the rest in far; without both they are not kept.
Chunk make_chunk(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& target, const Tensor& inv_temperature, double logit_scale,
                 double softcap, const std::optional<Tensor>& dweight, int64_t near,
                 const std::optional<Tensor>& far, int vectors) {
  Chunk chunk;
  HeadChunk& h = chunk.head;
  const ScalarType type = x.scalar_type();
  PYRL_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
             "x must be float32 or bfloat16");
  h.dtype = type == ScalarType::Float ? DType::kF32 : DType::kBF16;
  PYRL_CHECK(is_matrix(x) && is_matrix(weight) && x.size(1) == weight.size(1),
             "x must be [n, D] and weight [V, D], both with adjacent columns");
  PYRL_CHECK(weight.scalar_type() == type, "weight must have the dtype of x");
  h.rows = x.size(0), h.dim = x.size(1), h.vocab = weight.size(0);
  PYRL_CHECK(h.vocab > 0 && h.dim > 0, "weight is empty");
  h.x = x.data_ptr(), h.weight = weight.data_ptr();
  h.x_stride = x.stride(0), h.weight_stride = weight.stride(0);
  if (bias) {
    PYRL_CHECK(bias->scalar_type() == type && bias->dim() == 1 && bias->size(0) == h.vocab &&
                   bias->is_contiguous(),
               "bias must be contiguous, of the dtype of x, of shape [", h.vocab, "]");
    h.bias = bias->data_ptr();
  }
  h.target = pyrl::vector<int64_t>(target, "target", h.rows, x);
  for (int64_t i = 0; i < h.rows; ++i) {
    PYRL_CHECK(h.target[i] >= 0 && h.target[i] < h.vocab, "target[", i, "]=", h.target[i],
               ": expected a token id in [0, ", h.vocab, ")");
  }
  const auto* inverse = pyrl::vector<float>(inv_temperature, "inv_temperature", h.rows, x);
  if (dweight) {
    PYRL_CHECK(dweight->scalar_type() == type && dweight->is_contiguous() && dweight->dim() == 2 &&
                   dweight->size(0) == h.vocab && dweight->size(1) == h.dim,
               "dweight must be contiguous, of the dtype and shape of weight");
  }
  const int64_t near_lanes = (near + 31) / 32 * 32;
  PYRL_CHECK(near >= 0 && near <= h.rows && near_lanes <= h.dim && (near == 0 || dweight) &&
                 (near == h.rows || near == near_lanes),
             "near=", near, ": expected all rows or a multiple of 32 that fits the rows of dweight");
  if (near > 0) h.near = dweight->data_ptr(), h.near_stride = h.dim, h.near_rows = near;
  if (far) {
    PYRL_CHECK(far->scalar_type() == type && is_matrix(*far) && far->size(0) == h.vocab &&
                   far->size(1) >= h.lanes() - near_lanes,
               "far must have the dtype of x, adjacent columns, and shape [", h.vocab,
               ", at least ", h.lanes() - near_lanes, "]");
    h.far = far->data_ptr(), h.far_stride = far->stride(0);
  }
  PYRL_CHECK(far || near == 0 || near == h.rows, "far holds the logits of the rows after near");

  const std::optional<HeadKernels> kernels = choose(h.dtype);
  PYRL_CHECK(kernels, "no kernels for heads in the instruction set ", chosen_rows().name);
  chunk.kernels = *kernels;
  chunk.blocks = (h.vocab + kHeadBlock - 1) / kHeadBlock;
  chunk.parts = std::min<int64_t>(chunk.blocks, torch::stable::get_num_threads());
  chunk.lanes.assign((3 + vectors) * h.lanes(), 0.0f);
  const float cap = static_cast<float>(softcap), scale = static_cast<float>(logit_scale);
  h.softcap = cap;
  h.factor = chunk.vector(0), h.outer = chunk.vector(1), h.slope = chunk.vector(2);
  for (int64_t i = 0; i < h.rows; ++i) {
    const float inv = inverse[i] == inverse[i] ? inverse[i] : __builtin_nanf("");
    chunk.vector(2)[i] = inv * scale;
    chunk.vector(1)[i] = cap * inv / kernels->unit;
    chunk.vector(0)[i] = cap > 0 ? scale / cap : inv * scale / kernels->unit;
  }
  return chunk;
}

float* data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// The sums of all parts, in their order, become row i's log-prob, entropy and logsumexp.
void finish(const std::vector<HeadSums>& parts, double unit, int64_t owner, int64_t i,
            const LogitsStats& out) {
  constexpr float kInf = __builtin_inff();
  float m = -kInf;
  for (const HeadSums& p : parts) m = std::max(m, p.m[i]);
  double s = 0, t = 0;
  for (const HeadSums& p : parts) {
    if (p.s[i] == 0) continue;  // no logit above -inf
    const double down = p.m[i] > -kInf ? static_cast<double>(p.m[i]) - m : 0;  // else all NaN
    const double factor = std::exp(unit * down);
    s += factor * p.s[i];
    t += factor * (p.t[i] + p.s[i] * down);
  }
  if (s == 0) {
    out.lse[i] = out.logprob[i] = -kInf;
    out.entropy[i] = 0;
    return;
  }
  const double log_s = std::log(s), top = m > -kInf ? m : 0;
  out.lse[i] = static_cast<float>(unit * top + log_s);
  out.logprob[i] = static_cast<float>(unit * (parts[owner].at_target[i] - top) - log_s);
  const double entropy = log_s - unit * (t / s);
  out.entropy[i] = static_cast<float>(entropy < 0 ? 0 : entropy);  // rounding of a certain row
}

void put(float value, float* out) { *out = value; }
void put(float value, uint16_t* out) {  // bf16, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// The parts in their order: the same bits whichever thread formed them.
template <class T>
void add_parts(const float* parts, int64_t count, int64_t stride, int64_t length, T* out) {
  for (int64_t d = 0; d < length; ++d) {
    float total = parts[d];
    for (int64_t p = 1; p < count; ++p) total += parts[p * stride + d];
    put(total, out + d);
  }
}

}  // namespace

// Whether head_stats and head_grad_ take bf16 (`half`) or f32 here.
bool head_supported(bool half) { return choose(half ? DType::kBF16 : DType::kF32).has_value(); }

std::tuple<Tensor, Tensor, Tensor> head_stats(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const Tensor& inv_temperature, double logit_scale, double softcap,
    const std::optional<Tensor>& dweight, int64_t near, const std::optional<Tensor>& far) {
  const Chunk chunk = make_chunk(x, weight, bias, target, inv_temperature, logit_scale, softcap,
                                 dweight, near, far, 0);
  const HeadChunk& h = chunk.head;
  const int64_t n = h.rows, lanes = h.lanes();
  Tensor logprob = output(x, {n}, ScalarType::Float), entropy = output(x, {n}, ScalarType::Float),
         lse = output(x, {n}, ScalarType::Float);
  if (n == 0) return {logprob, entropy, lse};
  const Tensor packed = output(x, {chunk.kernels.packed_size(h, true)}, ScalarType::Float);
  chunk.kernels.pack_x(h, true, data(packed));
  std::vector<float> singles(2 * chunk.parts * lanes, -__builtin_inff());
  std::vector<double> doubles(2 * chunk.parts * lanes, 0.0);
  std::vector<HeadSums> sums;
  for (int64_t p = 0; p < chunk.parts; ++p) {
    sums.push_back({singles.data() + 2 * p * lanes, singles.data() + (2 * p + 1) * lanes,
                    doubles.data() + 2 * p * lanes, doubles.data() + (2 * p + 1) * lanes});
  }
  chunk.each_part([&](int64_t p, int64_t begin, int64_t end) {
    chunk.kernels.sums(h, data(packed), sums[p], begin, end);
  });
  const LogitsStats stats{data(logprob), data(entropy), data(lse)};
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = h.target[i] / kHeadBlock;
      int64_t owner = 0;
      while (chunk.blocks * (owner + 1) / chunk.parts <= block) ++owner;
      finish(sums, chunk.kernels.unit, owner, i, stats);
    }
  });
  return {logprob, entropy, lse};
}

void head_grad_(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& target, const Tensor& inv_temperature, double logit_scale,
                double softcap, const std::optional<Tensor>& dweight, int64_t near,
                const std::optional<Tensor>& far, const Tensor& lse, const Tensor& entropy,
                const Tensor& c, const Tensor& h, const std::optional<Tensor>& g,
                const std::optional<Tensor>& dhidden, const std::optional<Tensor>& low,
                const std::optional<Tensor>& dbias, bool first, bool last) {
  PYRL_CHECK(far || near > 0, "near and far: one of them must hold the logits");
  Chunk chunk = make_chunk(x, weight, bias, target, inv_temperature, logit_scale, softcap, dweight,
                           near, far, 4);
  const HeadChunk& head = chunk.head;
  const int64_t n = head.rows, panel = chunk.kernels.panel;
  HeadGrad grad{};
  grad.in.lse = vector<float>(lse, "lse", n, x);
  grad.in.entropy = vector<float>(entropy, "entropy", n, x);
  grad.in.c = vector<float>(c, "c", n, x);
  grad.in.h = vector<float>(h, "h", n, x);
  grad.in.g = vector<float>(g, "g", n, x);
  PYRL_CHECK(near == 0 || first, "near=", near, ": dweight holds sums after the first chunk");
  if (dweight) grad.dweight = dweight->data_ptr();
  const bool split = dweight && head.dtype == DType::kBF16 && !(first && last);
  PYRL_CHECK(low.has_value() == split, "low: expected for bfloat16 dweight of several chunks only");
  if (low) {
    PYRL_CHECK(low->scalar_type() == ScalarType::Byte && is_matrix(*low) &&
                   low->size(0) == head.vocab && low->size(1) == head.dim,
               "low must be uint8, of the shape of weight, with adjacent columns");
    grad.low = static_cast<uint8_t*>(low->data_ptr());
    grad.low_stride = low->stride(0);
  }
  grad.dbias = vector<float>(dbias, "dbias", head.vocab, x);
  grad.first = first, grad.last = last;
  bool narrow = false;
  if (dhidden) {
    narrow = dhidden->scalar_type() == ScalarType::BFloat16;
    PYRL_CHECK(dhidden->is_contiguous() && dhidden->dim() == 2 && dhidden->size(0) == n &&
                   dhidden->size(1) == head.dim &&
                   (dhidden->scalar_type() == ScalarType::Float ||
                    dhidden->scalar_type() == x.scalar_type()),
               "dhidden must be contiguous, float32 or of the dtype of x, of its shape");
  }
  if (n == 0) return;  // the caller's dweight is what it was

  auto* live = reinterpret_cast<uint32_t*>(chunk.vector(6));
  for (int64_t i = 0; i < n; ++i) {
    // As in rows.h: dx = p (base - h log p); NaN of unknown payload are unsafe to round.
    const auto quiet = [](float v) { return v == v ? v : __builtin_nanf(""); };
    const float gi = grad.in.g ? grad.in.g[i] : 0.0f, ci = grad.in.c[i], hi = grad.in.h[i];
    chunk.vector(3)[i] = quiet(grad.in.lse[i] / chunk.kernels.unit);
    chunk.vector(4)[i] = quiet(gi - ci - (hi != 0 ? hi * grad.in.entropy[i] : 0.0f));
    chunk.vector(5)[i] = quiet(hi * chunk.kernels.unit);
    const bool zero = (ci == 0 && hi == 0 && gi == 0) || grad.in.lse[i] == -__builtin_inff();
    live[i] = zero ? 0 : ~uint32_t{0};
  }
  grad.shift = chunk.vector(3), grad.base = chunk.vector(4), grad.slant = chunk.vector(5);
  grad.live = live;

  std::optional<Tensor> packed, dx;
  if (dweight) {
    packed = output(x, {chunk.kernels.packed_size(head, false)}, ScalarType::Float);
    chunk.kernels.pack_x(head, false, data(*packed));
  }
  const int64_t panels = (head.dim + panel - 1) / panel, part_size = panels * n * panel;
  if (dhidden) dx = output(x, {chunk.parts * part_size}, ScalarType::Float);
  chunk.each_part([&](int64_t p, int64_t begin, int64_t end) {
    HeadGrad part = grad;
    part.dx = dx ? data(*dx) + p * part_size : nullptr;
    chunk.kernels.grads(head, part, packed ? data(*packed) : nullptr, begin, end);
  });
  if (!dhidden) return;
  const float* const sums = data(*dx);
  void* const out = dhidden->data_ptr();
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t d = 0; d < head.dim; d += panel) {
        const float* sum = sums + (d / panel * n + i) * panel;
        const int64_t at = i * head.dim + d, count = std::min(panel, head.dim - d);
        if (narrow) {
          add_parts(sum, chunk.parts, part_size, count, static_cast<uint16_t*>(out) + at);
        } else {
          add_parts(sum, chunk.parts, part_size, count, static_cast<float*>(out) + at);
        }
      }
    }
  });
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("head_stats", TORCH_BOX(&pyrl::cpu::head_stats));
  m.impl("head_grad_", TORCH_BOX(&pyrl::cpu::head_grad_));
}

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CompositeExplicitAutograd, m) {
  m.impl("head_supported", TORCH_BOX(&pyrl::cpu::head_supported));
}
