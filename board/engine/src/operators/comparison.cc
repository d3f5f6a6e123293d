// Comparisons, logic and Where, with broadcasting.
#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

template <class Number, class Function>
void compare(const Call& call, Function holds) {
  const View &a = call.in[0], &b = call.in[1], &y = call.out[0];
  const Walk<2> walk(y, {&a, &b});
  walk.each(call, [&](size_t first, const auto& offsets, size_t count) {
    Number left[kRun], right[kRun];
    const Number* p = load_run(call.kernels, a, offsets[0], walk.stride(0), count, left);
    const Number* q = load_run(call.kernels, b, offsets[1], walk.stride(1), count, right);
    for (size_t i = 0; i < count; ++i) y.data[first + i] = holds(p[i], q[i]);
  });
}

template <class Function>
void compare_any(const Call& call, Function holds) {
  is_float(call.in[0].type) ? compare<float>(call, holds) : compare<int64_t>(call, holds);
}

void infer_two(Infer& infer, bool fits) {
  infer.expect(fits && infer.type(0) == infer.type(1), "types " + name_of(infer.type(0)) + " and " + name_of(infer.type(1)));
  infer.out(Type::Bool, broadcast(infer, infer.shape(0), infer.shape(1)));
}

}  // namespace

void infer_comparison(Infer& infer) {
  const Type type = infer.type(0);
  infer_two(infer, is_float(type) || is_integer(type) || (type == Type::Bool && infer.operation.is("Equal")));
}

void infer_logic(Infer& infer) { infer_two(infer, infer.type(0) == Type::Bool); }

void infer_where(Infer& infer) {
  infer.expect(infer.type(0) == Type::Bool && infer.type(1) == infer.type(2) && bits_of(infer.type(1)) >= 8, "types");
  infer.out(infer.type(1), broadcast(infer, broadcast(infer, infer.shape(0), infer.shape(1)), infer.shape(2)));
}

void run_equal(const Call& call) { compare_any(call, [](auto a, auto b) { return a == b; }); }
void run_less(const Call& call) { compare_any(call, [](auto a, auto b) { return a < b; }); }
void run_less_or_equal(const Call& call) { compare_any(call, [](auto a, auto b) { return a <= b; }); }
void run_greater(const Call& call) { compare_any(call, [](auto a, auto b) { return a > b; }); }
void run_greater_or_equal(const Call& call) { compare_any(call, [](auto a, auto b) { return a >= b; }); }
void run_and(const Call& call) { compare<int64_t>(call, [](auto a, auto b) { return a && b; }); }
void run_or(const Call& call) { compare<int64_t>(call, [](auto a, auto b) { return a || b; }); }

void run_where(const Call& call) {
  const View &condition = call.in[0], &a = call.in[1], &b = call.in[2], &y = call.out[0];
  const Walk<3> walk(y, {&condition, &a, &b});
  const size_t element = y.element();
  walk.each(call, [&](size_t first, const auto& offsets, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      const bool chosen = condition.data[offsets[0] + i * walk.stride(0)];
      const size_t from = chosen ? offsets[1] + i * walk.stride(1) : offsets[2] + i * walk.stride(2);
      std::memcpy(y.data + (first + i) * element, (chosen ? a : b).data + from * element, element);
    }
  });
}

}  // namespace axc
