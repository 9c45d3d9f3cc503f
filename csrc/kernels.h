// Raw-pointer declarations of every kernel: no torch in sight, plain C++ can call them.
// Vectors are contiguous fp32 unless said otherwise; n rows, T tokens, V vocabulary.
#pragma once

#include <cstdint>

namespace pyrl {

enum class DType { kF32, kBF16, kF16 };

// n rows of a matrix whose columns are adjacent: row i begins at element row(i) * stride, where
// row(i) is index[i], or i itself without an index. 64-bit: a product may pass 2^31.
struct RowIndex {
  int64_t stride;
  const int64_t* index;  // [n] or null
};

// x = softcap(z * logit_scale) * inv_temperature[row], computed in fp32; softcap 0: none.
struct LogitsRows {
  const void* z;
  RowIndex at;
  DType dtype;
  int64_t vocab;                 // V
  const int64_t* target;         // [n]; callers on the CPU have checked 0 <= target < V
  const float* inv_temperature;  // [n]
  float logit_scale;
  float softcap;
};

// lse = logsumexp(x), logprob = x[target] - lse, entropy = -sum p log p; each [n].
struct LogitsStats {
  float *logprob, *entropy, *lse;
};

// dx_v = c (1[v=target] - p_v) - h p_v (log p_v + H) + g p_v, each coefficient [n]; g may be null.
// dz := dx times dx/dz, in the dtype of z, over z itself or elsewhere. A row whose coefficients are
// all 0 becomes exact zeros and is not read.
struct LogitsGrad {
  void* dz;
  RowIndex at;
  const float *lse, *entropy, *c, *h, *g;
};

// Where softmax runs over a few tokens only: those of row i are ids[spans[2 i] .. spans[2 i + 1]),
// without repetition, and dz is 0 elsewhere. Spans of different rows do not overlap; that of a row
// without coefficients is not read.
struct SupportRows {
  const int64_t* spans;  // [n, 2]; null: the whole vocabulary
  const void* ids;       // [entries] int64 or int32
  bool wide;             // int64
  int64_t entries;
};

// objective.h over a batch; entropy, old, ref, rollout may be null. keep is torch's bool.
struct ObjectiveBatch {
  int64_t tokens;     // T
  int64_t sequences;  // B; 0 without bounds
  const float *logprob, *entropy, *old, *ref, *rollout, *advantage, *weight;
  const bool* keep;
  const int64_t* bounds;  // [B + 1] from 0 to T, never falling; null: no token needs its sequence
  float *c, *h;
  float* loss;      // 0-d
  double* metrics;  // [kMetrics]
};

// logits -> loss gradient in one read and one write: of row i the stats, from them c and h of token
// i (objective.h; its logprob, entropy, c and h are not in memory), then dz as in LogitsGrad. For
// objectives that do not couple tokens. A row that is not kept is not read: zeros everywhere.
struct LogitsPolicy {
  LogitsRows rows;
  void* dz;
  RowIndex at;  // of dz
  LogitsStats stats;
  const float *old, *ref, *rollout, *advantage, *weight;  // as in ObjectiveBatch
  const bool* keep;
};

// Methods of group_advantage, in the order of pyrl.ops.group_advantage.
enum AdvantageMethod {
  kGrpo = 0,
  kMean = 1,
  kRloo = 2,
  kPositive = 3,
  kRaw = 4,
  kBatchStd = 5,
  kWhiten = 6,
  kWhitenBaseline = 7,
  kCorrect = 8,
  kScaled = 9,
};
enum AdvantageFilter { kDropAllCorrect = 1, kDropAllWrong = 2, kDropZeroStd = 4 };  // bits

constexpr int kAdvantageMetrics = 8;  // AdvantageSums of advantage.h

// Group g is the samples order[offsets[g]], ..., order[offsets[g + 1] - 1]; groups may be empty.
struct GroupAdvantage {
  int64_t samples, groups;  // n, G
  const double* rewards;
  const int64_t* order;    // [n], a permutation; null: the identity
  const int64_t* offsets;  // [G + 1], from 0 to n
  int method;
  bool unbiased;
  double eps;
  int filters;           // bits of AdvantageFilter
  bool drop;             // whether filtered samples leave the batch
  double offset, scale;  // methods read offset + scale * reward
  float* advantages;
  bool* keep;
  double* metrics;  // [kAdvantageMetrics]
};

// Generalised advantage estimation over packed sequences bounds[s] ... bounds[s + 1] - 1.
struct Gae {
  int64_t tokens, sequences;  // T, B
  const float *rewards, *values;
  const bool* keep;
  const int64_t* bounds;   // [B + 1], from 0 to T
  const float* bootstrap;  // [B]
  double gamma, lam;
  float *advantages, *returns;
};

// A chunk of rows of a linear head on the CPU, z = x weight^T + bias, whose logits are kept
// transposed: token v's are adjacent, those of rows 0 ... near_rows - 1 in row v of `near` (the
// memory of the weight's gradient until that is formed), the rest in row v of `far`.
struct HeadChunk {
  DType dtype;              // of x, weight, bias, z and dweight: kF32 or kBF16
  int64_t rows, dim, vocab;  // n, D, V
  const void *x, *weight, *bias;  // [n, D], [V, D], [V] or null
  int64_t x_stride, weight_stride;
  const int64_t* target;  // [n] in [0, V)
  float softcap;
  const float *factor, *outer, *slope;  // [lanes] of Transform in cpu/softmax.h
  void *near, *far;  // both null: the logits are not kept
  int64_t near_stride, near_rows, far_stride;

  // Rows padded to whole panels of every instruction set.
  int64_t lanes() const { return (rows + 31) / 32 * 32; }
};

// Sums over a part of the vocabulary for an m near max x: s = sum exp(x - m), t = sum exp(x - m)
// (x - m).
struct HeadSums {
  float *m, *at_target;  // [lanes]; at_target is written by the part that has the target
  double *s, *t;
};

// As LogitsGrad: dx = p (base - slant (log p)) per lane where live has all bits set, else 0.
struct HeadGrad {
  LogitsGrad in;
  const float *shift, *base, *slant;
  const uint32_t* live;
  float* dx;      // [panels of D][n][panel], fp32: a part's sum of dz weight; null: not wanted
  void* dweight;  // [V, D]; null: not wanted
  // bf16: the low 8 bits of the 24-bit sum whose high 16 are in dweight; null where this chunk is
  // the only one.
  uint8_t* low;
  int64_t low_stride;
  float* dbias;      // [V], added to; null: not wanted
  bool first, last;  // chunk of the sum over dweight
};

namespace cpu {

// A part of the vocabulary is blocks [begin, end) of kHeadBlock tokens.
constexpr int64_t kHeadBlock = 96;
// Softmax inputs x, and factor, outer, shift and slant with them, are in multiples of `unit`: 1, or
// log(2) where exp is a power of 2. The hidden states are packed by pack_x(chunk, as_columns,
// packed): as columns for sums, as rows for grads.
struct HeadKernels {
  int64_t panel;
  float unit;
  int64_t (*packed_size)(const HeadChunk&, bool as_columns);  // floats
  void (*pack_x)(const HeadChunk&, bool as_columns, float* packed);
  void (*sums)(const HeadChunk&, const float* x, const HeadSums&, int64_t begin, int64_t end);
  void (*grads)(const HeadChunk&, const HeadGrad&, const float* x, int64_t begin, int64_t end);
};
HeadKernels avx2_head();
HeadKernels avx512_head();
HeadKernels avx512_bf16_head();

// Rows [begin, end); one table per instruction set.
struct RowKernels {
  const char* name;
  void (*stats)(const LogitsRows&, const LogitsStats&, int64_t begin, int64_t end);
  void (*grad)(const LogitsRows&, const LogitsGrad&, int64_t begin, int64_t end);
};
RowKernels portable_rows();
RowKernels avx2_rows();
RowKernels avx512_rows();
const RowKernels& chosen_rows();  // of this machine

// The same for rows with a support, threads included.
void support_stats(const LogitsRows& rows, const SupportRows& support, const LogitsStats& out,
                   int64_t n);
void support_grad(const LogitsRows& rows, const SupportRows& support, const LogitsGrad& in,
                  int64_t n);

}  // namespace cpu

// Each is one launch on `stream` (a cudaStream_t) of the current device, unless said otherwise; the
// result is the cudaError_t of the launch.
namespace cuda {

// Scratch the caller allocates for policy_objective: doubles.
int64_t policy_objective_scratch(const ObjectiveBatch& batch);
int policy_objective(const ObjectiveBatch& batch, const double* params, double* scratch,
                     void* stream);
// Two launches, three where the method needs statistics of the batch; scratch as above.
int64_t group_advantage_scratch(const GroupAdvantage& batch);
int group_advantage(const GroupAdvantage& batch, double* scratch, void* stream);
int gae(const Gae& batch, void* stream);
// With `keep`, rows that are not kept are not read: their statistics are 0.
int logits_stats(const LogitsRows& rows, const LogitsStats& stats, int64_t n, void* stream,
                 const bool* keep = nullptr);
int logits_grad(const LogitsRows& rows, const LogitsGrad& grad, int64_t n, void* stream);
// z *= factor[0] over n rows of z [., vocab]; nothing is read or written where the factor is 1.
int logits_scale(void* z, const RowIndex& at, DType dtype, int64_t vocab, const float* factor,
                 int64_t n, void* stream);
// CTAs a row that logits_policy would use on the current device, `ctas` of them if that is not 0;
// 0 where there are no clusters, the row does not fit, or rows of the matrices pass 2^30.
int logits_policy_ctas(const LogitsPolicy& batch, int64_t matrix_rows, int ctas);
int logits_policy(const LogitsPolicy& batch, const double* params, int64_t n, int ctas,
                  void* stream);
int support_stats(const LogitsRows& rows, const SupportRows& support, const LogitsStats& stats,
                  int64_t n, void* stream);
// `scratch` has support.entries floats.
int support_grad(const LogitsRows& rows, const SupportRows& support, const LogitsGrad& grad,
                 float* scratch, int64_t n, void* stream);
const char* error_string(int error);

}  // namespace cuda
}  // namespace pyrl
