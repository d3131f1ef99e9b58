// The folds of closed_forms.py and their derivatives, compiled for a CPU.
//
// On a CPU a fold waits for memory more than it computes. Between the matrix products,
// all that is done to a row of the kernel is done here in one walk through memory.
//
// Names and shapes are those of closed_forms.py: O outputs, I inputs, K taps, T channels
// between two composed convs, M maps of each input in the depthwise branch. Input
// channels are the lanes of the vectors, since what is done to a tap is done to every
// input channel alike.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

constexpr int M = 8;  // OREPAKernel.EXPANSION
// The elements of a block of rows, which the caches are to hold between two steps.
constexpr int64_t BLOCK = 1 << 20;
// Rows whose sums with a depthwise filter are done together, to load it only once.
constexpr int GROUP = 4;

// ---- vectors -------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

template <typename S>
constexpr int LANES = BYTES / sizeof(S);

template <typename S>
struct VectorOf {
  typedef S type __attribute__((vector_size(BYTES)));
};
template <typename S>
using Vector = typename VectorOf<S>::type;

// Numbers of lanes, as `n` below: all of them, known to the compiler, or fewer.
template <typename S>
using All = std::integral_constant<int, LANES<S>>;
using Some = int;

template <typename S, typename N>
INLINE Vector<S> load(const S* from, N n) {
  Vector<S> v{};
  std::memcpy(&v, from, n * sizeof(S));
  return v;
}

template <typename S, typename N>
INLINE void store(S* to, Vector<S> v, N n) {
  std::memcpy(to, &v, n * sizeof(S));
}

// As store(), past the caches where that is possible: for results that are not needed
// soon and would have to be fetched first, only to be overwritten.
template <typename S, typename N>
INLINE void stream(S* to, Vector<S> v, N n) {
#if defined(__AVX512F__)
  if (n == LANES<S> && reinterpret_cast<uintptr_t>(to) % BYTES == 0)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX__)
  if (n == LANES<S> && reinterpret_cast<uintptr_t>(to) % BYTES == 0)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#endif
  store(to, v, n);
}

// Makes what a thread streamed visible to the others, before it says that it is done.
INLINE void finish_streams() {
#ifdef __AVX__
  _mm_sfence();
#endif
}

template <typename S>
INLINE S sum(Vector<S> v) {
  S total = 0;
  for (int j = 0; j < LANES<S>; ++j) total += v[j];
  return total;
}

// What is in memory as (n, K), as K vectors in that order.
template <int K, typename S, typename N>
INLINE void load_flat(const S* from, Vector<S>* flat, N n) {
  if constexpr (std::is_same_v<N, Some>) std::memset(flat, 0, K * BYTES);
  std::memcpy(flat, from, n * K * sizeof(S));
}

template <int K, typename S, typename N>
INLINE void stream_flat(S* to, const Vector<S>* flat, N n) {
  if constexpr (std::is_same_v<N, Some>)
    std::memcpy(to, flat, n * K * sizeof(S));
  else
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) stream(to + k * LANES<S>, flat[k], n);
}

// The lane `from(j)` of a, or `from(j) - LANES` of b, in lane j.
template <typename S, typename From>
INLINE Vector<S> pick(Vector<S> a, Vector<S> b, From from) {
  using Index = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  typename VectorOf<Index>::type indices;
#pragma GCC unroll 16
  for (int j = 0; j < LANES<S>; ++j) indices[j] = from(j);
  return __builtin_shuffle(a, b, indices);
}

// K vectors of the lanes of K others: in lane j of vector v what is at place(v, j) there,
// places being counted through all of them.
template <int K, typename S, typename Place>
INLINE void rearrange(const Vector<S>* from, Vector<S>* to, Place place) {
  constexpr int L = LANES<S>;
#pragma GCC unroll 16
  for (int v = 0; v < K; ++v) {
    to[v] = from[0];
#pragma GCC unroll 16
    for (int source = 0; source < K; ++source)
      to[v] = pick<S>(to[v], from[source], [=](int j) {
        const int at = place(v, j);
        return at / L == source ? L + at % L : j;
      });
  }
}

// From vectors in the order of memory, (n, K), to one vector of all n for each k.
template <int K, typename S>
INLINE void transpose(const Vector<S>* flat, Vector<S>* taps) {
  rearrange<K, S>(flat, taps, [](int k, int j) { return j * K + k; });
}

template <int K, typename S>
INLINE void transpose_back(const Vector<S>* taps, Vector<S>* flat) {
  constexpr int L = LANES<S>;
  rearrange<K, S>(taps, flat, [](int v, int j) {
    const int number = v * L + j;
    return number % K * L + number / K;
  });
}

// Calls f(i, n) for every n input channels from i on.
template <typename S, typename F>
INLINE void for_inputs(int64_t I, F f) {
  int64_t i = 0;
  for (; i + LANES<S> <= I; i += LANES<S>) f(i, All<S>{});
  if (i < I) f(i, static_cast<Some>(I - i));
}

// ---- the branches --------------------------------------------------------------------

template <typename S>
S* data(const Tensor& tensor) {
  return tensor.data_ptr<S>();
}

// The most branches whose kernels are one weight for each input times a filter.
constexpr int FILTERS = 3;

// All parameters, or all gradients, but for those of the composed convs.
template <typename S>
struct Branches {
  int filters;  // how many
  S* origin;
  S* weight[FILTERS];
  S *separable, *depthwise;
  // Of each branch, one for each output.
  S *scale_origin, *scale_composed, *scale_separable;
  S* scale_of[FILTERS];
};

int64_t groups_of(int64_t rows) { return (rows + GROUP - 1) / GROUP; }

// Calls f(o, R), for R rows from o on, for the groups from begin to end of the rows from
// start to stop. A row is in the same group however these are shared among threads.
template <typename F>
INLINE void for_groups(int64_t start, int64_t stop, int64_t begin, int64_t end, F f) {
  int64_t o = start + begin * GROUP;
  const int64_t last = std::min(start + end * GROUP, stop);
  for (; o + GROUP <= last; o += GROUP) f(o, std::integral_constant<int, GROUP>{});
  for (; o < last; ++o) f(o, std::integral_constant<int, 1>{});
}

// ---- the fold ------------------------------------------------------------------------

// sums[r, k, i] = scale_composed[r] sums[r, k, i]
//                 + scale[r] * (the sum over m of separable[r, i, m] depthwise[m, k, i])
template <typename S, int K, int R>
void add_separable(int64_t I, S* sums, const S* scale_composed, const S* separable,
                   const S* depthwise, const S* scale) {
  for_inputs<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> weight[R][M], flat[M];
    for (int r = 0; r < R; ++r) {
      load_flat<M>(separable + (r * I + i) * M, flat, n);
      transpose<M, S>(flat, weight[r]);
      for (int m = 0; m < M; ++m) weight[r][m] *= scale[r];
    }
    for (int k = 0; k < K; ++k) {
      Vector<S> x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        x[r] = scale_composed[r] * load(sums + (r * K + k) * I + i, n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const auto filter = load(depthwise + (m * K + k) * I + i, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) x[r] += weight[r][m] * filter;
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store(sums + (r * K + k) * I + i, x[r], n);
    }
  });
}

// One row of the kernel, (I, K), from that of the product, (K, I).
template <typename S, int K>
void combine_row(int64_t I, int64_t o, S* kernel, const S* composed, S scale_composed,
                 const Branches<S>& t, const S* filters) {
  S filter[FILTERS][K];
  for (int q = 0; q < t.filters; ++q)
    for (int k = 0; k < K; ++k)
      filter[q][k] = t.scale_of[q][o] * filters[(o * t.filters + q) * K + k];
  const S scale_origin = t.scale_origin[o];
  for_inputs<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> taps[K], flat[K], origin[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k)
      taps[k] = scale_composed * load(composed + k * I + i, n);
#pragma GCC unroll 3
    for (int q = 0; q < FILTERS; ++q) {
      if (q == t.filters) break;
      const auto weight = load(t.weight[q] + o * I + i, n);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) taps[k] += filter[q][k] * weight;
    }
    transpose_back<K, S>(taps, flat);
    load_flat<K>(t.origin + (o * I + i) * K, origin, n);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) flat[k] += scale_origin * origin[k];
    stream_flat<K>(kernel + i * K, flat, n);
  });
}

// The rows of the kernel from start to stop, from those of the product.
template <typename S, int K>
void combine(int64_t I, int64_t start, int64_t stop, S* kernel, S* composed,
             const Branches<S>& t, const S* filters) {
  at::parallel_for(0, groups_of(stop - start), 1, [&](int64_t begin, int64_t end) {
    for_groups(start, stop, begin, end, [&](int64_t first, auto R) {
      if (t.separable)
        add_separable<S, K, R>(I, composed + (first - start) * K * I,
                               t.scale_composed + first, t.separable + first * I * M,
                               t.depthwise, t.scale_separable + first);
      for (int64_t o = first; o < first + R; ++o)
        combine_row<S, K>(I, o, kernel + o * I * K, composed + (o - start) * K * I,
                          t.separable ? S(1) : t.scale_composed[o], t, filters);
    });
    finish_streams();
  });
}

// ---- its derivative ------------------------------------------------------------------

// One row of the gradient, (I, K), in the order of the products, (K, I), and what is
// found of the branches' gradients on the way.
template <typename S, int K>
void split_row(int64_t I, int64_t o, const S* grad, S* by_tap, const Branches<S>& t,
               const Branches<S>& d, const S* filters) {
  Vector<S> origin_total{}, filter_total[FILTERS] = {};
  S filter[FILTERS][K], scale[FILTERS];
  for (int q = 0; q < t.filters; ++q) {
    scale[q] = t.scale_of[q][o];
    std::memcpy(filter[q], filters + (o * t.filters + q) * K, sizeof filter[q]);
  }
  const S scale_origin = t.scale_origin[o];
  for_inputs<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> flat[K], taps[K], origin[K];
    load_flat<K>(grad + i * K, flat, n);
    transpose<K, S>(flat, taps);
    load_flat<K>(t.origin + (o * I + i) * K, origin, n);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      store(by_tap + k * I + i, taps[k], n);
      origin_total += flat[k] * origin[k];
      flat[k] *= scale_origin;
    }
    stream_flat<K>(d.origin + (o * I + i) * K, flat, n);
#pragma GCC unroll 3
    for (int q = 0; q < FILTERS; ++q) {
      if (q == t.filters) break;
      Vector<S> x = filter[q][0] * taps[0];
#pragma GCC unroll 16
      for (int k = 1; k < K; ++k) x += filter[q][k] * taps[k];
      filter_total[q] += x * load(t.weight[q] + o * I + i, n);
      stream(d.weight[q] + o * I + i, scale[q] * x, n);
    }
  });
  d.scale_origin[o] = sum<S>(origin_total);
  for (int q = 0; q < t.filters; ++q) d.scale_of[q][o] = sum<S>(filter_total[q]);
}

// The gradients of the depthwise separable branch, those of `depthwise` added up.
template <typename S, int K, int R>
void separable_gradients(int64_t I, const S* by_tap, const S* separable, S* d_separable,
                         const S* depthwise, S* d_depthwise, const S* scale,
                         S* d_scale) {
  Vector<S> total[R] = {};
  for_inputs<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> weight[R][M], d_weight[R][M], taps[R][K], flat[M];
    for (int r = 0; r < R; ++r) {
      load_flat<M>(separable + (r * I + i) * M, flat, n);
      transpose<M, S>(flat, weight[r]);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) taps[r][k] = load(by_tap + (r * K + k) * I + i, n);
    }
    for (int m = 0; m < M; ++m) {
      Vector<S> scaled[R], x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        scaled[r] = scale[r] * weight[r][m];
        x[r] = Vector<S>{};
      }
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const int64_t place = (m * K + k) * I + i;
        const auto filter = load(depthwise + place, n);
        auto d_filter = load(d_depthwise + place, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          x[r] += filter * taps[r][k];
          d_filter += scaled[r] * taps[r][k];
        }
        store(d_depthwise + place, d_filter, n);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        total[r] += x[r] * weight[r][m];
        d_weight[r][m] = scale[r] * x[r];
      }
    }
    for (int r = 0; r < R; ++r) {
      transpose_back<M, S>(d_weight[r], flat);
      stream_flat<M>(d_separable + (r * I + i) * M, flat, n);
    }
  });
  for (int r = 0; r < R; ++r) d_scale[r] = sum<S>(total[r]);
}

// The rows of the gradient from start to stop in the order of the products, and the
// gradients of all branches but the composed one; that of `depthwise` is added up, for
// every task in sums of its own.
template <typename S, int K>
void split(int64_t I, int64_t start, int64_t stop, const S* grad, S* by_tap,
           const Branches<S>& t, const Branches<S>& d, const S* filters,
           int64_t tasks) {
  const int64_t groups = groups_of(stop - start);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = groups * task / tasks, to = groups * (task + 1) / tasks;
      for_groups(start, stop, from, to, [&](int64_t first, auto R) {
        for (int64_t o = first; o < first + R; ++o)
          split_row<S, K>(I, o, grad + o * I * K, by_tap + (o - start) * K * I, t, d,
                          filters);
        if (t.separable)
          separable_gradients<S, K, R>(
              I, by_tap + (first - start) * K * I, t.separable + first * I * M,
              d.separable + first * I * M, t.depthwise, d.depthwise + task * M * K * I,
              t.scale_separable + first, d.scale_separable + first);
      });
    }
    finish_streams();
  });
}

// The scale of the composed branch, in what was found without it: in `by_tap`, and in
// `product` on its way to the gradient of the second conv. All are rows of K numbers
// of channels, from `start` on but for `second` and `d_second`, which have all rows.
template <typename S, int K>
void rescale(int64_t I, int64_t T, int64_t start, int64_t stop, S* by_tap,
             const S* product, const S* second, S* d_second, const Branches<S>& t,
             const Branches<S>& d) {
  at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const S scale = t.scale_composed[o];
      const S *from = product + (o - start) * K * T, *weight = second + o * K * T;
      S *to = d_second + o * K * T, *taps = by_tap + (o - start) * K * I;
      Vector<S> total{};
      for_inputs<S>(K * T, [&](int64_t j, auto n) INLINE_LAMBDA {
        const auto x = load(from + j, n);
        total += x * load(weight + j, n);
        stream(to + j, scale * x, n);
      });
      d.scale_composed[o] = sum<S>(total);
      for_inputs<S>(K * I, [&](int64_t j, auto n) INLINE_LAMBDA {
        store(taps + j, scale * load(taps + j, n), n);
      });
    }
    finish_streams();
  });
}

// ---- the tensors ---------------------------------------------------------------------

// The parameters of a kernel come in this order: then the weights of all filters, and
// those of the separable and the depthwise conv, if there are such.
enum { SCALE, ORIGIN, FIRST, SECOND, WEIGHTS };

// What else there is to know of a fold.
struct Layout {
  // Of `scale`: those of origin, the composed convs, all filters, and separable.
  IntArrayRef rows;
  bool has_identity;
  const OptionalTensor& filters;

  int64_t weights() const { return filters.has_value() ? filters->size(1) : 0; }
  bool has_separable() const { return int64_t(rows.size()) > 2 + weights(); }
  int64_t size() const { return WEIGHTS + weights() + 2 * has_separable(); }
};

// Whether a tensor is what `data` and a loop over `size` numbers take.
bool is_usable(const Tensor& tensor, const Tensor& like, int64_t size) {
  // Some wrappers of modules take the memory of tensors away for a while.
  return tensor.dtype() == like.dtype() && tensor.device() == like.device() &&
         tensor.is_contiguous() && tensor.numel() == size &&
         tensor.const_data_ptr() != nullptr;
}

// Whether there is code for a kernel of such parameters.
bool fit(TensorList t, const Layout& layout) {
  const Tensor &origin = t[ORIGIN], &scale = t[SCALE];
  if (origin.dim() != 4 || origin.numel() == 0 || scale.dim() != 2) return false;
  const int64_t O = origin.size(0), I = origin.size(1), K = origin[0][0].numel();
  const int64_t T = t[FIRST].numel() / I;
  const int64_t branches = layout.rows.size(), weights = layout.weights();
  std::vector<int64_t> sizes{branches * O, O * I * K, T * I, O * K * T};
  sizes.resize(WEIGHTS + weights, O * I);
  if (layout.has_separable()) sizes.insert(sizes.end(), {O * I * M, I * M * K});
  for (size_t i = 0; i < sizes.size(); ++i)
    if (!is_usable(t[i], origin, sizes[i])) return false;
  if (weights > 0 && !is_usable(*layout.filters, origin, O * weights * K)) return false;
  const bool is_known = origin.dtype() == at::kFloat || origin.dtype() == at::kDouble;
  return is_known && (K == 1 || K == 9);
}

template <typename S>
Branches<S> branches_of(TensorList t, const Layout& layout, const Tensor& by_map) {
  const int filters = layout.weights();
  auto row = [&](int branch) {
    return data<S>(t[SCALE]) + layout.rows[branch] * t[SCALE].size(1);
  };
  Branches<S> found{};
  found.filters = filters;
  found.origin = data<S>(t[ORIGIN]);
  found.scale_origin = row(0);
  found.scale_composed = row(1);
  for (int q = 0; q < filters; ++q) {
    found.weight[q] = data<S>(t[WEIGHTS + q]);
    found.scale_of[q] = row(2 + q);
  }
  if (layout.has_separable()) {
    found.separable = data<S>(t[WEIGHTS + filters]);
    found.depthwise = data<S>(by_map);
    found.scale_separable = row(2 + filters);
  }
  return found;
}

// What is needed for the time of a call, kept for the next one: memory from the system
// is cleared, page by page, before use, which takes as long as half of a small fold.
enum Purpose { ROWS, PRODUCT, MATRIX, BY_MAP, D_BY_MAP, PURPOSES };

Tensor scratch(Purpose purpose, IntArrayRef shape, const Tensor& like) {
  static thread_local Tensor kept[PURPOSES];
  Tensor& tensor = kept[purpose];
  const int64_t size = c10::multiply_integers(shape);
  if (!tensor.defined() || tensor.numel() < size || tensor.dtype() != like.dtype())
    tensor = at::empty({size}, like.options());
  return tensor.narrow(0, 0, size).view(shape);
}

// The depthwise filters, (I, M, K), in the order of the sums, (M, K, I).
Tensor to_maps(TensorList t, const Layout& layout) {
  if (!layout.has_separable()) return {};
  const Tensor filters = t.back().view({t[ORIGIN].size(1), -1}).t();
  return scratch(BY_MAP, filters.sizes(), filters).copy_(filters);
}

Tensor with_identity(const Tensor& first, const Layout& layout) {
  const Tensor matrix = first.flatten(1);
  if (!layout.has_identity) return matrix;
  Tensor sum = scratch(MATRIX, matrix.sizes(), matrix).copy_(matrix);
  sum.diagonal().add_(1);
  return sum;
}

// Calls f(first row, row after the last) for the blocks of a kernel.
template <typename F>
void for_blocks(int64_t rows, int64_t size, F f) {
  const int64_t blocks = (rows * size + BLOCK - 1) / BLOCK;
  const int64_t step = (rows + blocks - 1) / blocks;
  for (int64_t start = 0; start < rows; start += step)
    f(start, std::min(start + step, rows));
}

// Calls f(S, K) with the number type and the taps of a kernel.
template <typename F>
void dispatch(const Tensor& kernel, F f) {
  using One = std::integral_constant<int, 1>;
  using Nine = std::integral_constant<int, 9>;
  const bool is_float = kernel.dtype() == at::kFloat, has_taps = kernel.size(2) > 1;
  if (is_float && has_taps) f(float(), Nine{});
  if (is_float && !has_taps) f(float(), One{});
  if (!is_float && has_taps) f(double(), Nine{});
  if (!is_float && !has_taps) f(double(), One{});
}

// ---- what Python calls ---------------------------------------------------------------

// The kernels of several sets of parameters, one after another, or none if there is no
// code for one of them.
std::vector<Tensor> fold(TensorList parameters, IntArrayRef rows, bool has_identity,
                         const OptionalTensor& filters) {
  // What follows is written into new tensors and scratch memory.
  at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout{rows, has_identity, filters};
  std::vector<Tensor> kernels;
  for (size_t i = 0; i < parameters.size(); i += layout.size()) {
    const TensorList t = parameters.slice(i, layout.size());
    if (!fit(t, layout)) return {};
    const Tensor kernel = at::empty(t[ORIGIN].sizes(), t[ORIGIN].options());
    dispatch(kernel, [&](auto zero, auto taps) {
      using S = decltype(zero);
      constexpr int K = taps;
      const int64_t O = kernel.size(0), I = kernel.size(1);
      const auto branches = branches_of<S>(t, layout, to_maps(t, layout));
      const Tensor matrix = with_identity(t[FIRST], layout);
      const Tensor left = t[SECOND].view({O * K, -1});
      for_blocks(O, I * K, [&](int64_t start, int64_t stop) {
        const int64_t count = (stop - start) * K;
        Tensor composed = scratch(ROWS, {count, I}, kernel);
        at::mm_out(composed, left.narrow(0, start * K, count), matrix);
        combine<S, K>(I, start, stop, data<S>(kernel), data<S>(composed), branches,
                      filters.has_value() ? data<S>(*filters) : nullptr);
      });
    });
    kernels.push_back(kernel);
  }
  return kernels;
}

// The gradients of the parameters, in their order, or none.
std::vector<Tensor> fold_gradients(TensorList grads, TensorList parameters,
                                   IntArrayRef rows, bool has_identity,
                                   const OptionalTensor& filters) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout{rows, has_identity, filters};
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < grads.size(); ++i) {
    const TensorList t = parameters.slice(i * layout.size(), layout.size());
    const Tensor grad = grads[i].contiguous();
    if (!fit(t, layout) || !is_usable(grad, t[ORIGIN], t[ORIGIN].numel())) return {};
    std::vector<Tensor> found;
    for (const Tensor& parameter : t) found.push_back(at::empty_like(parameter));
    dispatch(t[ORIGIN], [&](auto zero, auto taps) {
      using S = decltype(zero);
      constexpr int K = taps;
      const int64_t O = t[ORIGIN].size(0), I = t[ORIGIN].size(1);
      // A sum for every task: added up in the order in which threads finish, it would
      // be another one in every run.
      const int64_t tasks = at::get_num_threads();
      Tensor d_by_map;
      if (layout.has_separable())
        d_by_map = scratch(D_BY_MAP, {tasks, M * K, I}, grad).zero_();
      const auto branches = branches_of<S>(t, layout, to_maps(t, layout));
      const auto d = branches_of<S>(found, layout, d_by_map);
      const Tensor matrix = with_identity(t[FIRST], layout);
      const int64_t T = matrix.size(0);
      const Tensor left = t[SECOND].view({O * K, T});
      Tensor d_matrix = found[FIRST].view({T, I});
      for_blocks(O, I * K, [&](int64_t start, int64_t stop) {
        const int64_t count = (stop - start) * K;
        const Tensor by_tap = scratch(ROWS, {count, I}, grad);
        Tensor product = scratch(PRODUCT, {count, T}, grad);
        split<S, K>(I, start, stop, data<S>(grad), data<S>(by_tap), branches, d,
                    filters.has_value() ? data<S>(*filters) : nullptr, tasks);
        at::mm_out(product, by_tap, matrix.t());
        rescale<S, K>(I, T, start, stop, data<S>(by_tap), data<S>(product),
                      data<S>(t[SECOND]), data<S>(found[SECOND]), branches, d);
        at::addmm_out(d_matrix, d_matrix, left.narrow(0, start * K, count).t(), by_tap,
                      start > 0);
      });
      if (layout.has_separable()) found.back().view({I, -1}).copy_(d_by_map.sum(0).t());
    });
    gradients.insert(gradients.end(), found.begin(), found.end());
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY(mmorepa, library) {
  library.def(
      "fold(Tensor[] parameters, int[] rows, bool has_identity, Tensor? filters) "
      "-> Tensor[]");
  library.def(
      "fold_gradients(Tensor[] grads, Tensor[] parameters, int[] rows, "
      "bool has_identity, Tensor? filters) -> Tensor[]");
}

// For the CPU alone, so that tracers and other modes see whole folds.
TORCH_LIBRARY_IMPL(mmorepa, CPU, library) {
  library.impl("fold", fold);
  library.impl("fold_gradients", fold_gradients);
}

// No graph is built: the caller says what the derivative is.
TORCH_LIBRARY_IMPL(mmorepa, Autograd, library) {
  for (const char* name : {"fold", "fold_gradients"})
    library.impl(name, torch::CppFunction::makeFallthrough());
}
