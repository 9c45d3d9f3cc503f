// Argument checks of the operators, shared by the CPU and the CUDA registrations. The public Python
// ops check what users pass; these keep a direct call of torch.ops.pyrl_native from reading astray.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels.h"
#include "spec.h"

// A plain message: STD_TORCH_CHECK would put this file's name before it.
#define PYRL_CHECK(condition, ...)                                                       \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", __VA_ARGS__)); \
    }                                                                                    \
  } while (0)

namespace pyrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct ScalarOf;
template <>
struct ScalarOf<float> {
  static constexpr ScalarType type = ScalarType::Float;
  static constexpr const char* name = "float32";
};
template <>
struct ScalarOf<double> {
  static constexpr ScalarType type = ScalarType::Double;
  static constexpr const char* name = "float64";
};
template <>
struct ScalarOf<int64_t> {
  static constexpr ScalarType type = ScalarType::Long;
  static constexpr const char* name = "int64";
};
template <>
struct ScalarOf<int32_t> {
  static constexpr ScalarType type = ScalarType::Int;
  static constexpr const char* name = "int32";
};
template <>
struct ScalarOf<bool> {
  static constexpr ScalarType type = ScalarType::Bool;
  static constexpr const char* name = "bool";
};

// The data of a contiguous vector of `size` elements of type T on the device of `like`.
template <class T>
T* vector(const Tensor& t, const char* name, int64_t size, const Tensor& like) {
  PYRL_CHECK(t.scalar_type() == ScalarOf<T>::type, name, " must be ", ScalarOf<T>::name);
  PYRL_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have shape [", size, "]");
  PYRL_CHECK(t.is_contiguous(), name, " must be contiguous");
  PYRL_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
             name, " is on another device than the first argument");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* vector(const std::optional<Tensor>& t, const char* name, int64_t size, const Tensor& like) {
  return t ? vector<T>(*t, name, size, like) : nullptr;
}

// Output of `sizes`, on the device of `like`.
inline Tensor output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// Which rows of z a kernel touches: all of a contiguous [n, V], or those that `rows` names of an
// [N, V] with any distance from row to row.
inline RowIndex row_index(const Tensor& z, const std::optional<Tensor>& rows) {
  if (!rows) {
    PYRL_CHECK(z.dim() == 2 && z.is_contiguous(), "z must be a contiguous [n, V] tensor");
    return {z.size(1), nullptr};
  }
  PYRL_CHECK(z.dim() == 2 && (z.size(1) <= 1 || z.stride(1) == 1),
             "z must be an [N, V] tensor with adjacent columns");
  return {z.stride(0), vector<int64_t>(*rows, "rows", rows->numel(), z)};
}

inline DType logits_dtype(const Tensor& z) {
  const ScalarType type = z.scalar_type();
  PYRL_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
             "z must be float32, bfloat16 or float16");
  return type == ScalarType::Float      ? DType::kF32
         : type == ScalarType::BFloat16 ? DType::kBF16
                                        : DType::kF16;
}

inline LogitsRows logits_rows(const Tensor& z, const Tensor& target, const Tensor& inv_temperature,
                              double logit_scale, double softcap,
                              const std::optional<Tensor>& rows) {
  const RowIndex at = row_index(z, rows);
  const int64_t n = rows ? rows->numel() : z.size(0), vocab = z.size(1);
  PYRL_CHECK(vocab > 0 || n == 0, "z has an empty vocabulary");
  const DType dtype = logits_dtype(z);
  return {z.data_ptr(),
          at,
          dtype,
          vocab,
          vector<int64_t>(target, "target", n, z),
          vector<float>(inv_temperature, "inv_temperature", n, z),
          static_cast<float>(logit_scale),
          static_cast<float>(softcap)};
}

// The gradient goes over the raw logits in z, or into z's rows in order when those are in `source`.
inline LogitsGrad logits_grad(const Tensor& z, const Tensor& lse, const Tensor& entropy,
                              const Tensor& c, const Tensor& h, const std::optional<Tensor>& g,
                              const std::optional<Tensor>& rows,
                              const std::optional<Tensor>& source) {
  const int64_t n = lse.numel();
  if (source) {
    PYRL_CHECK(source->scalar_type() == z.scalar_type(), "source must have the dtype of z");
    PYRL_CHECK(source->dim() == 2 && z.dim() == 2 && source->size(1) == z.size(1) &&
                   z.size(0) == n,
               "z must have shape [", n, ", V], V that of source");
  }
  return {z.data_ptr(),
          row_index(z, source ? std::optional<Tensor>() : rows),
          vector<float>(lse, "lse", n, z),
          vector<float>(entropy, "entropy", n, z),
          vector<float>(c, "c", n, z),
          vector<float>(h, "h", n, z),
          vector<float>(g, "g", n, z)};
}

struct ScaledRows {
  RowIndex at;
  DType dtype;
  const float* factor;
  int64_t n;
};

// Checked inputs of logits_scale_: factor is 0-d.
inline ScaledRows scaled_rows(const Tensor& z, const Tensor& factor,
                              const std::optional<Tensor>& rows) {
  PYRL_CHECK(factor.scalar_type() == ScalarType::Float && factor.numel() == 1,
             "factor must be one float32");
  PYRL_CHECK(factor.is_cuda() == z.is_cuda() && factor.get_device_index() == z.get_device_index(),
             "factor is on another device than the first argument");
  const RowIndex at = row_index(z, rows);
  return {at, logits_dtype(z), static_cast<const float*>(factor.data_ptr()),
          rows ? rows->numel() : z.size(0)};
}

struct PolicyOutputs {
  Tensor logprob, entropy, lse;
};

// Checked inputs and fresh outputs of logits_policy_grad_; z and source as in logits_grad.
inline LogitsPolicy logits_policy(const Tensor& z, const Tensor& target,
                                  const Tensor& inv_temperature, double logit_scale,
                                  double softcap, const std::optional<Tensor>& old,
                                  const std::optional<Tensor>& ref,
                                  const std::optional<Tensor>& rollout, const Tensor& advantage,
                                  const Tensor& weight, const Tensor& keep,
                                  const ObjectiveParams& params, const std::optional<Tensor>& rows,
                                  const std::optional<Tensor>& source, PolicyOutputs& out) {
  PYRL_CHECK(!params.couples_tokens(), "params couple the tokens of a sequence: their gradient "
             "cannot be formed row by row");
  LogitsPolicy b{};
  b.rows = logits_rows(source ? *source : z, target, inv_temperature, logit_scale, softcap, rows);
  const int64_t n = target.numel();
  out = {output(z, {n}, ScalarType::Float), output(z, {n}, ScalarType::Float),
         output(z, {n}, ScalarType::Float)};
  b.stats = {static_cast<float*>(out.logprob.data_ptr()), static_cast<float*>(out.entropy.data_ptr()),
             static_cast<float*>(out.lse.data_ptr())};
  const LogitsGrad to = logits_grad(z, out.lse, out.entropy, weight, weight, {}, rows, source);
  b.dz = to.dz;
  b.at = to.at;
  b.old = vector<float>(old, "old", n, z);
  b.ref = vector<float>(ref, "ref", n, z);
  b.rollout = vector<float>(rollout, "rollout", n, z);
  b.advantage = vector<float>(advantage, "advantage", n, z);
  b.weight = vector<float>(weight, "weight", n, z);
  b.keep = vector<bool>(keep, "keep", n, z);
  return b;
}

inline SupportRows support_rows(const std::optional<Tensor>& spans,
                                const std::optional<Tensor>& ids, int64_t n, const Tensor& z) {
  PYRL_CHECK(spans.has_value() == ids.has_value(), "spans and ids belong together");
  if (!spans) return {};
  PYRL_CHECK(spans->scalar_type() == ScalarType::Long && spans->is_contiguous() &&
                 spans->dim() == 2 && spans->size(0) == n && spans->size(1) == 2,
             "spans must be a contiguous int64 tensor of shape [", n, ", 2]");
  PYRL_CHECK(spans->is_cuda() == z.is_cuda() && spans->get_device_index() == z.get_device_index(),
             "spans is on another device than the first argument");
  const int64_t entries = ids->numel();
  const bool wide = ids->scalar_type() != ScalarType::Int;
  const void* values = wide ? static_cast<const void*>(vector<int64_t>(*ids, "ids", entries, z))
                            : vector<int32_t>(*ids, "ids", entries, z);
  return {static_cast<const int64_t*>(spans->data_ptr()), values, wide, entries};
}

struct ObjectiveOutputs {
  Tensor loss, c, h, metrics;
};

// Checked inputs and fresh outputs of objective_terms.
inline ObjectiveBatch objective_batch(const Tensor& logprob, const std::optional<Tensor>& entropy,
                                      const std::optional<Tensor>& old,
                                      const std::optional<Tensor>& ref,
                                      const std::optional<Tensor>& rollout,
                                      const Tensor& advantage, const Tensor& weight,
                                      const Tensor& keep, const std::optional<Tensor>& bounds,
                                      const ObjectiveParams& params, ObjectiveOutputs& out) {
  const Tensor& like = logprob;
  const int64_t tokens = logprob.numel();
  ObjectiveBatch b{};
  b.tokens = tokens;
  b.logprob = vector<float>(logprob, "logprob", tokens, like);
  b.entropy = vector<float>(entropy, "entropy", tokens, like);
  b.old = vector<float>(old, "old", tokens, like);
  b.ref = vector<float>(ref, "ref", tokens, like);
  b.rollout = vector<float>(rollout, "rollout", tokens, like);
  b.advantage = vector<float>(advantage, "advantage", tokens, like);
  b.weight = vector<float>(weight, "weight", tokens, like);
  b.keep = vector<bool>(keep, "keep", tokens, like);
  if (bounds) {
    PYRL_CHECK(bounds->numel() > 0, "bounds must have shape [B + 1], got [0]");
    b.sequences = bounds->numel() - 1;
    b.bounds = vector<int64_t>(bounds, "bounds", b.sequences + 1, like);
  }
  PYRL_CHECK(bounds || !params.couples_tokens(), "params couple the tokens of a sequence: bounds "
             "must be given");
  out = {output(like, {}, ScalarType::Float), output(like, {tokens}, ScalarType::Float),
         output(like, {tokens}, ScalarType::Float), output(like, {kMetrics}, ScalarType::Double)};
  b.c = static_cast<float*>(out.c.data_ptr());
  b.h = static_cast<float*>(out.h.data_ptr());
  b.loss = static_cast<float*>(out.loss.data_ptr());
  b.metrics = static_cast<double*>(out.metrics.data_ptr());
  return b;
}

// The float64 CPU vector of LossSpec.params(), whatever the device of the other arguments: reading
// it never waits for a GPU.
inline const double* objective_params(const Tensor& params) {
  PYRL_CHECK(params.is_cpu(), "params must be a CPU tensor");
  const double* p = vector<double>(params, "params", kParams, params);
  for (const NamedParam& one : kNamedParams) {
    const double number = p[one.at];
    PYRL_CHECK(number >= 0.0 && number < one.names && number == static_cast<int>(number),
               one.name, " number ", number, " is none of 0 ... ", one.names - 1);
  }
  return p;
}

struct AdvantageOutputs {
  Tensor advantages, keep, metrics;
};

inline GroupAdvantage advantage_batch(const Tensor& rewards, const std::optional<Tensor>& order,
                                      const Tensor& offsets, int64_t method, bool unbiased,
                                      double eps, int64_t filters, bool drop, double offset,
                                      double scale, AdvantageOutputs& out) {
  const int64_t n = rewards.numel(), groups = offsets.numel() - 1;
  PYRL_CHECK(method >= kGrpo && method <= kScaled, "method ", method, " is not one of 0..9");
  PYRL_CHECK(filters >= 0 && filters < 8, "filters ", filters, " is not a set of bits 1, 2, 4");
  PYRL_CHECK(groups >= 0, "offsets is empty");
  out = {output(rewards, {n}, ScalarType::Float), output(rewards, {n}, ScalarType::Bool),
         output(rewards, {kAdvantageMetrics}, ScalarType::Double)};
  GroupAdvantage b{};
  b.samples = n;
  b.groups = groups;
  b.rewards = vector<double>(rewards, "rewards", n, rewards);
  b.order = vector<int64_t>(order, "order", n, rewards);
  b.offsets = vector<int64_t>(offsets, "offsets", groups + 1, rewards);
  b.method = static_cast<int>(method);
  b.unbiased = unbiased;
  b.eps = eps;
  b.filters = static_cast<int>(filters);
  b.drop = drop;
  b.offset = offset;
  b.scale = scale;
  b.advantages = static_cast<float*>(out.advantages.data_ptr());
  b.keep = static_cast<bool*>(out.keep.data_ptr());
  b.metrics = static_cast<double*>(out.metrics.data_ptr());
  return b;
}

struct GaeOutputs {
  Tensor advantages, returns;
};

inline Gae gae_batch(const Tensor& rewards, const Tensor& values, const Tensor& keep,
                     const Tensor& bounds, const Tensor& bootstrap, double gamma, double lam,
                     GaeOutputs& out) {
  const int64_t tokens = rewards.numel(), sequences = bootstrap.numel();
  out = {output(rewards, {tokens}, ScalarType::Float),
         output(rewards, {tokens}, ScalarType::Float)};
  return {tokens,
          sequences,
          vector<float>(rewards, "rewards", tokens, rewards),
          vector<float>(values, "values", tokens, rewards),
          vector<bool>(keep, "keep", tokens, rewards),
          vector<int64_t>(bounds, "bounds", sequences + 1, rewards),
          vector<float>(bootstrap, "bootstrap", sequences, rewards),
          gamma,
          lam,
          static_cast<float*>(out.advantages.data_ptr()),
          static_cast<float*>(out.returns.data_ptr())};
}

}  // namespace pyrl
