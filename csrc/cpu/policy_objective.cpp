// objective.h over a batch on the CPU, threads over pieces of sequences.
#include "objective.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"

namespace pyrl::cpu {
namespace {

// Sums are taken piece by piece, in order: they do not depend on the threads.
constexpr int64_t kPiece = 4096;

// Tokens [begin, end), none beyond its sequence.
struct Piece {
  int64_t sequence, begin, end;
};

void check_bounds(const ObjectiveBatch& b) {
  PYRL_CHECK(b.bounds[0] == 0 && b.bounds[b.sequences] == b.tokens, "bounds must run from 0 to ",
             b.tokens);
  for (int64_t s = 0; s < b.sequences; ++s) {
    PYRL_CHECK(b.bounds[s] <= b.bounds[s + 1], "bounds[", s + 1, "]=", b.bounds[s + 1],
               " is less than the bound before it");
  }
}

// Without bounds the batch is one sequence that no token looks at.
std::vector<Piece> pieces_of(const ObjectiveBatch& b) {
  std::vector<Piece> pieces;
  const int64_t whole[] = {0, b.tokens};
  const int64_t* bounds = b.bounds ? b.bounds : whole;
  for (int64_t s = 0; s < (b.bounds ? b.sequences : 1); ++s) {
    for (int64_t begin = bounds[s]; begin < bounds[s + 1]; begin += kPiece) {
      pieces.push_back({s, begin, std::min(begin + kPiece, bounds[s + 1])});
    }
  }
  return pieces;
}

// visit(sum, token, sequence) over every piece, in parallel; the sum of each piece, from Sum().
template <class Sum, class Visit>
std::vector<Sum> sweep(const std::vector<Piece>& pieces, const Visit& visit) {
  std::vector<Sum> sums(pieces.size());
  const auto count = static_cast<int64_t>(pieces.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Sum sum{};  // of this thread alone: neighbours in `sums` share cache lines
      const Piece& piece = pieces[k];
      for (int64_t i = piece.begin; i < piece.end; ++i) visit(sum, i, piece.sequence);
      sums[k] = sum;
    }
  });
  return sums;
}

// What the tokens of each sequence take from it: the first two sweeps of objective.h.
std::vector<Sequence> sequences_of(const ObjectiveParams& p, const ObjectiveBatch& b,
                                   const std::vector<Piece>& pieces) {
  if (!b.bounds) return std::vector<Sequence>(1);
  const auto sums = sweep<SequenceSums>(
      pieces, [&](SequenceSums& sum, int64_t i, int64_t) { sum.add(p, b, i); });
  std::vector<SequenceSums> totals(static_cast<size_t>(b.sequences));
  for (size_t k = 0; k < pieces.size(); ++k) totals[pieces[k].sequence].merge(sums[k]);
  std::vector<Sequence> sequences;
  sequences.reserve(totals.size());
  for (const SequenceSums& total : totals) sequences.emplace_back(p, total);
  if (!p.shares_ratio()) return sequences;

  const auto through = sweep<double>(pieces, [&](double& sum, int64_t i, int64_t s) {
    sum += objective_through(p, b, i, sequences[s]);
  });
  for (size_t k = 0; k < pieces.size(); ++k) sequences[pieces[k].sequence].through += through[k];
  return sequences;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> objective_terms(
    const Tensor& logprob, const std::optional<Tensor>& entropy, const std::optional<Tensor>& old,
    const std::optional<Tensor>& ref, const std::optional<Tensor>& rollout,
    const Tensor& advantage, const Tensor& weight, const Tensor& keep,
    const std::optional<Tensor>& bounds, const Tensor& params) {
  const ObjectiveParams p = ObjectiveParams::from(objective_params(params));
  ObjectiveOutputs out;
  const ObjectiveBatch b = objective_batch(logprob, entropy, old, ref, rollout, advantage, weight,
                                           keep, bounds, p, out);
  if (b.bounds) check_bounds(b);
  const std::vector<Piece> pieces = pieces_of(b);
  const std::vector<Sequence> sequences = sequences_of(p, b, pieces);
  const auto partial = sweep<ObjectiveSums>(pieces, [&](ObjectiveSums& sum, int64_t i, int64_t s) {
    objective_at(p, b, i, sequences[s], sum);
  });
  ObjectiveSums sums;
  for (const ObjectiveSums& one : partial) sums.merge(one);
  *b.loss = static_cast<float>(total_loss(sums.value));
  std::copy(sums.value, sums.value + kMetrics, b.metrics);
  return {out.loss, out.c, out.h, out.metrics};
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("objective_terms", TORCH_BOX(&pyrl::cpu::objective_terms));
}
