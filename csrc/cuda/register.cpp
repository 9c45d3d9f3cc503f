// The CUDA implementations of schema.cpp's operators: checks, outputs, the current stream. No CUDA
// header is needed here, and the stream comes from the stable C shim.
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "check.h"

namespace pyrl::cuda {
namespace {

// The tensor's device made current, and that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_launch(int error, const char* op) {
  PYRL_CHECK(error == 0, "pyrl_native::", op, ": ", error_string(error));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> logits_stats_op(
    const Tensor& z, const Tensor& target, const Tensor& inv_temperature, double logit_scale,
    double softcap, const std::optional<Tensor>& spans, const std::optional<Tensor>& ids,
    const std::optional<Tensor>& row_ids) {
  const OnDevice device(z);
  const LogitsRows rows = logits_rows(z, target, inv_temperature, logit_scale, softcap, row_ids);
  const int64_t n = target.numel();
  const SupportRows support = support_rows(spans, ids, n, z);
  Tensor logprob = output(z, {n}, ScalarType::Float), entropy = output(z, {n}, ScalarType::Float),
         lse = output(z, {n}, ScalarType::Float);
  const LogitsStats stats{static_cast<float*>(logprob.data_ptr()),
                          static_cast<float*>(entropy.data_ptr()),
                          static_cast<float*>(lse.data_ptr())};
  check_launch(spans ? support_stats(rows, support, stats, n, device.stream())
                     : logits_stats(rows, stats, n, device.stream()),
               "logits_stats");
  return {logprob, entropy, lse};
}

void logits_grad_op(const Tensor& z, const Tensor& target, const Tensor& inv_temperature,
                    double logit_scale, double softcap, const Tensor& lse, const Tensor& entropy,
                    const Tensor& c, const Tensor& h, const std::optional<Tensor>& g,
                    const std::optional<Tensor>& spans, const std::optional<Tensor>& ids,
                    const std::optional<Tensor>& row_ids, const std::optional<Tensor>& source) {
  const OnDevice device(z);
  const LogitsRows rows = logits_rows(source ? *source : z, target, inv_temperature, logit_scale,
                                      softcap, row_ids);
  const LogitsGrad grad = pyrl::logits_grad(z, lse, entropy, c, h, g, row_ids, source);
  const int64_t n = target.numel();
  const SupportRows support = support_rows(spans, ids, n, z);
  if (!spans) {
    check_launch(logits_grad(rows, grad, n, device.stream()), "logits_grad_");
    return;
  }
  // Freed to the stream's allocator on return: later work on the stream comes after the kernel.
  const Tensor scratch = output(z, {support.entries}, ScalarType::Float);
  check_launch(support_grad(rows, support, grad, static_cast<float*>(scratch.data_ptr()), n,
                            device.stream()),
               "logits_grad_");
}

// One read where a thread-block cluster holds a row; else the kernels that read it twice.
// ctas: CTAs a row, 0: chosen, -1: two reads.
std::tuple<Tensor, Tensor, Tensor> logits_policy_op(
    const Tensor& z, const Tensor& target, const Tensor& inv_temperature, double logit_scale,
    double softcap, const std::optional<Tensor>& old, const std::optional<Tensor>& ref,
    const std::optional<Tensor>& rollout, const Tensor& advantage, const Tensor& weight,
    const Tensor& keep, const Tensor& params, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& source, int64_t ctas) {
  const OnDevice device(z);
  const double* numbers = objective_params(params);
  const ObjectiveParams p = ObjectiveParams::from(numbers);
  PolicyOutputs out;
  const LogitsPolicy b =
      pyrl::logits_policy(z, target, inv_temperature, logit_scale, softcap, old, ref, rollout,
                          advantage, weight, keep, p, row_ids, source, out);
  const int64_t n = target.numel();
  const int64_t most = source && source->size(0) > z.size(0) ? source->size(0) : z.size(0);
  const int wanted = static_cast<int>(ctas);
  const bool one_read = ctas >= 0 && logits_policy_ctas(b, most, wanted) > 0;
  PYRL_CHECK(one_read || ctas <= 0, "pyrl_native::logits_policy_grad_: ctas=", ctas,
             ": expected 1, 2, 4, 8 or 16 that hold a row, on a GPU with clusters");
  if (one_read) {
    check_launch(logits_policy(b, numbers, n, wanted, device.stream()), "logits_policy_grad_");
    return {out.logprob, out.entropy, out.lse};
  }
  check_launch(logits_stats(b.rows, b.stats, n, device.stream(), b.keep), "logits_policy_grad_");
  ObjectiveOutputs terms;
  const ObjectiveBatch batch = objective_batch(out.logprob, out.entropy, old, ref, rollout,
                                               advantage, weight, keep, {}, p, terms);
  const Tensor scratch = output(z, {policy_objective_scratch(batch)}, ScalarType::Double);
  check_launch(policy_objective(batch, numbers, static_cast<double*>(scratch.data_ptr()),
                                device.stream()),
               "logits_policy_grad_");
  const LogitsGrad grad{b.dz,    b.at,    b.stats.lse, b.stats.entropy,
                        batch.c, batch.h, nullptr};
  check_launch(logits_grad(b.rows, grad, n, device.stream()), "logits_policy_grad_");
  return {out.logprob, out.entropy, out.lse};
}

void logits_scale_op(const Tensor& z, const Tensor& factor, const std::optional<Tensor>& row_ids) {
  const OnDevice device(z);
  const ScaledRows rows = scaled_rows(z, factor, row_ids);
  check_launch(logits_scale(z.data_ptr(), rows.at, rows.dtype, z.size(1), rows.factor, rows.n,
                            device.stream()),
               "logits_scale_");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> objective_terms_op(
    const Tensor& logprob, const std::optional<Tensor>& entropy, const std::optional<Tensor>& old,
    const std::optional<Tensor>& ref, const std::optional<Tensor>& rollout,
    const Tensor& advantage, const Tensor& weight, const Tensor& keep,
    const std::optional<Tensor>& bounds, const Tensor& params) {
  const OnDevice device(logprob);
  const double* p = objective_params(params);
  ObjectiveOutputs out;
  const ObjectiveBatch b = objective_batch(logprob, entropy, old, ref, rollout, advantage, weight,
                                           keep, bounds, ObjectiveParams::from(p), out);
  // Freed to the stream's allocator on return: later work on the stream comes after the kernel.
  const Tensor scratch = output(logprob, {policy_objective_scratch(b)}, ScalarType::Double);
  check_launch(
      policy_objective(b, p, static_cast<double*>(scratch.data_ptr()), device.stream()),
      "objective_terms");
  return {out.loss, out.c, out.h, out.metrics};
}

std::tuple<Tensor, Tensor, Tensor> group_advantage_op(
    const Tensor& rewards, const std::optional<Tensor>& order, const Tensor& offsets,
    int64_t method, bool unbiased, double eps, int64_t filters, bool drop, double offset,
    double scale) {
  const OnDevice device(rewards);
  AdvantageOutputs out;
  const GroupAdvantage b = advantage_batch(rewards, order, offsets, method, unbiased, eps, filters,
                                           drop, offset, scale, out);
  const Tensor scratch = output(rewards, {group_advantage_scratch(b)}, ScalarType::Double);
  check_launch(group_advantage(b, static_cast<double*>(scratch.data_ptr()), device.stream()),
               "group_advantage_terms");
  return {out.advantages, out.keep, out.metrics};
}

std::tuple<Tensor, Tensor> gae_op(const Tensor& rewards, const Tensor& values, const Tensor& keep,
                                  const Tensor& bounds, const Tensor& bootstrap, double gamma,
                                  double lam) {
  const OnDevice device(rewards);
  GaeOutputs out;
  const Gae b = gae_batch(rewards, values, keep, bounds, bootstrap, gamma, lam, out);
  check_launch(gae(b, device.stream()), "gae_terms");
  return {out.advantages, out.returns};
}

}  // namespace pyrl::cuda

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CUDA, m) {
  m.impl("logits_stats", TORCH_BOX(&pyrl::cuda::logits_stats_op));
  m.impl("logits_grad_", TORCH_BOX(&pyrl::cuda::logits_grad_op));
  m.impl("logits_policy_grad_", TORCH_BOX(&pyrl::cuda::logits_policy_op));
  m.impl("logits_scale_", TORCH_BOX(&pyrl::cuda::logits_scale_op));
  m.impl("objective_terms", TORCH_BOX(&pyrl::cuda::objective_terms_op));
  m.impl("group_advantage_terms", TORCH_BOX(&pyrl::cuda::group_advantage_op));
  m.impl("gae_terms", TORCH_BOX(&pyrl::cuda::gae_op));
}
