#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "tree_decode_kernels.h"

namespace fuserl {

FUSERL_KERNELS(DecodeTable, tree_decode)

namespace {

constexpr const char* function = "tree_decode";

const DecodeKernel<double>& kernel_of(const double*, DType) { return kernels().f64; }
const DecodeKernel<float>& kernel_of(const float*, DType dtype) {
  return dtype == DType::bf16 ? kernels().bf16 : dtype == DType::f16 ? kernels().f16 : kernels().f32;
}

template <class T>
struct Decode {
  TreeScores scores;
  DecodeArrays<T> x;
  const DecodeItem* items;
  const std::int32_t *slots, *bounds;
  std::int64_t heads, kv_heads;
  DType dtype;
  T *out, *lse;
};

template <class T>
void attend_items(void* context, std::int64_t begin, std::int64_t end) {
  const Decode<T>& all = *static_cast<Decode<T>*>(context);
  std::vector<T> scratch;
  for (std::int64_t i = begin; i < end; ++i) {
    const DecodeItem& item = all.items[i / all.kv_heads];
    const auto room = static_cast<std::size_t>(decode_scratch(decode_rows(item, all.x.repeat), all.x.dim));
    if (scratch.size() < room) scratch.resize(room);
    kernel_of(scratch.data(), all.dtype)
        .attend(all.scores, all.x, item, all.heads, i % all.kv_heads, scratch.data());
  }
}

// One head of one query: its partial results, from the root down.
template <class T>
void merge_rows(void* context, std::int64_t begin, std::int64_t end) {
  const Decode<T>& all = *static_cast<Decode<T>*>(context);
  const std::int64_t dim = all.x.dim;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t query = i / all.heads, head = i % all.heads;
    T top = -std::numeric_limits<T>::infinity(), total = 0, *out = all.out + i * dim;
    for (std::int32_t p = all.bounds[query]; p < all.bounds[query + 1]; ++p)
      top = std::max(top, all.x.top[all.slots[p] * all.heads + head]);
    std::fill(out, out + dim, T(0));
    all.lse[i] = top;
    if (top == -std::numeric_limits<T>::infinity()) continue;
    for (std::int32_t p = all.bounds[query]; p < all.bounds[query + 1]; ++p) {
      const std::int64_t at = all.slots[p] * all.heads + head;
      const T factor = std::exp(all.x.top[at] - top), *sums = all.x.sums + at * dim;
      total += all.x.total[at] * factor;
      for (std::int64_t d = 0; d < dim; ++d) out[d] += sums[d] * factor;
    }
    for (std::int64_t d = 0; d < dim; ++d) out[d] /= total;
    all.lse[i] = top + std::log(total);
  }
}

template <class T>
void run(const cpu::DecodePlan& plan, const TensorView& q, const TensorView& k, const TensorView& v,
         const cpu::DecodeRule& rule, const TensorView& out, const TensorView& lse, int threads) {
  const std::int64_t heads = q.shape[1], dim = q.shape[2], partials = plan.member.size();
  const std::unique_ptr<T[]> room(new T[static_cast<std::size_t>(partials * heads * (dim + 2))]);
  T *sums = room.get(), *top = sums + partials * heads * dim, *total = top + partials * heads;
  Decode<T> all = {{rule.scale, rule.softcap},
                   {heads / k.shape[1], dim, plan.member.as<std::int32_t>(), plan.last.as<std::int32_t>(),
                    plan.page.size() ? plan.page.as<std::int32_t>() : nullptr, rule.window, q.as<T>(), k.data, v.data, k.stride[0], k.stride[1], v.stride[0], v.stride[1], sums, top, total},
                   plan.item.as<DecodeItem>(),
                   plan.slot.as<std::int32_t>(),
                   plan.bounds.as<std::int32_t>(),
                   heads,
                   k.shape[1],
                   k.dtype,
                   out.as<T>(),
                   lse.as<T>()};
  parallel_for(plan.item.shape[0] * all.kv_heads, 1, threads, attend_items<T>, &all);
  parallel_for(q.shape[0] * heads, 64, threads, merge_rows<T>, &all);
}

void check_storage(const char* argument, const TensorView& x, const TensorView& k, std::int64_t dim) {
  check_device(function, argument, x, Device::cpu);
  check_dtype(function, argument, x, k.dtype);
  if (x.ndim != 3 || x.shape[0] != k.shape[0] || x.shape[1] != k.shape[1] || x.shape[2] != dim || x.stride[2] != 1)
    refuse(function, std::string(argument) + " must be (rows, Hkv, D), each D numbers in one stretch", shape_text(x),
           "Call .contiguous() first.");
}

}  // namespace

namespace cpu {

void tree_decode(const DecodePlan& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                 const DecodeRule& rule, const TensorView& out, const TensorView& lse, int threads) {
  const bool wide = k.dtype == DType::f64;
  if (!wide && k.dtype != DType::f32 && k.dtype != DType::bf16 && k.dtype != DType::f16)
    refuse(function, "k must be of a floating dtype", name(k.dtype), "Convert it with .float().");
  if (q.ndim != 3 || q.shape[2] % 16 != 0 || q.shape[2] == 0)
    refuse(function, "q must have shape (Q, H, D) with 16 dividing D", shape_text(q), "Pad with zeros.");
  const DType dtype = wide ? DType::f64 : DType::f32;
  const std::int64_t queries = q.shape[0], heads = q.shape[1], dim = q.shape[2];
  check_dense(function, "q", q, dtype, Device::cpu, {queries, heads, dim});
  check_dense(function, "out", out, dtype, Device::cpu, {queries, heads, dim});
  check_dense(function, "lse", lse, dtype, Device::cpu, {queries, heads});
  for (const auto& [argument, view] : {std::pair{"k", &k}, {"v", &v}}) check_storage(argument, *view, k, dim);
  if (k.shape[1] == 0 || heads % k.shape[1] != 0)
    refuse(function, "the heads of k must divide those of q", shape_text(k), "Check which tensor was passed.");
  check_dense(function, "item", plan.item, DType::i32, Device::cpu, {plan.item.shape[0], 5});
  check_dense(function, "member", plan.member, DType::i32, Device::cpu, {plan.member.size()});
  check_dense(function, "slot", plan.slot, DType::i32, Device::cpu, {plan.member.size()});
  check_dense(function, "bounds", plan.bounds, DType::i32, Device::cpu, {queries + 1});
  check_dense(function, "last", plan.last, DType::i32, Device::cpu, {queries});
  check_dense(function, "page", plan.page, DType::i32, Device::cpu, {plan.page.size()});
  (wide ? run<double> : run<float>)(plan, q, k, v, rule, out, lse, threads);
}

}  // namespace cpu
}  // namespace fuserl
