// The folds of closed_forms.py and their derivatives, compiled for a CPU.
//
// On a CPU a fold waits for memory more than it computes. Between the matrix products,
// all that is done to a row of the kernel is done here in one walk through memory.
//
// Names and shapes are those of closed_forms.py: O outputs, K taps, I inputs, T channels
// between two composed convs, m maps of each input in the separable branch. A row is what
// belongs to one output, (K, I). Input channels are the lanes of the vectors.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
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

// The elements of a block of rows, which the caches are to hold between two steps.
constexpr int64_t BLOCK = 1 << 19;
// The elements of a kernel from which on results go past the caches.
constexpr int64_t LARGE = 1 << 18;

// ---- vectors -------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

template <typename S>
struct VectorOf {
  typedef S type __attribute__((vector_size(BYTES)));
};
template <typename S>
using Vector = typename VectorOf<S>::type;
template <typename S>
constexpr int LANES = BYTES / sizeof(S);

// `n` lanes: all of them, known to the compiler, or fewer.
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
INLINE void stream(S* to, Vector<S> v, N n, bool is_large) {
#ifdef __AVX__
  if (is_large && n == LANES<S> && reinterpret_cast<uintptr_t>(to) % BYTES == 0)
#ifdef __AVX512F__
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#else
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#endif
#endif
  store(to, v, n);
}

template <typename S>
INLINE S sum(Vector<S> v) {
  S total = 0;
  for (int j = 0; j < LANES<S>; ++j) total += v[j];
  return total;
}

// Calls f(i, n) for every n numbers from i on.
template <typename S, typename F>
INLINE void for_lanes(int64_t size, F f) {
  int64_t i = 0;
  for (; i + LANES<S> <= size; i += LANES<S>) f(i, std::integral_constant<int, LANES<S>>{});
  if (i < size) f(i, static_cast<int>(size - i));
}

// ---- the branches --------------------------------------------------------------------

// The parts of the sum, in the order of `rows`: the row of `scale` that is theirs, or -1
// where a part is missing.
enum { ORIGIN, COMPOSED, FILTERED, SEPARABLE = FILTERED + 3, PARTS };

// All parameters, or all gradients, in the order of BranchSum.roles; null where a branch
// is missing.
template <typename S>
struct Terms {
  S *scale[PARTS] = {}, *origin = nullptr, *second = nullptr, *weight[3] = {};
  S *separable = nullptr, *depthwise = nullptr, *filter[3] = {};
  int64_t maps = 0;
  bool is_large;

  Terms(TensorList tensors, IntArrayRef shape, IntArrayRef rows,
        const OptionalTensor& filters)
      : is_large(c10::multiply_integers(shape) >= LARGE) {
    int next = 1;
    auto take = [&] { return tensors[next++].data_ptr<S>(); };
    for (int part = 0; part < PARTS; ++part)
      if (rows[part] >= 0) scale[part] = tensors[0].data_ptr<S>() + rows[part] * shape[0];
    if (scale[ORIGIN]) origin = take();
    if (scale[COMPOSED]) take(), second = take();
    for (int q = 0, at = 0; q < 3; ++q)
      if (scale[FILTERED + q]) weight[q] = take(), filter[q] = (*filters)[at++].data_ptr<S>();
    if (scale[SEPARABLE])
      maps = tensors[next].size(1), separable = take(), depthwise = take();
  }
};

// A row of the kernel; `product` is that of B·(C + E).
template <typename S, int K>
INLINE void fold_row(int64_t I, int64_t o, S* kernel, const S* product,
                     const Terms<S>& p) {
  const S *origin = p.origin + o * K * I, *separable = p.separable + o * p.maps * I;
  for_lanes<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> w[K] = {};
    for (int k = 0; k < K; ++k) {
      if (p.second) w[k] += p.scale[COMPOSED][o] * load(product + k * I + i, n);
      if (p.origin) w[k] += p.scale[ORIGIN][o] * load(origin + k * I + i, n);
    }
    for (int64_t m = 0; m < p.maps; ++m) {
      const auto x = p.scale[SEPARABLE][o] * load(separable + m * I + i, n);
      for (int k = 0; k < K; ++k) w[k] += x * load(p.depthwise + (m * K + k) * I + i, n);
    }
    for (int q = 0; q < 3; ++q) {
      if (!p.weight[q]) continue;
      const auto x = p.scale[FILTERED + q][o] * load(p.weight[q] + o * I + i, n);
      for (int k = 0; k < K; ++k) w[k] += p.filter[q][o * K + k] * x;
    }
    for (int k = 0; k < K; ++k) stream(kernel + k * I + i, w[k], n, p.is_large);
  });
}

// The gradients of all branches but the composed one, from a row of that of the kernel;
// `scaled` gets this row, scaled as the composed branch, `d_depthwise` is added to.
template <typename S, int K>
INLINE void gradient_row(int64_t I, int64_t o, const S* grad, S* scaled, S* d_depthwise,
                         const Terms<S>& p, const Terms<S>& d) {
  Vector<S> total[PARTS] = {};
  for_lanes<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> g[K];
    for (int k = 0; k < K; ++k) {
      g[k] = load(grad + k * I + i, n);
      if (p.second) store(scaled + k * I + i, p.scale[COMPOSED][o] * g[k], n);
      if (!p.origin) continue;
      const int64_t at = (o * K + k) * I + i;
      total[ORIGIN] += g[k] * load(p.origin + at, n);
      stream(d.origin + at, p.scale[ORIGIN][o] * g[k], n, p.is_large);
    }
    for (int q = 0; q < 3; ++q) {
      if (!p.weight[q]) continue;
      Vector<S> x{};
      for (int k = 0; k < K; ++k) x += p.filter[q][o * K + k] * g[k];
      total[FILTERED + q] += x * load(p.weight[q] + o * I + i, n);
      stream(d.weight[q] + o * I + i, p.scale[FILTERED + q][o] * x, n, p.is_large);
    }
    for (int64_t m = 0; m < p.maps; ++m) {
      const int64_t at = (o * p.maps + m) * I + i;
      const auto weight = load(p.separable + at, n);
      const auto by = p.scale[SEPARABLE][o] * weight;
      Vector<S> x{};
      for (int k = 0; k < K; ++k) {
        const int64_t tap = (m * K + k) * I + i;
        x += load(p.depthwise + tap, n) * g[k];
        store(d_depthwise + tap, load(d_depthwise + tap, n) + by * g[k], n);
      }
      total[SEPARABLE] += x * weight;
      stream(d.separable + at, p.scale[SEPARABLE][o] * x, n, p.is_large);
    }
  });
  for (int part = 0; part < PARTS; ++part)
    if (d.scale[part] && part != COMPOSED) d.scale[part][o] = sum<S>(total[part]);
}

// The gradients of the composed branch's scale and second conv, from G·(C + E)ᵀ.
template <typename S>
INLINE void composed_row(int64_t size, int64_t o, const S* product, const Terms<S>& p,
                         const Terms<S>& d) {
  Vector<S> total{};
  for_lanes<S>(size, [&](int64_t j, auto n) INLINE_LAMBDA {
    const auto x = load(product + j, n);
    total += x * load(p.second + o * size + j, n);
    stream(d.second + o * size + j, p.scale[COMPOSED][o] * x, n, p.is_large);
  });
  d.scale[COMPOSED][o] = sum<S>(total);
}

// ---- the tensors ---------------------------------------------------------------------

// What is needed for the time of a call, kept for the next one: memory from the system
// is cleared, page by page, before use, which takes as long as half of a small fold.
enum Purpose { ROWS, PRODUCT, MATRIX, D_DEPTHWISE, PURPOSES };

Tensor scratch(Purpose purpose, IntArrayRef shape, const Tensor& like) {
  static thread_local Tensor kept[PURPOSES];
  Tensor& tensor = kept[purpose];
  const int64_t size = c10::multiply_integers(shape);
  if (!tensor.defined() || tensor.numel() < size || tensor.dtype() != like.dtype())
    tensor = at::empty({size}, like.options());
  return tensor.narrow(0, 0, size).view(shape);
}

// The factors of the composed branch, (T, I) with the identity, and (O·K, T).
struct Factors {
  Tensor first, second;

  Factors(TensorList t, IntArrayRef rows, bool has_identity) {
    if (rows[COMPOSED] < 0) return;
    const int at = rows[ORIGIN] < 0 ? 1 : 2;
    first = t[at].flatten(1);
    second = t[at + 1].reshape({-1, first.size(0)});
    if (!has_identity) return;
    first = scratch(MATRIX, first.sizes(), first).copy_(first);
    first.diagonal().add_(1);
  }
};

// Calls f(S, K) with the number type and the taps of a kernel.
template <typename F>
void dispatch(const Tensor& like, int64_t taps, F f) {
  auto with_type = [&](auto zero) {
    if (taps == 1) f(zero, std::integral_constant<int, 1>{});
    if (taps == 9) f(zero, std::integral_constant<int, 9>{});
    if (taps == 25) f(zero, std::integral_constant<int, 25>{});
  };
  like.dtype() == at::kFloat ? with_type(float()) : with_type(double());
}

// Calls f(start, stop) for blocks of rows of a kernel.
template <typename F>
void for_blocks(int64_t rows, int64_t size, F f) {
  const int64_t step = std::max(BLOCK / size, int64_t(1));
  for (int64_t start = 0; start < rows; start += step)
    f(start, std::min(start + step, rows));
}

// Calls f(o, task) for the rows from start to stop, as many tasks as there are threads.
template <typename F>
void for_rows(int64_t start, int64_t stop, F f) {
  const int64_t tasks = at::get_num_threads(), rows = stop - start;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t o = start + rows * task / tasks; o < start + rows * (task + 1) / tasks;
           ++o)
        f(o, task);
#ifdef __AVX__
    _mm_sfence();  // What was streamed is visible to others from here on.
#endif
  });
}

// ---- what Python calls ---------------------------------------------------------------

// The kernel, (O, I, k, k), from parameters in one piece.
Tensor fold(TensorList t, IntArrayRef shape, IntArrayRef rows, bool has_identity,
            const OptionalTensor& filters) {
  // What follows is written into new tensors and scratch memory.
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t O = shape[0], I = shape[1], k = shape[2];
  const Factors factors(t, rows, has_identity);
  const Tensor kernel =
      at::empty_strided(shape, {k * k * I, 1, k * I, I}, t[0].options());
  dispatch(kernel, k * k, [&](auto zero, auto taps) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(t, shape, rows, filters);
    for_blocks(O, K * I, [&](int64_t start, int64_t stop) {
      const S* product = nullptr;
      if (p.second) {
        const int64_t count = (stop - start) * K;
        Tensor composed = scratch(PRODUCT, {count, I}, kernel);
        at::mm_out(composed, factors.second.narrow(0, start * K, count), factors.first);
        product = composed.data_ptr<S>();
      }
      for_rows(start, stop, [&](int64_t o, int64_t) {
        fold_row<S, K>(I, o, kernel.data_ptr<S>() + o * K * I,
                       product + (o - start) * K * I, p);
      });
    });
  });
  return kernel;
}

// The gradients of the parameters, in their order.
std::vector<Tensor> fold_gradients(const Tensor& gradient, TensorList t,
                                   IntArrayRef shape, IntArrayRef rows,
                                   bool has_identity, const OptionalTensor& filters) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t O = shape[0], I = shape[1], tasks = at::get_num_threads();
  const Factors factors(t, rows, has_identity);
  const Tensor grad = gradient.permute({0, 2, 3, 1}).contiguous().view({-1, I});
  std::vector<Tensor> gradients;
  for (const Tensor& tensor : t) gradients.push_back(at::empty_like(tensor));
  dispatch(grad, shape[2] * shape[3], [&](auto zero, auto taps) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(t, shape, rows, filters), d(gradients, shape, rows, filters);
    const int64_t size = p.maps * K * I;
    // A sum for every task: added up in the order in which threads finish, it would be
    // another one in every run.
    Tensor sums = scratch(D_DEPTHWISE, {tasks, size}, grad).zero_(), d_first;
    if (p.second) d_first = gradients[p.origin ? 2 : 1].view(factors.first.sizes());
    for_blocks(O, K * I, [&](int64_t start, int64_t stop) {
      const int64_t count = (stop - start) * K;
      const Tensor scaled = scratch(ROWS, {count, I}, grad);
      for_rows(start, stop, [&](int64_t o, int64_t task) {
        gradient_row<S, K>(I, o, grad.data_ptr<S>() + o * K * I,
                           scaled.data_ptr<S>() + (o - start) * K * I,
                           sums.data_ptr<S>() + task * size, p, d);
      });
      if (!p.second) return;
      const int64_t T = factors.first.size(0);
      Tensor product = scratch(PRODUCT, {count, T}, grad);
      at::mm_out(product, grad.narrow(0, start * K, count), factors.first.t());
      for_rows(start, stop, [&](int64_t o, int64_t) {
        composed_row<S>(K * T, o, product.data_ptr<S>() + (o - start) * K * T, p, d);
      });
      at::addmm_out(d_first, d_first, factors.second.narrow(0, start * K, count).t(),
                    scaled, start > 0);
    });
    if (p.maps) {
      Tensor d_depthwise = gradients.back().view({size});
      at::sum_out(d_depthwise, sums, 0);
    }
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY(mmorepa, library) {
  library.def(
      "fold(Tensor[] parameters, int[] shape, int[] rows, bool has_identity, "
      "Tensor? filters) -> Tensor");
  library.def(
      "fold_gradients(Tensor grad, Tensor[] parameters, int[] shape, int[] rows, "
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
