// Element-wise arithmetic on two or more tensors with broadcasting. Integers wrap around; division by zero is an error.
#include <cmath>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

using Wrapping = uint64_t;

// y[i] = f(a[i], b[i])
template <class Number, class Function>
void pairs(const Call& call, const View& a, const View& b, const View& y, Function f) {
  const Walk<2> walk(y, {&a, &b});
  walk.each(call, [&](size_t first, const auto& offsets, size_t count) {
    Number left[kRun], right[kRun], made[kRun];
    const Number* p = load_run(call.kernels, a, offsets[0], walk.stride(0), count, left);
    const Number* q = load_run(call.kernels, b, offsets[1], walk.stride(1), count, right);
    Number* to = made;
    if constexpr (std::is_same_v<Number, float>) {
      if (y.type == Type::Float) to = y.floats() + first;
    }
    for (size_t i = 0; i < count; ++i) to[i] = f(p[i], q[i]);
    store_run(call.kernels, y, first, count, to);
  });
}

// Any number of tensors, evaluated from left to right.
template <class Floats, class Integers>
void fold(const Call& call, Floats floats, Integers integers) {
  const View& y = call.out[0];
  const auto one = [&](const View& a, const View& b) {
    if (is_float(y.type)) {
      pairs<float>(call, a, b, y, floats);
    } else {
      pairs<int64_t>(call, a, b, y, integers);
    }
  };
  one(call.in[0], call.in[call.in.size() > 1 ? 1 : 0]);
  for (size_t i = 2; i < call.in.size(); ++i) one(y, call.in[i]);
}

void refuse_zeros(const Call& call, const View& divisor) {
  if (is_float(divisor.type)) return;
  const size_t element = divisor.element();
  for (size_t i = 0; i < divisor.count(); ++i) {
    int64_t number = 0;
    std::memcpy(&number, divisor.data + i * element, element);
    if (!number) call.fail("an integer is divided by zero");
  }
}

int64_t power(int64_t base, int64_t exponent) {
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
  Wrapping product = 1, factor = static_cast<Wrapping>(base);
  for (; exponent; exponent >>= 1, factor *= factor) {
    if (exponent & 1) product *= factor;
  }
  return static_cast<int64_t>(product);
}

float remainder_of_floats(float a, float b) { return std::fmod(a, b); }

}  // namespace

void infer_arithmetic(Infer& infer) {
  Shape shape = infer.shape(0);
  for (size_t i = 0; i < infer.inputs(); ++i) {
    infer.expect(infer.has(i) && infer.type(i) == infer.type(0), "types");
    shape = broadcast(infer, shape, infer.shape(i));
  }
  infer.expect(is_float(infer.type(0)) || is_integer(infer.type(0)), "type " + name_of(infer.type(0)));
  infer.out(infer.type(0), shape);
}

void infer_power(Infer& infer) {
  const auto number = [](Type type) { return is_float(type) || is_integer(type); };
  infer.expect(number(infer.type(0)) && number(infer.type(1)), "types");
  infer.out(infer.type(0), broadcast(infer, infer.shape(0), infer.shape(1)));
}

void run_add(const Call& call) {
  fold(call, [](float a, float b) { return a + b; }, [](int64_t a, int64_t b) { return int64_t(Wrapping(a) + Wrapping(b)); });
}

void run_sub(const Call& call) {
  fold(call, [](float a, float b) { return a - b; }, [](int64_t a, int64_t b) { return int64_t(Wrapping(a) - Wrapping(b)); });
}

void run_mul(const Call& call) {
  fold(call, [](float a, float b) { return a * b; }, [](int64_t a, int64_t b) { return int64_t(Wrapping(a) * Wrapping(b)); });
}

void run_div(const Call& call) {
  refuse_zeros(call, call.in[1]);
  fold(call, [](float a, float b) { return a / b; },
       [](int64_t a, int64_t b) { return b == -1 ? int64_t(-Wrapping(a)) : a / b; });
}

// The remainder has the sign of the divisor; with fmod, of the dividend.
void run_mod(const Call& call) {
  refuse_zeros(call, call.in[1]);
  if (call.operation.integer("fmod", 0)) {
    return fold(call, remainder_of_floats, [](int64_t a, int64_t b) { return b == -1 ? 0 : a % b; });
  }
  const auto floored = [](float a, float b) {
    const float rest = std::fmod(a, b);
    return rest == 0 ? std::copysign(0.0f, b) : (rest < 0) != (b < 0) ? rest + b : rest;
  };
  fold(call, floored, [](int64_t a, int64_t b) {
    const int64_t rest = b == -1 ? 0 : a % b;
    return rest && (rest < 0) != (b < 0) ? rest + b : rest;
  });
}

void run_min(const Call& call) {  // NaN propagates
  fold(call, [](float a, float b) { return a != a || a < b ? a : b; }, [](int64_t a, int64_t b) { return a < b ? a : b; });
}

void run_max(const Call& call) {
  fold(call, [](float a, float b) { return a != a || a > b ? a : b; }, [](int64_t a, int64_t b) { return a > b ? a : b; });
}

// Base and exponent may be of different types.
void run_pow(const Call& call) {
  const View &base = call.in[0], &exponent = call.in[1], &y = call.out[0];
  if (!is_float(base.type) && !is_float(exponent.type)) return pairs<int64_t>(call, base, exponent, y, power);
  const Walk<2> walk(y, {&base, &exponent});
  const auto load = [&](const View& x, size_t offset, size_t stride, size_t count, double* to) {
    float floats[kRun];
    int64_t integers[kRun];
    if (is_float(x.type)) {
      const float* from = load_run(call.kernels, x, offset, stride, count, floats);
      for (size_t i = 0; i < count; ++i) to[i] = from[i];
    } else {
      const int64_t* from = load_run(call.kernels, x, offset, stride, count, integers);
      for (size_t i = 0; i < count; ++i) to[i] = static_cast<double>(from[i]);
    }
  };
  walk.each(call, [&](size_t first, const auto& offsets, size_t count) {
    double left[kRun], right[kRun];
    load(base, offsets[0], walk.stride(0), count, left);
    load(exponent, offsets[1], walk.stride(1), count, right);
    for (size_t i = 0; i < count; ++i) left[i] = std::pow(left[i], right[i]);
    if (is_float(y.type)) {
      float made[kRun];
      for (size_t i = 0; i < count; ++i) made[i] = static_cast<float>(left[i]);
      return store_run<float>(call.kernels, y, first, count, made);
    }
    int64_t made[kRun];
    for (size_t i = 0; i < count; ++i) {  // out of range becomes the lowest int64
      made[i] = left[i] > -9.2e18 && left[i] < 9.2e18 ? static_cast<int64_t>(left[i]) : INT64_MIN;
    }
    store_run<int64_t>(call.kernels, y, first, count, made);
  });
}

}  // namespace axc
