// svdiff::expand on CPUs: vendor GEMMs, and between them one fused pass each way.
//
// Tensors come in one of two layouts, which is kept: rows dense ([T, r] contiguous) or, of a conv in NCHW, columns dense
// ([B, r, P] contiguous, seen as [B, P, r]).

#include "../ops.h"
#include "gemm.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace svdiff {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 15;    // elements a thread should have to be worth waking
constexpr int64_t kFlushRows = 32;     // rows summed in the compute type before they join a double
constexpr int64_t kFlushPixels = 512;  // the same along a line of pixels

// Where scale is wide and z is not, sums and products are taken in this type.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

Tensor as_compute(const Tensor& scale, at::ScalarType type) {
  return scale.to(type == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

// dst = src * scale[sample], rows dense: src, dst [S * rows, r].
template <typename dst_t, typename src_t>
void scale_rows(dst_t* dst, const src_t* src, const compute_t<src_t>* scale, int64_t S, int64_t rows, int64_t r) {
  at::parallel_for(0, S * rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, r)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto* s = scale + t / rows * r;
      const auto* from = src + t * r;
      auto* to = dst + t * r;
      for (int64_t j = 0; j < r; ++j) {
        to[j] = static_cast<dst_t>(static_cast<compute_t<src_t>>(from[j]) * s[j]);
      }
    }
  });
}

// dst = src * scale[sample], columns dense: src, dst [S * images, r, P].
template <typename dst_t, typename src_t>
void scale_columns(
    dst_t* dst, const src_t* src, const compute_t<src_t>* scale, int64_t S, int64_t images, int64_t r, int64_t P) {
  at::parallel_for(0, S * images * r, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, P)), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const auto s = scale[line / (images * r) * r + line % r];
      const auto* from = src + line * P;
      auto* to = dst + line * P;
      for (int64_t p = 0; p < P; ++p) {
        to[p] = static_cast<dst_t>(static_cast<compute_t<src_t>>(from[p]) * s);
      }
    }
  });
}

// One pass over b [S * rows, r]: dscale [S, r] = sum over rows of z * b, and dz = scale * b, which may lie where b does.
// Every chunk of rows has its own sums, added up in order: the result depends on the number of threads alone.
template <typename z_t, typename b_t>
void reduce_and_scale_rows(
    z_t* dz,
    const b_t* b,
    const z_t* z,
    const compute_t<z_t>* scale,
    compute_t<z_t>* dscale,
    int64_t S,
    int64_t rows,
    int64_t r) {
  using acc_t = compute_t<z_t>;
  const int64_t wanted = std::min<int64_t>(at::get_num_threads(), 1 + S * rows * r / kGrain);
  const int64_t chunks = std::max<int64_t>(1, (wanted + S - 1) / S);  // of each sample
  const int64_t chunk_rows = (rows + chunks - 1) / chunks;
  std::vector<double> partial(S * chunks * r, 0.0);
  at::parallel_for(0, S * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> sum(r);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / chunks;
      const int64_t first = sample * rows + task % chunks * chunk_rows;
      const int64_t last = std::min(first + chunk_rows, (sample + 1) * rows);
      const auto* s = scale + sample * r;
      double* total = partial.data() + task * r;
      for (int64_t t0 = first; t0 < last; t0 += kFlushRows) {
        std::fill(sum.begin(), sum.end(), acc_t(0));
        for (int64_t t = t0; t < std::min(t0 + kFlushRows, last); ++t) {
          const auto* bt = b + t * r;
          const auto* zt = z + t * r;
          auto* dzt = dz + t * r;
          acc_t* acc = sum.data();
#pragma omp simd
          for (int64_t j = 0; j < r; ++j) {
            const auto value = static_cast<acc_t>(bt[j]);
            acc[j] += static_cast<acc_t>(zt[j]) * value;
            dzt[j] = static_cast<z_t>(value * s[j]);
          }
        }
        for (int64_t j = 0; j < r; ++j) {
          total[j] += sum[j];
        }
      }
    }
  });
  for (int64_t sample = 0; sample < S; ++sample) {
    for (int64_t j = 0; j < r; ++j) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += partial[(sample * chunks + chunk) * r + j];
      }
      dscale[sample * r + j] = static_cast<acc_t>(total);
    }
  }
}

// The same for b, z [S * images, r, P].
template <typename z_t, typename b_t>
void reduce_and_scale_columns(
    z_t* dz,
    const b_t* b,
    const z_t* z,
    const compute_t<z_t>* scale,
    compute_t<z_t>* dscale,
    int64_t S,
    int64_t images,
    int64_t r,
    int64_t P) {
  using acc_t = compute_t<z_t>;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, images * P));
  at::parallel_for(0, S * r, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto s = scale[k];
      double total = 0;
      for (int64_t image = 0; image < images; ++image) {
        const int64_t line = ((k / r * images + image) * r + k % r) * P;
        for (int64_t p0 = 0; p0 < P; p0 += kFlushPixels) {
          acc_t sum = 0;
          const auto* bp = b + line;
          const auto* zp = z + line;
          auto* dzp = dz + line;
#pragma omp simd reduction(+ : sum)
          for (int64_t p = p0; p < std::min(p0 + kFlushPixels, P); ++p) {
            const auto value = static_cast<acc_t>(bp[p]);
            sum += static_cast<acc_t>(zp[p]) * value;
            dzp[p] = static_cast<z_t>(value * s);
          }
          total += sum;
        }
      }
      dscale[k] = static_cast<acc_t>(total);
    }
  });
}

// f(pointer type of t, pointer type of the result): the same type, or either of them fp32 and the other half precision.
template <typename F>
void dispatch_pair(at::ScalarType from, at::ScalarType to, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from, "svdiff::expand", [&] {
    using from_t = scalar_t;
    if (to == from) {
      f(from_t{}, from_t{});
    } else if constexpr (std::is_same_v<from_t, float>) {
      AT_DISPATCH_REDUCED_FLOATING_TYPES(to, "svdiff::expand", [&] { f(from_t{}, scalar_t{}); });
    } else if constexpr (!std::is_same_v<from_t, double>) {
      f(from_t{}, float{});
    }
  });
}

// t * scale[sample] as type `out`, into t itself if in_place; t is dense in either layout.
Tensor scaled(const Tensor& t, const Tensor& scale, at::ScalarType out, bool in_place = false) {
  const int64_t S = scale.size(0), r = scale.size(1);
  const bool columns = columns_dense(t);
  Tensor result = in_place ? t : at::empty_like(t, t.options().dtype(out));  // of t's strides
  dispatch_pair(t.scalar_type(), out, [&](auto from, auto to) {
    using from_t = decltype(from);
    using to_t = decltype(to);
    auto* dst = result.data_ptr<to_t>();
    const auto* src = t.const_data_ptr<from_t>();
    const auto* s = scale.const_data_ptr<compute_t<from_t>>();
    if (columns) {
      scale_columns(dst, src, s, S, t.size(0) / S, r, t.size(1));
    } else {
      scale_rows(dst, src, s, S, count_rows(t) / S, r);
    }
  });
  return result;
}

// t in the layout asked for, dense; a view where it already is.
Tensor dense(const Tensor& t, bool columns) {
  return columns ? t.transpose(1, 2).contiguous().transpose(1, 2) : t.contiguous();
}

void check(const Tensor& rows, int64_t columns, const Tensor& U, const Tensor& scale, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() > 0 && rows.size(-1) == columns, "svdiff::expand: ", name, " has shape ", rows.sizes(),
                    ", expected [*, ", columns, "]");
  TORCH_CHECK_VALUE(scale.dim() == 2 && U.dim() == 2 && scale.size(1) == U.size(1), "svdiff::expand: scale has shape ",
                    scale.sizes(), ", expected [S, ", U.size(-1), "]");
  const int64_t S = scale.size(0), first = rows.dim() == 1 ? 1 : rows.size(0);
  TORCH_CHECK_VALUE(S > 0 && first % S == 0, "svdiff::expand: ", S, " samples do not split ", first, " evenly");
  // Factors may be narrower than what they multiply, as for dy in another half precision; never wider.
  const bool narrower = c10::isReducedFloatingType(U.scalar_type()) && rows.scalar_type() != at::kDouble;
  TORCH_CHECK_VALUE(rows.scalar_type() == U.scalar_type() || narrower, "svdiff::expand: ", name, " is ",
                    rows.scalar_type(), " but U is ", U.scalar_type());
}

}  // namespace

Tensor expand(
    const Tensor& z,
    const Tensor& U,
    const Tensor& scale,
    const std::optional<Tensor>& bias,
    std::optional<at::ScalarType> dtype) {
  check(z, U.size(-1), U, scale, "z");
  const Tensor s = as_compute(scale, z.scalar_type());
  const Tensor zd = dense(z, columns_dense(z));
  const auto type = z.scalar_type(), out = dtype.value_or(type);
  const bool plain = U.scalar_type() == type && out == type;  // one product in one type
  // Scaling U instead touches fewer numbers when there are more rows than outputs; in half precision its rounding would
  // cost more than it saves.
  const bool full = type == at::kFloat || type == at::kDouble;
  if (full && plain && s.size(0) == 1 && count_rows(z) > U.size(0)) {
    return product(zd, at::mul(U, s).t(), bias, type);
  }
  return product(scaled(zd, s, plain && !widens(type) ? type : at::kFloat), U.t(), bias, out);
}

std::tuple<Tensor, Tensor> expand_backward(
    const Tensor& dy, const std::optional<Tensor>& z, const Tensor& U, const Tensor& scale, bool need_dz) {
  check(dy, U.size(0), U, scale, "dy");
  const Tensor s = as_compute(scale, dy.scalar_type());
  const bool columns = columns_dense(dy);
  const auto type = dy.scalar_type();
  const bool plain = U.scalar_type() == type && (!z || z->scalar_type() == type);
  const Tensor b = product(dense(dy, columns), U, std::nullopt, plain && !widens(type) ? type : at::kFloat);
  const auto kept = plain ? type : b.scalar_type();  // of z and dz while they are computed
  const bool in_place = b.scalar_type() == kept;
  Tensor dz = at::empty({0}, dy.options()), dscale = at::empty({0}, scale.options());
  if (z) {
    check(*z, U.size(1), U, scale, "z");
    const Tensor zd = dense(z->to(kept), columns);
    const int64_t S = s.size(0), r = s.size(1);
    Tensor sums = at::empty_like(s);
    dz = in_place ? b : at::empty_like(b, dy.options());
    dispatch_pair(b.scalar_type(), kept, [&](auto from, auto to) {
      using b_t = decltype(from);
      using z_t = decltype(to);
      auto* pdz = dz.data_ptr<z_t>();
      const auto* pb = b.const_data_ptr<b_t>();
      const auto* pz = zd.const_data_ptr<z_t>();
      const auto* ps = s.const_data_ptr<compute_t<z_t>>();
      auto* pd = sums.data_ptr<compute_t<z_t>>();
      if (columns) {
        reduce_and_scale_columns(pdz, pb, pz, ps, pd, S, b.size(0) / S, r, b.size(1));
      } else {
        reduce_and_scale_rows(pdz, pb, pz, ps, pd, S, count_rows(b) / S, r);
      }
    });
    dscale = sums.to(scale.scalar_type());
  } else if (need_dz) {
    dz = scaled(b, s, kept, in_place);
  }
  return {need_dz ? dz.to(type) : at::empty({0}, dy.options()), dscale};
}

TORCH_LIBRARY_IMPL(svdiff, CPU, m) {
  m.impl("expand", expand);
  m.impl("expand_backward", expand_backward);
}

}  // namespace svdiff
