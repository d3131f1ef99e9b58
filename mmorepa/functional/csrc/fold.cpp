// The folds of closed_forms.py and their derivatives, compiled for a CPU.
//
// Between the matrix products, all that is done to a row of the kernel, (K, I), is done
// in one walk through memory, for which a fold waits more than it computes. Names and
// shapes are those of closed_forms.py. Input channels are the lanes of the vectors.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/intrinsics.h>
#include <torch/library.h>

#define INLINE __attribute__((always_inline))

namespace {
using at::IntArrayRef, at::Tensor, at::TensorList;

// The elements of a block of rows, which the caches are to hold between two steps.
constexpr int64_t BLOCK = 1 << 19;
constexpr int GROUP = 4;  // The rows of a kernel whose gradients are taken together.
constexpr size_t LARGE = 1 << 20;  // The bytes of a kernel that leaves the caches.
constexpr int BYTES = __BIGGEST_ALIGNMENT__;  // Of a vector.

template <typename S> using Vector [[gnu::vector_size(BYTES)]] = S;
template <int N> using Number = std::integral_constant<int, N>;

// `n` lanes: all of them, known to the compiler, or fewer.
template <typename S, typename N>
INLINE Vector<S> load(const S* from, N n) {
  Vector<S> v{};
  std::memcpy(&v, from, n * sizeof(S));
  return v;
}

// Past the caches if `is_large`: a whole line need not be fetched to be written then.
template <typename S, typename V, typename N>
INLINE void store(S* to, const V& v, N n, bool is_large = false) {
#ifdef __AVX512F__
  if (is_large && n * sizeof(S) == BYTES && uintptr_t(to) % BYTES == 0)
    return _mm512_stream_si512((__m512i*)to, (__m512i)v);
#endif
  std::memcpy(to, &v, n * sizeof(S));
}

// Calls f(i, n) for every n numbers from i on.
template <typename S, typename F>
INLINE void for_lanes(int64_t size, F f) {
  constexpr int LANES = BYTES / sizeof(S);
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) f(i, Number<LANES>{});
  if (i < size) f(i, static_cast<int>(size - i));
}

template <typename S>
INLINE S sum(Vector<S> v) {
  for (size_t j = 1; j < BYTES / sizeof(S); ++j) v[0] += v[j];
  return v[0];
}

// The parts of the sum, in the order of `rows`: their rows of `scale`, or -1 if missing.
enum { ORIGIN, COMPOSED, FILTERED, SEPARABLE = FILTERED + 3, PARTS };

// Parameters or gradients, in the order of BranchSum.roles; null where a part is missing.
template <typename S>
struct Terms {
  S *scale[PARTS] = {}, *origin = nullptr, *second = nullptr, *weight[3] = {};
  S *separable = nullptr, *depthwise = nullptr, *filter[3] = {};
  int64_t maps = 0;
  bool is_large;

  Terms(TensorList tensors, IntArrayRef shape, IntArrayRef rows,
        const std::optional<Tensor>& filters) {
    is_large = c10::multiply_integers(shape.slice(0, 4)) * sizeof(S) >= LARGE;
    auto take = [&, next = 1]() mutable { return tensors[next++].data_ptr<S>(); };
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

// A row of the kernel; `product` is that of B·(C + E). Terms come by value, since the
// compiler would read others anew after every store.
template <typename S, int K>
INLINE void fold_row(int64_t I, int64_t o, S* kernel, const S* product, Terms<S> p) {
  for_lanes<S>(I, [&](int64_t i, auto n) INLINE {
    Vector<S> w[K] = {};
    for (int k = 0; k < K; ++k) {
      const int64_t at = (o * K + k) * I + i;
      if (p.second) w[k] += p.scale[COMPOSED][o] * load(product + k * I + i, n);
      if (p.origin) w[k] += p.scale[ORIGIN][o] * load(p.origin + at, n);
    }
    for (int64_t m = 0; m < p.maps; ++m) {
      auto x = p.scale[SEPARABLE][o] * load(p.separable + (o * p.maps + m) * I + i, n);
      for (int k = 0; k < K; ++k)
        w[k] += x * load(p.depthwise + (m * K + k) * I + i, n);
    }
    for (int q = 0; q < 3; ++q) {
      if (!p.weight[q]) continue;
      const auto x = p.scale[FILTERED + q][o] * load(p.weight[q] + o * I + i, n);
      for (int k = 0; k < K; ++k) w[k] += p.filter[q][o * K + k] * x;
    }
    for (int k = 0; k < K; ++k) store(kernel + k * I + i, w[k], n, p.is_large);
  });
}

// Writes by·x, and returns the inner product of x and y.
template <typename S>
INLINE S scale(int64_t size, const S* x, const S* y, S by, S* to, bool is_large) {
  Vector<S> total{};
  for_lanes<S>(size, [&](int64_t i, auto n) INLINE {
    const auto v = load(x + i, n);
    total += v * load(y + i, n);
    store(to + i, by * v, n, is_large);
  });
  return sum<S>(total);
}

// The gradients of all branches but the composed one, from a group of rows of that of
// the kernel, o to end; `scaled` gets them, scaled as the composed branch. The sums over
// all rows, `d_depthwise`, are added to once for a group: they are in no fast cache.
template <typename S, int K>
INLINE void gradient_rows(int64_t I, int64_t o, int64_t end, const S* grad, S* scaled,
                          S* d_depthwise, Terms<S> p, Terms<S> d) {
  for (int64_t row = o; row < end; ++row, scaled += K * I) {
    const S* g = grad + row * K * I;
    if (p.second) scale(K * I, g, g, p.scale[COMPOSED][row], scaled, false);
    if (p.origin)
      d.scale[ORIGIN][row] =
          scale(K * I, g, p.origin + row * K * I, p.scale[ORIGIN][row],
                d.origin + row * K * I, p.is_large);
    for (int q = 0; q < 3; ++q) {
      if (!p.weight[q]) continue;
      const S by = p.scale[FILTERED + q][row], *filter = p.filter[q] + row * K;
      Vector<S> total{};
      for_lanes<S>(I, [&](int64_t i, auto n) INLINE {
        Vector<S> x{};
        for (int k = 0; k < K; ++k) x += filter[k] * load(g + k * I + i, n);
        total += x * load(p.weight[q] + row * I + i, n);
        store(d.weight[q] + row * I + i, by * x, n, p.is_large);
      });
      d.scale[FILTERED + q][row] = sum<S>(total);
    }
  }
  if (!p.maps) return;
  Vector<S> total[GROUP] = {};
  int64_t row[GROUP];  // What is missing is the last row once more, and adds nothing.
  for (int r = 0; r < GROUP; ++r) row[r] = std::min(o + r, end - 1);
  for_lanes<S>(I, [&](int64_t i, auto n) INLINE {
    for (int64_t m = 0; m < p.maps; ++m) {
      Vector<S> weight[GROUP], added[GROUP], x[GROUP] = {};
      for (int r = 0; r < GROUP; ++r) {
        weight[r] = load(p.separable + (row[r] * p.maps + m) * I + i, n);
        added[r] = (o + r < end ? p.scale[SEPARABLE][row[r]] : 0) * weight[r];
      }
      for (int k = 0; k < K; ++k) {
        const int64_t tap = (m * K + k) * I + i;
        const auto depthwise = load(p.depthwise + tap, n);
        auto change = load(d_depthwise + tap, n);
        for (int r = 0; r < GROUP; ++r) {
          const auto g = load(grad + (row[r] * K + k) * I + i, n);
          x[r] += depthwise * g;
          change += added[r] * g;
        }
        store(d_depthwise + tap, change, n);
      }
      for (int r = 0; r < GROUP; ++r) {
        total[r] += x[r] * weight[r];
        store(d.separable + (row[r] * p.maps + m) * I + i,
              p.scale[SEPARABLE][row[r]] * x[r], n, p.is_large);
      }
    }
  });
  for (int r = 0; r < GROUP; ++r) d.scale[SEPARABLE][row[r]] = sum<S>(total[r]);
}

// Memory for the time of a call, kept for the next one: the system clears fresh memory,
// page by page, which takes as long as half of a small fold.
enum Purpose { ROWS, PRODUCT, MATRIX, D_DEPTHWISE };
template <Purpose>
Tensor scratch(IntArrayRef shape, const Tensor& like) {
  static thread_local Tensor tensor;
  const int64_t size = c10::multiply_integers(shape);
  if (!tensor.defined() || tensor.numel() < size || tensor.dtype() != like.dtype())
    tensor = at::empty({size}, like.options());
  return tensor.narrow(0, 0, size).view(shape);
}

// The factors of the composed branch: C, (T, I), with the identity, and B, (O·K, T).
std::tuple<Tensor, Tensor> factors(TensorList t, IntArrayRef rows, bool has_identity) {
  const int at = rows[ORIGIN] < 0 ? 1 : 2;
  if (rows[COMPOSED] < 0) return {};
  const Tensor first = t[at].flatten(1), second = t[at + 1].view({-1, first.size(0)});
  if (!has_identity) return {first, second};
  const Tensor sum = scratch<MATRIX>(first.sizes(), first).copy_(first);
  return {(sum.diagonal().add_(1), sum), second};
}

// Calls f(S, K) with the number type and the taps of a kernel.
template <typename F>
void dispatch(const Tensor& like, int64_t taps, F f) {
  TORCH_CHECK(taps == 1 || taps == 9 || taps == 25, taps, " taps are not compiled");
  auto with_taps = [&](auto k) {
    if (taps == k) like.dtype() == at::kFloat ? f(float(), k) : f(double(), k);
  };
  with_taps(Number<1>{}), with_taps(Number<9>{}), with_taps(Number<25>{});
}

// The kernel, (O, I, k, k), from parameters in one piece.
Tensor fold(TensorList t, IntArrayRef shape, IntArrayRef rows, bool has_identity,
            const std::optional<Tensor>& filters) {
  at::AutoDispatchBelowADInplaceOrView guard;  // What follows is written in place.
  const int64_t O = shape[0], I = shape[1], k = shape[2];
  const Tensor kernel =
      at::empty_strided({O, I, k, k}, {k * k * I, 1, k * I, I}, t[0].options());
  dispatch(kernel, k * k, [&](auto zero, auto taps) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(t, shape, rows, filters);
    const auto [first, second] = factors(t, rows, has_identity);
    const int64_t step = std::max<int64_t>(BLOCK / (K * I), 1);
    for (int64_t start = 0; start < O; start += step) {
      const int64_t stop = std::min(start + step, O), count = (stop - start) * K;
      Tensor product = scratch<PRODUCT>({count, I}, kernel);
      if (p.second) at::mm_out(product, second.narrow(0, start * K, count), first);
      at::parallel_for(start, stop, 1, [&](int64_t o, int64_t end) {
        for (; o < end; ++o)
          fold_row<S, K>(I, o, kernel.data_ptr<S>() + o * K * I,
                         product.data_ptr<S>() + (o - start) * K * I, p);
      });
    }
  });
  return kernel;
}

// The gradients of the parameters, in their order.
std::vector<Tensor> fold_gradients(
    const Tensor& gradient, TensorList t, IntArrayRef shape, IntArrayRef rows,
    bool has_identity, const std::optional<Tensor>& filters) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t O = shape[0], I = shape[1];
  const Tensor grad = gradient.permute({0, 2, 3, 1}).contiguous().view({-1, I});
  std::vector<Tensor> gradients;
  for (const Tensor& tensor : t) gradients.push_back(at::empty_like(tensor));
  dispatch(grad, shape[2] * shape[3], [&](auto zero, auto taps) {
    using S = decltype(zero);
    constexpr int K = taps;
    const Terms<S> p(t, shape, rows, filters), d(gradients, shape, rows, filters);
    const int64_t size = p.maps * K * I;
    // One sum for each thread: their order is the same in every run.
    Tensor sums = scratch<D_DEPTHWISE>({at::get_num_threads(), size}, grad).zero_();
    const auto [first, second] = factors(t, rows, has_identity);
    const int64_t step = std::max<int64_t>(BLOCK / (K * I), 1);
    for (int64_t start = 0; start < O; start += step) {
      const int64_t stop = std::min(start + step, O), count = (stop - start) * K;
      const Tensor scaled = scratch<ROWS>({count, I}, grad);
      at::parallel_for(start, stop, 1, [&](int64_t o, int64_t end) {
        S* d_depthwise = sums.data_ptr<S>() + at::get_thread_num() * size;
        for (; o < end; o += GROUP)
          gradient_rows<S, K>(I, o, std::min(o + GROUP, end), grad.data_ptr<S>(),
                              scaled.data_ptr<S>() + (o - start) * K * I, d_depthwise,
                              p, d);
      });
      if (!p.second) continue;
      const int64_t T = first.size(0);
      Tensor product = scratch<PRODUCT>({count, T}, grad);
      at::mm_out(product, grad.narrow(0, start * K, count), first.t());
      at::parallel_for(start, stop, 1, [&](int64_t o, int64_t end) {
        for (; o < end; ++o)
          d.scale[COMPOSED][o] =
              scale(K * T, product.data_ptr<S>() + (o - start) * K * T,
                    p.second + o * K * T, p.scale[COMPOSED][o], d.second + o * K * T,
                    p.is_large);
      });
      gradients[p.origin ? 2 : 1].view(first.sizes()).addmm_(
          second.narrow(0, start * K, count).t(), scaled, start > 0);
    }
    if (p.maps) gradients.back().view({size}).copy_(sums.sum(0));
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY(mmorepa, library) {
#define ARGS "Tensor[] t, int[] shape, int[] rows, bool has_identity, Tensor? filters)"
  library.def("fold(" ARGS " -> Tensor");
  library.def("fold_gradients(Tensor grad, " ARGS " -> Tensor[]");
  // For the CPU alone, so that tracers and other modes see whole folds.
  library.impl("fold", at::kCPU, fold);
  library.impl("fold_gradients", at::kCPU, fold_gradients);
  // No graph is built: the caller says what the derivative is.
  for (const char* name : {"fold", "fold_gradients"})
    library.impl(name, c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough());
}
