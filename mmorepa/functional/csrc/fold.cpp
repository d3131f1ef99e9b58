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
// Rows that are done together, so that a depthwise filter is loaded once for them.
constexpr int GROUP = 2;

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
  S *separable = nullptr, *depthwise = nullptr;
  int64_t maps = 0;

  Terms(TensorList tensors, IntArrayRef rows, int64_t O) {
    int next = 1;
    auto take = [&] { return tensors[next++].data_ptr<S>(); };
    for (int part = 0; part < PARTS; ++part)
      if (rows[part] >= 0) scale[part] = tensors[0].data_ptr<S>() + rows[part] * O;
    if (scale[ORIGIN]) origin = take();
    if (scale[COMPOSED]) take(), second = take();
    for (int q = 0; q < 3; ++q)
      if (scale[FILTERED + q]) weight[q] = take();
    if (scale[SEPARABLE])
      maps = tensors[next].size(1), separable = take(), depthwise = take();
  }
};

// R rows of the kernel from o on; `product` is B·(C + E) there, `filters` by branch.
template <typename S, int K, int R>
INLINE void fold_rows(int64_t I, int64_t o, S* kernel, const S* product,
                      const Terms<S>& p, S* const* filters, bool is_large) {
  for_lanes<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> w[R][K] = {}, x[R];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) {
        if (p.second)
          w[r][k] += p.scale[COMPOSED][o + r] * load(product + (r * K + k) * I + i, n);
        if (p.origin)
          w[r][k] += p.scale[ORIGIN][o + r] * load(p.origin + ((o + r) * K + k) * I + i, n);
      }
    for (int64_t m = 0; m < p.maps; ++m) {
      for (int r = 0; r < R; ++r)
        x[r] = p.scale[SEPARABLE][o + r] *
               load(p.separable + ((o + r) * p.maps + m) * I + i, n);
      for (int k = 0; k < K; ++k) {
        const auto filter = load(p.depthwise + (m * K + k) * I + i, n);
        for (int r = 0; r < R; ++r) w[r][k] += x[r] * filter;
      }
    }
    for (int q = 0; q < 3; ++q)
      for (int r = 0; r < R && p.weight[q]; ++r) {
        x[r] = p.scale[FILTERED + q][o + r] * load(p.weight[q] + (o + r) * I + i, n);
        for (int k = 0; k < K; ++k) w[r][k] += filters[q][(o + r) * K + k] * x[r];
      }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k)
        stream(kernel + ((o + r) * K + k) * I + i, w[r][k], n, is_large);
  });
}

// The gradients of all branches but the composed one, from R rows of that of the kernel;
// `scaled` gets these rows, scaled as the composed branch, `d_depthwise` is added to.
template <typename S, int K, int R>
INLINE void gradient_rows(int64_t I, int64_t o, const S* grad, S* scaled,
                          const Terms<S>& p, const Terms<S>& d, S* d_depthwise,
                          S* const* filters, bool is_large) {
  Vector<S> total[PARTS][R] = {};
  for_lanes<S>(I, [&](int64_t i, auto n) INLINE_LAMBDA {
    Vector<S> g[R][K], x[R], weight[R];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) {
        const int64_t place = ((o + r) * K + k) * I + i;
        g[r][k] = load(grad + place, n);
        if (p.second)
          store(scaled + (r * K + k) * I + i, p.scale[COMPOSED][o + r] * g[r][k], n);
        if (!p.origin) continue;
        total[ORIGIN][r] += g[r][k] * load(p.origin + place, n);
        stream(d.origin + place, p.scale[ORIGIN][o + r] * g[r][k], n, is_large);
      }
    for (int q = 0; q < 3; ++q)
      for (int r = 0; r < R && p.weight[q]; ++r) {
        const int64_t place = (o + r) * I + i;
        x[r] = Vector<S>{};
        for (int k = 0; k < K; ++k) x[r] += filters[q][(o + r) * K + k] * g[r][k];
        total[FILTERED + q][r] += x[r] * load(p.weight[q] + place, n);
        stream(d.weight[q] + place, p.scale[FILTERED + q][o + r] * x[r], n, is_large);
      }
    for (int64_t m = 0; m < p.maps; ++m) {
      for (int r = 0; r < R; ++r) {
        weight[r] = load(p.separable + ((o + r) * p.maps + m) * I + i, n);
        x[r] = Vector<S>{};
      }
      for (int k = 0; k < K; ++k) {
        const int64_t place = (m * K + k) * I + i;
        const auto filter = load(p.depthwise + place, n);
        auto sum = load(d_depthwise + place, n);
        for (int r = 0; r < R; ++r) {
          x[r] += filter * g[r][k];
          sum += (p.scale[SEPARABLE][o + r] * weight[r]) * g[r][k];
        }
        store(d_depthwise + place, sum, n);
      }
      for (int r = 0; r < R; ++r) {
        total[SEPARABLE][r] += x[r] * weight[r];
        stream(d.separable + ((o + r) * p.maps + m) * I + i,
               p.scale[SEPARABLE][o + r] * x[r], n, is_large);
      }
    }
  });
  for (int part = 0; part < PARTS; ++part)
    for (int r = 0; r < R && d.scale[part] && part != COMPOSED; ++r)
      d.scale[part][o + r] = sum<S>(total[part][r]);
}

// The gradients of the composed branch's scale and second conv, from G·(C + E)ᵀ.
template <typename S>
INLINE void composed_row(int64_t size, int64_t o, const S* product, const Terms<S>& p,
                         const Terms<S>& d, bool is_large) {
  Vector<S> total{};
  for_lanes<S>(size, [&](int64_t j, auto n) INLINE_LAMBDA {
    const auto x = load(product + j, n);
    total += x * load(p.second + o * size + j, n);
    stream(d.second + o * size + j, p.scale[COMPOSED][o] * x, n, is_large);
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

// The parameters of a sum: as many as they should be, and in one piece each.
struct Sum {
  std::vector<Tensor> tensors;
  IntArrayRef rows;
  int64_t O, I, K, T = 0;
  Tensor first, second;  // Of the composed branch, (T, I) and (O·K, T).

  Sum(TensorList parameters, IntArrayRef shape, IntArrayRef rows, bool has_identity)
      : rows(rows), O(shape[0]), I(shape[1]), K(shape[2] * shape[3]) {
    for (const Tensor& t : parameters) tensors.push_back(t.contiguous());
    int next = 0;
    auto check = [&](int64_t height, int64_t width) {
      const Tensor& t = tensors[next++];
      TORCH_CHECK(t.numel() == height * width && t.const_data_ptr() != nullptr,
                  "a parameter of a kernel has the shape ", t.sizes(), ", not ", height,
                  " x ", width);
      return t;
    };
    check(*std::max_element(rows.begin(), rows.end()) + 1, O);
    if (rows[ORIGIN] >= 0) check(O * K, I);
    if (rows[COMPOSED] >= 0) {
      T = tensors[next].numel() / I;
      first = check(T, I).view({T, I});
      second = check(O * K, T).view({O * K, T});
    }
    for (int q = FILTERED; q < SEPARABLE; ++q)
      if (rows[q] >= 0) check(O, I);
    if (rows[SEPARABLE] >= 0) {
      const int64_t maps = tensors[next].size(1);
      check(O * maps, I), check(maps * K, I);
    }
    if (!has_identity) return;
    first = scratch(MATRIX, first.sizes(), first).copy_(first);
    first.diagonal().add_(1);
  }

  bool is_large() const { return O * K * I >= LARGE; }

  // Calls f(start, stop) for blocks of rows.
  template <typename F>
  void for_blocks(F f) const {
    const int64_t step = std::max(BLOCK / (K * I) / GROUP * GROUP, int64_t(GROUP));
    for (int64_t start = 0; start < O; start += step) f(start, std::min(start + step, O));
  }

  // Calls f(S, K, filters by part).
  template <typename F>
  void dispatch(const OptionalTensor& filters, F f) const {
    auto with_type = [&](auto zero) {
      using S = decltype(zero);
      S *of[3] = {}, *next = filters ? filters->data_ptr<S>() : nullptr;
      for (int q = 0; q < 3; ++q)
        if (rows[FILTERED + q] >= 0) of[q] = next, next += O * K;
      if (K == 1) f(zero, std::integral_constant<int, 1>{}, of);
      if (K == 9) f(zero, std::integral_constant<int, 9>{}, of);
      if (K == 25) f(zero, std::integral_constant<int, 25>{}, of);
    };
    tensors[0].dtype() == at::kFloat ? with_type(float()) : with_type(double());
  }
};

// Calls f(task, o, R) for R rows from o on, for all rows from start to stop.
template <typename F>
void for_rows(int64_t start, int64_t stop, int64_t tasks, F f) {
  const int64_t groups = (stop - start + GROUP - 1) / GROUP;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t o = start + groups * task / tasks * GROUP;
      const int64_t last = std::min(start + groups * (task + 1) / tasks * GROUP, stop);
      for (; o + GROUP <= last; o += GROUP)
        f(task, o, std::integral_constant<int, GROUP>{});
      for (; o < last; ++o) f(task, o, std::integral_constant<int, 1>{});
    }
#ifdef __AVX__
    _mm_sfence();  // What was streamed is visible to others from here on.
#endif
  });
}

// ---- what Python calls ---------------------------------------------------------------

// The kernel, (O, I, k, k).
Tensor fold(TensorList parameters, IntArrayRef shape, IntArrayRef rows, bool has_identity,
            const OptionalTensor& filters) {
  // What follows is written into new tensors and scratch memory.
  at::AutoDispatchBelowADInplaceOrView guard;
  const Sum sum(parameters, shape, rows, has_identity);
  const int64_t I = sum.I, k = shape[2];
  const Tensor kernel =
      at::empty_strided(shape, {k * k * I, 1, k * I, I}, parameters[0].options());
  sum.dispatch(filters, [&](auto zero, auto taps, auto filter) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(sum.tensors, rows, sum.O);
    sum.for_blocks([&](int64_t start, int64_t stop) {
      const S* product = nullptr;
      if (p.second) {
        const int64_t from = start * K, count = (stop - start) * K;
        Tensor composed = scratch(PRODUCT, {count, sum.I}, kernel);
        at::mm_out(composed, sum.second.narrow(0, from, count), sum.first);
        product = composed.data_ptr<S>();
      }
      for_rows(start, stop, at::get_num_threads(), [&](int64_t, int64_t o, auto R) {
        fold_rows<S, K, R>(sum.I, o, kernel.data_ptr<S>(),
                           product + (o - start) * K * sum.I, p, filter,
                           sum.is_large());
      });
    });
  });
  return kernel;
}

// The gradients of the parameters, in their order.
std::vector<Tensor> fold_gradients(const Tensor& gradient, TensorList parameters,
                                   IntArrayRef shape, IntArrayRef rows,
                                   bool has_identity,
                                   const OptionalTensor& filters) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Sum sum(parameters, shape, rows, has_identity);
  TORCH_CHECK(gradient.sizes() == shape, "a gradient of the shape ", gradient.sizes(),
              " for a kernel of ", shape);
  const Tensor grad = gradient.permute({0, 2, 3, 1}).contiguous().view({-1, sum.I});
  std::vector<Tensor> gradients;
  for (const Tensor& tensor : sum.tensors) gradients.push_back(at::empty_like(tensor));
  sum.dispatch(filters, [&](auto zero, auto taps, auto filter) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(sum.tensors, rows, sum.O), d(gradients, rows, sum.O);
    // A sum for every task: added up in the order in which threads finish, it would be
    // another one in every run.
    const int64_t tasks = at::get_num_threads(), size = p.maps * K * sum.I;
    Tensor sums = scratch(D_DEPTHWISE, {tasks, size}, grad).zero_(), d_first;
    if (p.second) d_first = gradients[rows[ORIGIN] >= 0 ? 2 : 1].view({sum.T, sum.I});
    sum.for_blocks([&](int64_t start, int64_t stop) {
      const int64_t from = start * K, count = (stop - start) * K;
      const Tensor scaled = scratch(ROWS, {count, sum.I}, grad);
      for_rows(start, stop, tasks, [&](int64_t task, int64_t o, auto R) {
        gradient_rows<S, K, R>(sum.I, o, grad.data_ptr<S>(),
                               scaled.data_ptr<S>() + (o - start) * K * sum.I, p, d,
                               sums.data_ptr<S>() + task * size, filter,
                               sum.is_large());
      });
      if (!p.second) return;
      Tensor product = scratch(PRODUCT, {count, sum.T}, grad);
      at::mm_out(product, grad.narrow(0, from, count), sum.first.t());
      for_rows(start, stop, tasks, [&](int64_t, int64_t first, auto R) {
        for (int64_t o = first; o < first + R; ++o)
          composed_row<S>(K * sum.T, o, product.data_ptr<S>() + (o - start) * K * sum.T,
                          p, d, sum.is_large());
      });
      at::addmm_out(d_first, d_first, sum.second.narrow(0, from, count).t(), scaled,
                    start > 0);
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
