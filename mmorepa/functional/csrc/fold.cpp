// The folds of closed_forms.py and their derivatives, compiled for a CPU.
//
// Between the matrix products, all that is done to a row of the kernel, (K, I), is done
// in one walk through memory, for which a fold waits more than it computes. Names and
// shapes are those of closed_forms.py. Input channels are the lanes of the vectors.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {
using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

// The elements of a block of rows, which the caches are to hold between two steps.
constexpr int64_t BLOCK = 1 << 19;

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

template <typename S> using Vector [[gnu::vector_size(BYTES)]] = S;

// `n` lanes: all of them, known to the compiler, or fewer.
template <typename S, typename N>
INLINE Vector<S> load(const S* from, N n) {
  Vector<S> v{};
  std::memcpy(&v, from, n * sizeof(S));
  return v;
}

template <typename S, typename V, typename N>
INLINE void store(S* to, const V& v, N n) {
  std::memcpy(to, &v, n * sizeof(S));
}

template <typename S, typename V>
INLINE S sum(const V& v) {
  S total = 0;
  for (size_t j = 0; j < BYTES / sizeof(S); ++j) total += v[j];
  return total;
}

// Calls f(i, n) for every n numbers from i on.
template <typename S, typename F>
INLINE void for_lanes(int64_t size, F f) {
  constexpr int LANES = BYTES / sizeof(S);
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) f(i, std::integral_constant<int, LANES>{});
  if (i < size) f(i, static_cast<int>(size - i));
}

// The parts of the sum, in the order of `rows`: their rows of `scale`, or -1 if missing.
enum { ORIGIN, COMPOSED, FILTERED, SEPARABLE = FILTERED + 3, PARTS };

// Parameters or gradients, in the order of BranchSum.roles; null where a part is missing.
template <typename S>
struct Terms {
  S *scale[PARTS] = {}, *origin = nullptr, *second = nullptr, *weight[3] = {};
  S *separable = nullptr, *depthwise = nullptr, *filter[3] = {};
  int64_t maps = 0;

  Terms(TensorList tensors, IntArrayRef shape, IntArrayRef rows,
        const OptionalTensor& filters) {
    int next = 1;
    auto take = [&] { return tensors[next++].data_ptr<S>(); };
    for (const Tensor& t : tensors)
      TORCH_CHECK(t.const_data_ptr(), "a parameter of a kernel has no memory");
    for (int part = 0; part < PARTS; ++part)
      if (rows[part] >= 0)
        scale[part] = tensors[0].data_ptr<S>() + rows[part] * shape[0];
    if (scale[ORIGIN]) origin = take();
    if (scale[COMPOSED]) take(), second = take();
    for (int q = 0, at = 0; q < 3; ++q)
      if (scale[FILTERED + q])
        weight[q] = take(), filter[q] = (*filters)[at++].data_ptr<S>();
    if (scale[SEPARABLE]) maps = shape[4], separable = take(), depthwise = take();
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
      for (int k = 0; k < K; ++k)
        w[k] += x * load(p.depthwise + (m * K + k) * I + i, n);
    }
    for (int q = 0; q < 3; ++q) {
      if (!p.weight[q]) continue;
      const auto x = p.scale[FILTERED + q][o] * load(p.weight[q] + o * I + i, n);
      for (int k = 0; k < K; ++k) w[k] += p.filter[q][o * K + k] * x;
    }
    for (int k = 0; k < K; ++k) store(kernel + k * I + i, w[k], n);
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
      store(d.origin + at, p.scale[ORIGIN][o] * g[k], n);
    }
    for (int q = 0; q < 3; ++q) {
      if (!p.weight[q]) continue;
      Vector<S> x{};
      for (int k = 0; k < K; ++k) x += p.filter[q][o * K + k] * g[k];
      total[FILTERED + q] += x * load(p.weight[q] + o * I + i, n);
      store(d.weight[q] + o * I + i, p.scale[FILTERED + q][o] * x, n);
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
      store(d.separable + at, p.scale[SEPARABLE][o] * x, n);
    }
  });
  for (int part = 0; part < PARTS; ++part)
    if (d.scale[part] && part != COMPOSED) d.scale[part][o] = sum<S>(total[part]);
}

// What is needed for the time of a call, kept for the next one: the system clears fresh
// memory, page by page, which takes as long as half of a small fold.
enum Purpose { ROWS, PRODUCT, MATRIX, D_DEPTHWISE, PURPOSES };

Tensor scratch(Purpose purpose, IntArrayRef shape, const Tensor& like) {
  static thread_local Tensor kept[PURPOSES];
  Tensor& tensor = kept[purpose];
  const int64_t size = c10::multiply_integers(shape);
  if (!tensor.defined() || tensor.numel() < size || tensor.dtype() != like.dtype())
    tensor = at::empty({size}, like.options());
  return tensor.narrow(0, 0, size).view(shape);
}

// The factors of the composed branch: C, (T, I), with the identity, and B, (O·K, T).
std::tuple<Tensor, Tensor> factors(TensorList t, IntArrayRef rows, bool has_identity) {
  const int at = rows[ORIGIN] < 0 ? 1 : 2;
  const Tensor first = t[at].flatten(1), second = t[at + 1].view({-1, first.size(0)});
  if (!has_identity) return {first, second};
  const Tensor sum = scratch(MATRIX, first.sizes(), first).copy_(first);
  return {(sum.diagonal().add_(1), sum), second};
}

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
  const int64_t step = std::max<int64_t>(BLOCK / size, 1);
  for (int64_t i = 0; i < rows; i += step) f(i, std::min(i + step, rows));
}

// Calls f(o, task) for the rows from start to stop, as many tasks as there are threads.
template <typename F>
void for_rows(int64_t start, int64_t stop, F f) {
  const int64_t tasks = at::get_num_threads(), rows = stop - start;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t o = rows * task / tasks; o < rows * (task + 1) / tasks; ++o)
        f(start + o, task);
  });
}

// The kernel, (O, I, k, k), from parameters in one piece.
Tensor fold(TensorList t, IntArrayRef shape, IntArrayRef rows, bool has_identity,
            const OptionalTensor& filters) {
  at::AutoDispatchBelowADInplaceOrView guard;  // What follows is written in place.
  const int64_t O = shape[0], I = shape[1], k = shape[2];
  const Tensor kernel =
      at::empty_strided({O, I, k, k}, {k * k * I, 1, k * I, I}, t[0].options());
  dispatch(kernel, k * k, [&](auto zero, auto taps) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(t, shape, rows, filters);
    Tensor first, second, composed;
    if (p.second) std::tie(first, second) = factors(t, rows, has_identity);
    for_blocks(O, K * I, [&](int64_t start, int64_t stop) {
      const int64_t count = (stop - start) * K;
      composed = scratch(PRODUCT, {count, I}, kernel);
      if (p.second) at::mm_out(composed, second.narrow(0, start * K, count), first);
      for_rows(start, stop, [&](int64_t o, int64_t) {
        fold_row<S, K>(I, o, kernel.data_ptr<S>() + o * K * I,
                       composed.data_ptr<S>() + (o - start) * K * I, p);
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
    Tensor sums = scratch(D_DEPTHWISE, {tasks, size}, grad).zero_();
    Tensor first, second, d_first, product;
    if (p.second) {
      std::tie(first, second) = factors(t, rows, has_identity);
      d_first = gradients[p.origin ? 2 : 1].view(first.sizes());
    }
    for_blocks(O, K * I, [&](int64_t start, int64_t stop) {
      const int64_t count = (stop - start) * K;
      const Tensor scaled = scratch(ROWS, {count, I}, grad);
      for_rows(start, stop, [&](int64_t o, int64_t task) {
        gradient_row<S, K>(I, o, grad.data_ptr<S>() + o * K * I,
                           scaled.data_ptr<S>() + (o - start) * K * I,
                           sums.data_ptr<S>() + task * size, p, d);
      });
      if (!p.second) return;
      const int64_t T = first.size(0);
      product = scratch(PRODUCT, {count, T}, grad);
      at::mm_out(product, grad.narrow(0, start * K, count), first.t());
      for_rows(start, stop, [&](int64_t o, int64_t) {
        Vector<S> total{};
        for_lanes<S>(K * T, [&](int64_t j, auto n) INLINE_LAMBDA {
          const auto x = load(product.data_ptr<S>() + (o - start) * K * T + j, n);
          total += x * load(p.second + o * K * T + j, n);
          store(d.second + o * K * T + j, p.scale[COMPOSED][o] * x, n);
        });
        d.scale[COMPOSED][o] = sum<S>(total);
      });
      at::addmm_out(d_first, d_first, second.narrow(0, start * K, count).t(), scaled,
                    start > 0);
    });
    if (p.maps) gradients.back().view({size}).copy_(sums.sum(0));
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY(mmorepa, library) {
#define ARGS "Tensor[] t, int[] shape, int[] rows, bool has_identity, Tensor? filters)"
  library.def("fold(" ARGS " -> Tensor");
  library.def("fold_gradients(Tensor grad, " ARGS " -> Tensor[]");
}

// For the CPU alone, so that tracers and other modes see whole folds.
TORCH_LIBRARY_IMPL(mmorepa, CPU, library) {
  library.impl("fold", fold);
  library.impl("fold_gradients", fold_gradients);
}

// No graph is built: the caller says what the derivative is.
TORCH_LIBRARY_IMPL(mmorepa, Autograd, library) {
  library.impl("fold", torch::CppFunction::makeFallthrough());
  library.impl("fold_gradients", torch::CppFunction::makeFallthrough());
}
