// The passes of passes.py, compiled for a CPU: one walk through memory instead of one
// for each operation.
//
// Names and shapes are those of passes.py: O outputs, I inputs, K taps, M maps of each
// input in the depthwise branch. Input channels are the lanes of the vectors, since
// all that is done to a tap is done to every input channel alike.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

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

constexpr int M = 8;
constexpr int MAX_FILTERS = 3;
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

// From vectors in the order of memory, (n, K), to one vector of all n for each k.
template <int K, typename S>
INLINE void transpose(const Vector<S>* flat, Vector<S>* taps) {
  constexpr int L = LANES<S>;
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    taps[k] = flat[0];
#pragma GCC unroll 16
    for (int s = 0; s < K; ++s)
      taps[k] = pick<S>(taps[k], flat[s], [=](int j) {
        const int place = j * K + k;
        return place / L == s ? L + place % L : j;
      });
  }
}

template <int K, typename S>
INLINE void transpose_back(const Vector<S>* taps, Vector<S>* flat) {
  constexpr int L = LANES<S>;
#pragma GCC unroll 16
  for (int s = 0; s < K; ++s) {
    flat[s] = taps[0];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k)
      flat[s] = pick<S>(flat[s], taps[k], [=](int j) {
        const int place = s * L + j;
        return place % K == k ? L + place / K : j;
      });
  }
}

// The same for M, a power of two, in fewer steps: each takes the even places to the
// front and the odd ones to the back, until the bits of m, which came last in the
// number of a place, come first.
template <typename S>
INLINE void transpose_maps(const Vector<S>* flat, Vector<S>* maps) {
  Vector<S> before[M];
  std::memcpy(maps, flat, sizeof before);
#pragma GCC unroll 3
  for (int step = 1; step < M; step *= 2) {
    std::memcpy(before, maps, sizeof before);
#pragma GCC unroll 4
    for (int s = 0; s < M / 2; ++s) {
      const auto a = before[2 * s], b = before[2 * s + 1];
      maps[s] = pick<S>(a, b, [](int j) { return 2 * j; });
      maps[s + M / 2] = pick<S>(a, b, [](int j) { return 2 * j + 1; });
    }
  }
}

template <typename S>
INLINE void transpose_maps_back(const Vector<S>* maps, Vector<S>* flat) {
  constexpr int L = LANES<S>;
  Vector<S> before[M];
  std::memcpy(flat, maps, sizeof before);
#pragma GCC unroll 3
  for (int step = 1; step < M; step *= 2) {
    std::memcpy(before, flat, sizeof before);
#pragma GCC unroll 4
    for (int s = 0; s < M / 2; ++s) {
      const auto a = before[s], b = before[s + M / 2];
      flat[2 * s] = pick<S>(a, b, [](int j) { return j / 2 + j % 2 * L; });
      flat[2 * s + 1] = pick<S>(a, b, [](int j) { return (L + j) / 2 + j % 2 * L; });
    }
  }
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
  TORCH_CHECK(tensor.is_contiguous(), "the compiled passes take contiguous tensors");
  return tensor.data_ptr<S>();
}

template <typename S>
S* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<S>(*tensor) : nullptr;
}

// The tensors of all branches, or their gradients.
template <typename S>
struct Branches {
  Branches(const Tensor& scale, IntArrayRef row_of, const Tensor& origin,
           const OptionalTensor& separable, const OptionalTensor& depthwise,
           TensorList weights)
      : outputs(scale.size(1)),
        scales(data<S>(scale)),
        row_of(row_of),
        origin(data<S>(origin)),
        separable(data<S>(separable)),
        depthwise(data<S>(depthwise)),
        filtered(weights.size()) {
    TORCH_CHECK(filtered <= MAX_FILTERS, "too many filtered branches");
    for (int q = 0; q < filtered; ++q) weight[q] = data<S>(weights[q]);
  }

  // Of the branches as `row_of` names them.
  S* scale(int branch, int64_t o) const { return scales + row_of[branch] * outputs + o; }

  int64_t outputs;
  S* scales;
  IntArrayRef row_of;
  S *origin, *separable, *depthwise;
  int filtered;
  S* weight[MAX_FILTERS];
};

enum { COMPOSED, ORIGIN, SEPARABLE, FILTERED };  // the order of row_of

// Calls f(o, R) for the rows from first to last, GROUP of them at a time if there are.
template <typename F>
INLINE void for_groups(int64_t first, int64_t last, F f) {
  int64_t o = first;
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
      transpose_maps<S>(flat, weight[r]);
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
  S coefficient[MAX_FILTERS][K];
  for (int q = 0; q < t.filtered; ++q)
    for (int k = 0; k < K; ++k)
      coefficient[q][k] =
          *t.scale(FILTERED + q, o) * filters[(o * t.filtered + q) * K + k];
  const S scale_origin = *t.scale(ORIGIN, o);
  for_inputs<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> taps[K], flat[K], origin[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) taps[k] = scale_composed * load(composed + k * I + i, n);
    for (int q = 0; q < t.filtered; ++q) {
      const auto weight = load(t.weight[q] + o * I + i, n);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) taps[k] += coefficient[q][k] * weight;
    }
    transpose_back<K, S>(taps, flat);
    load_flat<K>(t.origin + (o * I + i) * K, origin, n);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) flat[k] += scale_origin * origin[k];
    stream_flat<K>(kernel + i * K, flat, n);
  });
}

template <typename S, int K>
void combine(const Tensor& kernel, int64_t start, int64_t stop, const Tensor& composed,
             const OptionalTensor& filters, const Branches<S>& t) {
  const int64_t I = kernel.size(1);
  S *out = data<S>(kernel), *products = data<S>(composed);
  const S* filter = data<S>(filters);
  const int64_t groups = (stop - start + GROUP - 1) / GROUP;
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = start + group * GROUP;
      const int64_t last = std::min(first + GROUP, stop);
      if (t.separable)
        for_groups(first, last, [&](int64_t o, auto R) {
          add_separable<S, K, R>(I, products + (o - start) * K * I, t.scale(COMPOSED, o),
                                 t.separable + o * I * M, t.depthwise,
                                 t.scale(SEPARABLE, o));
        });
      for (int64_t o = first; o < last; ++o)
        combine_row<S, K>(I, o, out + o * I * K, products + (o - start) * K * I,
                          t.separable ? S(1) : *t.scale(COMPOSED, o), t, filter);
    }
    finish_streams();
  });
}

// ---- its derivative ------------------------------------------------------------------

// One row of the gradient, (I, K), in the order of the products, (K, I), and what is
// found of the branches' gradients on the way.
template <typename S, int K>
void split_row(int64_t I, int64_t o, const S* grad, S* by_tap, const S* filters,
               const Branches<S>& t, const Branches<S>& d) {
  Vector<S> origin_total{}, filtered_total[MAX_FILTERS] = {};
  const S scale_origin = *t.scale(ORIGIN, o);
  S scale[MAX_FILTERS];
  for (int q = 0; q < t.filtered; ++q) scale[q] = *t.scale(FILTERED + q, o);
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
    for (int q = 0; q < t.filtered; ++q) {
      const S* filter = filters + (o * t.filtered + q) * K;
      Vector<S> x = filter[0] * taps[0];
#pragma GCC unroll 16
      for (int k = 1; k < K; ++k) x += filter[k] * taps[k];
      filtered_total[q] += x * load(t.weight[q] + o * I + i, n);
      stream(d.weight[q] + o * I + i, scale[q] * x, n);
    }
  });
  *d.scale(ORIGIN, o) = sum<S>(origin_total);
  for (int q = 0; q < t.filtered; ++q)
    *d.scale(FILTERED + q, o) = sum<S>(filtered_total[q]);
}

// The gradients of the depthwise separable branch, those of `depthwise` added up.
template <typename S, int K, int R>
void separable_gradients(int64_t I, const S* by_tap, const S* separable,
                         S* d_separable, const S* depthwise, S* d_depthwise,
                         const S* scale, S* d_scale) {
  Vector<S> total[R] = {};
  for_inputs<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> weight[R][M], d_weight[R][M], taps[R][K], flat[M];
    for (int r = 0; r < R; ++r) {
      load_flat<M>(separable + (r * I + i) * M, flat, n);
      transpose_maps<S>(flat, weight[r]);
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
      transpose_maps_back<S>(d_weight[r], flat);
      stream_flat<M>(d_separable + (r * I + i) * M, flat, n);
    }
  });
  for (int r = 0; r < R; ++r) d_scale[r] = sum<S>(total[r]);
}

template <typename S, int K>
void split(const Tensor& grad, int64_t start, int64_t stop, const Tensor& by_tap,
           const OptionalTensor& filters, const Branches<S>& t, const Branches<S>& d) {
  const int64_t I = grad.size(1), filter_size = M * K * I;
  const S *g = data<S>(grad), *filter = data<S>(filters);
  S* taps = data<S>(by_tap);
  const int64_t groups = (stop - start + GROUP - 1) / GROUP;
  // Every task adds up gradients of its own: sums that came in the order in which
  // threads finish would be other ones in every run.
  const int64_t tasks = std::min<int64_t>(at::get_num_threads(), groups);
  Tensor partial;
  if (t.separable) partial = at::zeros({tasks, filter_size}, grad.options());
  S* partials = t.separable ? data<S>(partial) : nullptr;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t last_group = groups * (task + 1) / tasks;
      for (int64_t group = groups * task / tasks; group < last_group; ++group) {
        const int64_t first = start + group * GROUP;
        const int64_t last = std::min(first + GROUP, stop);
        for (int64_t o = first; o < last; ++o)
          split_row<S, K>(I, o, g + o * I * K, taps + (o - start) * K * I, filter, t, d);
        if (t.separable)
          for_groups(first, last, [&](int64_t o, auto R) {
            separable_gradients<S, K, R>(
                I, taps + (o - start) * K * I, t.separable + o * I * M,
                d.separable + o * I * M, t.depthwise, partials + task * filter_size,
                t.scale(SEPARABLE, o), d.scale(SEPARABLE, o));
          });
      }
    }
    finish_streams();
  });
  for (int64_t task = 0; t.separable && task < tasks; ++task)
    for_inputs<S>(filter_size, [&](int64_t j, auto n) INLINE_LAMBDA {
      const auto more = load(partials + task * filter_size + j, n);
      store(d.depthwise + j, load(d.depthwise + j, n) + more, n);
    });
}

template <typename S>
void rescale(int64_t start, int64_t stop, const Tensor& by_tap, const Tensor& product,
             const Tensor& second, const Tensor& d_second, const S* scale, S* d_scale) {
  const int64_t size = second[0].numel(), taps_size = by_tap[0].numel();
  const S *w = data<S>(second), *products = data<S>(product);
  S *d = data<S>(d_second), *taps = data<S>(by_tap);
  at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      Vector<S> total{};
      const S* from = products + (o - start) * size;
      for_inputs<S>(size, [&](int64_t j, auto n) INLINE_LAMBDA {
        const auto x = load(from + j, n);
        total += x * load(w + o * size + j, n);
        stream(d + o * size + j, scale[o] * x, n);
      });
      d_scale[o] = sum<S>(total);
      S* row = taps + (o - start) * taps_size;
      for_inputs<S>(taps_size, [&](int64_t j, auto n) INLINE_LAMBDA {
        store(row + j, scale[o] * load(row + j, n), n);
      });
    }
    finish_streams();
  });
}

// ---- what Python calls ---------------------------------------------------------------

// Calls f(S, K) with the number type and the taps of a kernel, (O, I, K).
template <typename F>
void dispatch(const Tensor& kernel, F f) {
  using One = std::integral_constant<int, 1>;
  using Nine = std::integral_constant<int, 9>;
  const bool is_float = kernel.scalar_type() == at::kFloat;
  const bool is_double = kernel.scalar_type() == at::kDouble;
  const int64_t taps = kernel.size(2);
  TORCH_CHECK((is_float || is_double) && (taps == 1 || taps == 9),
              "there are compiled passes for float32, float64 and 1 or 9 taps");
  if (is_float && taps == 9) f(float(), Nine{});
  if (is_float && taps == 1) f(float(), One{});
  if (is_double && taps == 9) f(double(), Nine{});
  if (is_double && taps == 1) f(double(), One{});
}

void combine_rows(const Tensor& kernel, int64_t start, int64_t stop,
                  const Tensor& composed, const Tensor& scale, IntArrayRef row_of,
                  const Tensor& origin, const OptionalTensor& separable,
                  const OptionalTensor& depthwise, TensorList weights,
                  const OptionalTensor& filters) {
  dispatch(kernel, [&](auto zero, auto K) {
    using S = decltype(zero);
    const Branches<S> t(scale, row_of, origin, separable, depthwise, weights);
    combine<S, K>(kernel, start, stop, composed, filters, t);
  });
  kernel.unsafeGetTensorImpl()->bump_version();
}

void split_rows(const Tensor& grad, int64_t start, int64_t stop, const Tensor& by_tap,
                const Tensor& scale, const Tensor& d_scale, IntArrayRef row_of,
                const Tensor& origin, const Tensor& d_origin,
                const OptionalTensor& separable, const OptionalTensor& d_separable,
                const OptionalTensor& depthwise, const OptionalTensor& d_depthwise,
                TensorList weights, TensorList d_weights,
                const OptionalTensor& filters) {
  dispatch(grad, [&](auto zero, auto K) {
    using S = decltype(zero);
    const Branches<S> t(scale, row_of, origin, separable, depthwise, weights);
    const Branches<S> d(d_scale, row_of, d_origin, d_separable, d_depthwise, d_weights);
    split<S, K>(grad, start, stop, by_tap, filters, t, d);
  });
}

void rescale_rows(int64_t start, int64_t stop, const Tensor& by_tap,
                  const Tensor& product, const Tensor& second, const Tensor& d_second,
                  const Tensor& scale, const Tensor& d_scale) {
  if (second.scalar_type() == at::kDouble)
    rescale<double>(start, stop, by_tap, product, second, d_second,
                    data<double>(scale), data<double>(d_scale));
  else
    rescale<float>(start, stop, by_tap, product, second, d_second, data<float>(scale),
                   data<float>(d_scale));
}

}  // namespace

TORCH_LIBRARY(mmorepa, library) {
  library.def(
      "combine(Tensor(a!) kernel, int start, int stop, Tensor(b!) composed, "
      "Tensor scale, int[] row_of, Tensor origin, Tensor? separable, "
      "Tensor? depthwise, Tensor[] weights, Tensor? filters) -> ()",
      combine_rows);
  library.def(
      "split(Tensor grad, int start, int stop, Tensor(a!) by_tap, Tensor scale, "
      "Tensor(b!) d_scale, int[] row_of, Tensor origin, Tensor(c!) d_origin, "
      "Tensor? separable, Tensor(d!)? d_separable, Tensor? depthwise, "
      "Tensor(e!)? d_depthwise, Tensor[] weights, Tensor(f!)[] d_weights, "
      "Tensor? filters) -> ()",
      split_rows);
  library.def(
      "rescale(int start, int stop, Tensor(a!) by_tap, Tensor product, Tensor second, "
      "Tensor(b!) d_second, Tensor scale, Tensor(c!) d_scale) -> ()",
      rescale_rows);
}
