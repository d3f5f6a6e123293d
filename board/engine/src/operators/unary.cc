// Element-wise operators with one input. Functions without a vector kernel are computed in float64 and rounded, so that
// they do not depend on the C library's float32 functions.
#include <cmath>
#include <limits>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

// Calls body(from, count, to) for each run.
template <class Number, class Body>
void runs(const Call& call, const Body& body) {
  const View &x = call.in[0], &y = call.out[0];
  const Walk<1> walk(y, {&x});
  walk.each(call, [&](size_t first, const auto&, size_t count) {
    Number buffer[kRun], made[kRun];
    const Number* from = load_run(call.kernels, x, first, 1, count, buffer);
    Number* to = made;
    if constexpr (std::is_same_v<Number, float>) {
      if (y.type == Type::Float) to = y.floats() + first;
    }
    body(from, count, to);
    store_run(call.kernels, y, first, count, to);
  });
}

template <class Number, class Function>
void each_number(const Call& call, Function f) {
  runs<Number>(call, [f](const Number* from, size_t count, Number* to) {
    for (size_t i = 0; i < count; ++i) to[i] = f(from[i]);
  });
}

template <class Function>
void each_float(const Call& call, Function f) {
  each_number<float>(call, f);
}

template <double (*kFunction)(double)>
void in_double(const Call& call) {
  each_float(call, [](float x) { return static_cast<float>(kFunction(static_cast<double>(x))); });
}

}  // namespace

void infer_number(Infer& infer) {
  infer.expect(is_float(infer.type(0)) || is_integer(infer.type(0)), "type " + name_of(infer.type(0)));
  infer.out(infer.type(0), infer.shape(0));
}

void infer_float(Infer& infer) {
  infer.expect(is_float(infer.type(0)), "type " + name_of(infer.type(0)));
  infer.out(infer.type(0), infer.shape(0));
}

void infer_not(Infer& infer) {
  infer.expect(infer.type(0) == Type::Bool, "type " + name_of(infer.type(0)));
  infer.out(Type::Bool, infer.shape(0));
}

void infer_gelu(Infer& infer) {
  const std::string_view kind = infer.operation.text("approximate", "none");
  infer.expect(kind == "none" || kind == "tanh", "approximate " + std::string(kind.substr(0, 20)));
  infer_float(infer);
}

void infer_clip(Infer& infer) {
  for (size_t i = 1; i < infer.inputs(); ++i) {
    if (!infer.has(i)) continue;
    infer.expect(infer.type(i) == infer.type(0) && infer.rank(i) == 0, "bounds that are no scalars of its type");
  }
  infer_number(infer);
}

void run_neg(const Call& call) {
  if (is_float(call.in[0].type)) return each_float(call, [](float x) { return -x; });
  each_number<int64_t>(call, [](int64_t x) { return static_cast<int64_t>(-static_cast<uint64_t>(x)); });
}

void run_abs(const Call& call) {
  if (is_float(call.in[0].type)) return each_float(call, [](float x) { return std::fabs(x); });
  each_number<int64_t>(call, [](int64_t x) { return x < 0 ? static_cast<int64_t>(-static_cast<uint64_t>(x)) : x; });
}

void run_relu(const Call& call) {
  if (is_float(call.in[0].type)) return each_float(call, [](float x) { return x < 0 ? 0.0f : x; });
  each_number<int64_t>(call, [](int64_t x) { return x < 0 ? int64_t{0} : x; });
}

void run_sqrt(const Call& call) {
  each_float(call, [](float x) { return std::sqrt(x); });
}
void run_reciprocal(const Call& call) {
  each_float(call, [](float x) { return 1.0f / x; });
}
void run_exp(const Call& call) { in_double<std::exp>(call); }
void run_log(const Call& call) { in_double<std::log>(call); }
void run_sin(const Call& call) { in_double<std::sin>(call); }
void run_cos(const Call& call) { in_double<std::cos>(call); }
void run_erf(const Call& call) { in_double<std::erf>(call); }

void run_tanh(const Call& call) {
  runs<float>(call, [&](const float* from, size_t count, float* to) { call.kernels.tanh(from, count, to); });
}

void run_sigmoid(const Call& call) {
  runs<float>(call, [&](const float* from, size_t count, float* to) { call.kernels.sigmoid(from, count, to); });
}

void run_gelu(const Call& call) {
  if (call.operation.text("approximate", "none") == "tanh") {
    return runs<float>(call, [&](const float* from, size_t count, float* to) { call.kernels.gelu_tanh(from, count, to); });
  }
  each_float(call, [](float x) {
    const double wide = static_cast<double>(x);
    return static_cast<float>(0.5 * wide * (1.0 + std::erf(wide * 0.70710678118654752)));
  });
}

void run_clip(const Call& call) {
  const auto bound = [&](size_t index, auto otherwise) {
    if (!call.has(index)) return otherwise;
    decltype(otherwise) buffer[kRun];
    return *load_run(call.kernels, call.in[index], 0, 1, 1, buffer);
  };
  const auto between = [](auto low, auto high) {
    return [low, high](auto x) {
      x = x < low ? low : x;
      return x > high ? high : x;
    };
  };
  if (is_float(call.in[0].type)) {
    const float most = std::numeric_limits<float>::infinity();
    return each_float(call, between(bound(1, -most), bound(2, most)));
  }
  each_number<int64_t>(call, between(bound(1, INT64_MIN), bound(2, INT64_MAX)));
}

void run_not(const Call& call) {
  each_number<int64_t>(call, [](int64_t x) { return int64_t{!x}; });
}

}  // namespace axc
