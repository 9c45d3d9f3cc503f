// The only schema block: operators of namespace pyrl_native. cpu/ and cuda/ implement them; the
// fakes are in pyrl/_native.py; what they compute is documented in kernels.h.
#include <torch/csrc/stable/library.h>

#include "spec.h"

namespace {

// How many objectives, in the order of pyrl/ops/spec.py, objective.h has.
int64_t objectives() { return pyrl::kObjectives; }

}  // namespace

STABLE_TORCH_LIBRARY(pyrl_native, m) {
  m.def(
      "logits_stats(Tensor z, Tensor target, Tensor inv_temperature, float logit_scale, "
      "float softcap, Tensor? spans=None, Tensor? ids=None, Tensor? rows=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "logits_grad_(Tensor(a!) z, Tensor target, Tensor inv_temperature, float logit_scale, "
      "float softcap, Tensor lse, Tensor entropy, Tensor c, Tensor h, Tensor? g, "
      "Tensor? spans=None, Tensor? ids=None, Tensor? rows=None, Tensor? source=None) -> ()");
  m.def(
      "logits_policy_grad_(Tensor(a!) z, Tensor target, Tensor inv_temperature, float logit_scale, "
      "float softcap, Tensor? old, Tensor? ref, Tensor? rollout, Tensor advantage, Tensor weight, "
      "Tensor keep, Tensor params, Tensor? rows=None, Tensor? source=None, int ctas=0) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("logits_scale_(Tensor(a!) z, Tensor factor, Tensor? rows=None) -> ()");
  m.def(
      "objective_terms(Tensor logprob, Tensor? entropy, Tensor? old, Tensor? ref, "
      "Tensor? rollout, Tensor advantage, Tensor weight, Tensor keep, Tensor? bounds, "
      "Tensor params) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("objectives() -> int");
  m.def("head_supported(bool half) -> bool");
  m.def(
      "head_stats(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor inv_temperature, "
      "float logit_scale, float softcap, Tensor(a!)? dweight, int near, Tensor(b!)? far) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "head_grad_(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor inv_temperature, "
      "float logit_scale, float softcap, Tensor(a!)? dweight, int near, Tensor? far, Tensor lse, "
      "Tensor entropy, Tensor c, Tensor h, Tensor? g, Tensor(b!)? dhidden, Tensor(c!)? low, "
      "Tensor(d!)? dbias, bool first, bool last) -> ()");
  m.def(
      "group_advantage_terms(Tensor rewards, Tensor? order, Tensor offsets, int method, "
      "bool unbiased, float eps, int filters, bool drop, float offset, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "gae_terms(Tensor rewards, Tensor values, Tensor keep, Tensor bounds, Tensor bootstrap, "
      "float gamma, float lam) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CompositeExplicitAutograd, m) {
  m.impl("objectives", TORCH_BOX(&objectives));
}
