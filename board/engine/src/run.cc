#include <algorithm>
#include <numeric>

#include "model.h"
#include "runtime.h"

namespace axc {
namespace {

constexpr size_t kTokensPerItem = 8;

// How the rows of weights are handed out: so many items that a thread that is held up leaves its share to the others.
struct Cut {
  size_t items, step;  // for each thread; rows, of which an item has a multiple
};
constexpr Cut kInPlace{16, 4}, kPacked{6, 32};
constexpr size_t kGatedRows = 64;           // of a gate and its `up` that are computed before they are joined
constexpr size_t kAttentionRows = 112;      // query rows that share a pass over the keys
constexpr size_t kAttentionScratch = 8 << 20;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// The rows of weights, one weight's behind the other's, cut into items of about the same size. A gate and its `up` are
// cut alike, so that only the gate's count.
class Shares {
 public:
  Shares(const Project& step, Cut cut, size_t threads) : parts_(step.parts), step_(cut.step), gated_(step.gated >= 0) {
    for (size_t i = 0; i < weights(); ++i) steps_ += steps_of(parts_[i]);
    items_ = std::min(steps_, cut.items * threads);
  }

  size_t items() const { return items_; }

  // Calls body(part, first row, last row) for what an item has of each weight.
  template <class Body>
  void each(size_t item, const Body& body) const {
    size_t first = steps_ * item / items_, end = steps_ * (item + 1) / items_;
    for (size_t i = 0; i < weights() && end; ++i) {
      const size_t steps = steps_of(parts_[i]), rows = parts_[i].weight.rows;
      if (first < steps) body(parts_[i], first * step_, std::min(end * step_, rows));
      first -= std::min(first, steps);
      end -= std::min(end, steps);
    }
  }

 private:
  size_t weights() const { return gated_ ? 1 : parts_.size(); }
  size_t steps_of(const Part& part) const { return ceil_div(part.weight.rows, step_); }

  const std::vector<Part>& parts_;
  size_t step_, steps_ = 0, items_ = 0;
  bool gated_;
};

class Run {
 public:
  Run(const Model& model, size_t tokens, size_t history, const std::vector<const void*>& inputs,
      const std::vector<void*>& outputs)
      : model_(model), tokens_(tokens), history_(history), inputs_(inputs), outputs_(outputs),
        pool_(runtime_.pool()) {
    workspace_ = runtime_.values.reserve(model.program.bytes_per_token * tokens);
    check_positions();
  }

  void all() {
    for (const Step& step : model_.program.steps) {
      const auto start = std::chrono::steady_clock::now();
      std::visit([this](const auto& kind) { (*this)(kind); }, step);
      const auto took = std::chrono::steady_clock::now() - start;
      Counter& counter = runtime_.counters[step.index()];
      ++counter.calls;
      counter.nanoseconds += static_cast<uint64_t>(std::chrono::nanoseconds(took).count());
    }
  }

 private:
  const Value& value(int index) const { return model_.graph.values[index]; }
  size_t width(int index) const { return value(index).width(); }

  uint8_t* address(int index) const {
    index = model_.program.stands_for[index];
    const Value& seen = value(index);
    if (seen.input >= 0) return static_cast<uint8_t*>(const_cast<void*>(inputs_[seen.input]));
    if (seen.output >= 0 && outputs_[seen.output]) return static_cast<uint8_t*>(outputs_[seen.output]);
    return workspace_ + model_.program.slots[index].offset * tokens_;
  }
  float* floats(int index) const { return reinterpret_cast<float*>(address(index)); }
  uint8_t* row(int index, size_t token) const {
    return address(index) + token * width(index) * static_cast<size_t>(bits_of(value(index).type)) / 8;
  }

  // The tables are read only where a token's position lies inside them.
  void check_positions() const {
    for (const Step& step : model_.program.steps) {
      const Rotate* rotate = std::get_if<Rotate>(&step);
      if (!rotate) continue;
      for (size_t token = 0; token < tokens_; ++token) {
        if (position(*rotate, token) >= rotate->positions) {
          illegal("position " + std::to_string(position(*rotate, token)) + " is outside the " +
                  std::to_string(rotate->positions) + " of the rotary tables");
        }
      }
    }
  }
  uint32_t position(const Rotate& step, size_t token) const {
    uint32_t number = 0;
    std::memcpy(&number, address(step.indices) + 4 * token, sizeof number);
    return number;
  }

  // Memory of each thread's own, at least `bytes`.
  void reserve_scratch(size_t bytes) {
    scratch_bytes_ = (bytes + 63) / 64 * 64;
    scratch_ = runtime_.scratch.reserve(scratch_bytes_ * pool_.size());
  }
  uint8_t* scratch(size_t thread) const { return scratch_ + thread * scratch_bytes_; }

  template <class Body>
  void each_token(const Body& body) {
    pool_.each(ceil_div(tokens_, kTokensPerItem), [&](size_t item, size_t thread) {
      const size_t last = std::min(tokens_, (item + 1) * kTokensPerItem);
      for (size_t token = item * kTokensPerItem; token < last; ++token) body(token, thread);
    });
  }

  void operator()(const Convert& s) {
    if (model_.program.stands_for[s.x] == model_.program.stands_for[s.to]) return;
    const Value& to = value(s.to);
    if (to.output >= 0 && !outputs_[to.output] && to.users.empty()) return;
    const Type from = value(s.x).type;
    if (from != Type::Float && to.type != Type::Float) {
      reserve_scratch(width(s.x) * sizeof(float));
      return each_token([&](size_t token, size_t thread) {
        float* wide = reinterpret_cast<float*>(scratch(thread));
        kernels_.widen(from, row(s.x, token), width(s.x), wide);
        kernels_.narrow(to.type, wide, width(s.x), row(s.to, token));
      });
    }
    each_token([&](size_t token, size_t) {
      if (from == Type::Float) {
        kernels_.narrow(to.type, reinterpret_cast<float*>(row(s.x, token)), width(s.x), row(s.to, token));
      } else {
        kernels_.widen(from, row(s.x, token), width(s.x), reinterpret_cast<float*>(row(s.to, token)));
      }
    });
  }

  void operator()(const Norm& s) {
    each_token([&](size_t token, size_t) {
      kernels_.rms_norm(floats(s.x) + token * width(s.x), s.scale, s.epsilon, width(s.x), floats(s.to) + token * width(s.x));
    });
  }

  void operator()(const Project& s) {
    const Matrix& any = s.parts[0].weight;
    Activations levels{model_.precision, tokens_, any.columns, nullptr, nullptr, nullptr};
    if (rounds(any.arithmetic)) {
      const size_t entries = levels.blocks() * tokens_;
      levels.levels = runtime_.levels.reserve(entries * (kLevelBytes + sizeof(float) + sizeof(int32_t)));
      levels.scales = reinterpret_cast<float*>(levels.levels + entries * kLevelBytes);
      levels.sums = reinterpret_cast<int32_t*>(levels.scales + entries);
      each_token([&](size_t token, size_t) { kernels_.quantise(floats(s.x), any.arithmetic, token, token + 1, levels); });
    }
    s.gated < 0 ? project(s, levels) : project_gated(s, levels);
  }

  // Whether activations are rounded before they are multiplied.
  bool rounds(Arithmetic arithmetic) const {
    if (arithmetic == Arithmetic::BFloat16) return kernels_.rounds_bfloat16 && tokens_ > kTokensByDot;
    return arithmetic != Arithmetic::Float;
  }

  void project(const Project& s, const Activations& levels) {
    const Shares shares(s, cut(), pool_.size());
    reserve_scratch(kLinearScratch);
    pool_.each(shares.items(), [&](size_t item, size_t thread) {
      shares.each(item, [&](const Part& part, size_t first, size_t last) {
        const float* residual = part.residual < 0 ? nullptr : floats(part.residual);
        const LinearJob job{&part.weight, tokens_, floats(s.x), &levels, part.bias, residual, floats(part.to),
                            part.weight.rows, 0, &part.weight, last};
        kernels_.linear(job, first, last, scratch(thread));
      });
    });
  }

  // Gate and up go no further than the thread's cache.
  void project_gated(const Project& s, const Activations& levels) {
    const Shares shares(s, cut(), pool_.size());
    const size_t rows = s.parts[0].weight.rows;
    const size_t strip = tokens_ <= kTokensByDot ? ceil_div(rows, shares.items()) + cut().step : kGatedRows;
    reserve_scratch(kLinearScratch + 2 * tokens_ * strip * sizeof(float));
    pool_.each(shares.items(), [&](size_t item, size_t thread) {
      uint8_t* own = scratch(thread);
      float* gate = reinterpret_cast<float*>(own + kLinearScratch);
      float* up = gate + tokens_ * strip;
      shares.each(item, [&](const Part&, size_t begin, size_t end) {
        for (size_t first = begin; first < end; first += strip) {
          const size_t last = std::min(first + strip, end);
          const Part &a = s.parts[0], &b = s.parts[1];
          kernels_.linear({&a.weight, tokens_, floats(s.x), &levels, a.bias, nullptr, gate, strip, first, &b.weight, first},
                          first, last, own);
          kernels_.linear({&b.weight, tokens_, floats(s.x), &levels, b.bias, nullptr, up, strip, first, &a.weight, last},
                          first, last, own);
          for (size_t token = 0; token < tokens_; ++token) {
            kernels_.swiglu(gate + token * strip, up + token * strip, last - first, floats(s.gated) + token * rows + first);
          }
        }
      });
    });
  }

  Cut cut() const { return tokens_ <= kTokensByDot ? kInPlace : kPacked; }

  void operator()(const Rotate& s) {
    const size_t count = 2 * s.heads * s.half;
    const Type type = value(s.to).type;
    reserve_scratch(count * sizeof(float));
    each_token([&](size_t token, size_t thread) {
      const size_t table = position(s, token) * s.half;
      const float* x = floats(s.x) + token * count;
      if (type == Type::Float) {
        kernels_.rotate(x, s.cos + table, s.sin + table, s.heads, s.half, floats(s.to) + token * count);
      } else {
        float* wide = reinterpret_cast<float*>(scratch(thread));
        kernels_.rotate(x, s.cos + table, s.sin + table, s.heads, s.half, wide);
        kernels_.narrow(type, wide, count, row(s.to, token));
      }
    });
  }

  void operator()(const Attend& s) {
    const AttentionJob job{value(s.k).type, tokens_, history_, s.heads, s.kv_heads, s.head_dim, s.scale, floats(s.q),
                           address(s.k_cache), address(s.v_cache), address(s.k), address(s.v), address(s.mask), floats(s.to)};
    const size_t group = s.heads / s.kv_heads;
    const size_t splits = std::min(group, ceil_div(pool_.size(), s.kv_heads * tokens_));
    const size_t heads = ceil_div(group, splits);
    size_t tile = std::max<size_t>(kAttentionRows / heads, 1);
    while (tile > 1 && kernels_.attention_scratch(job, tile * heads) > kAttentionScratch) tile /= 2;
    const size_t tiles = ceil_div(tokens_, tile);
    reserve_scratch(kernels_.attention_scratch(job, tile * heads));
    pool_.each(s.kv_heads * splits * tiles, [&](size_t item, size_t thread) {
      const size_t part = item / tiles, kv_head = part / splits;
      const size_t first_head = kv_head * group + part % splits * heads;
      const size_t last_head = std::min(first_head + heads, (kv_head + 1) * group);
      if (first_head >= last_head) return;
      const size_t first = item % tiles * tile;
      kernels_.attend(job, {kv_head, first_head, last_head, first, std::min(first + tile, tokens_)}, scratch(thread));
    });
  }

  void operator()(const Swiglu& s) {
    const size_t count = width(s.to);
    each_token([&](size_t token, size_t) {
      kernels_.swiglu(floats(s.gate) + token * count, floats(s.up) + token * count, count, floats(s.to) + token * count);
    });
  }

  void operator()(const Binary& s) {
    const size_t count = width(s.to);
    each_token([&](size_t token, size_t) {
      const float *a = floats(s.a) + token * count, *b = s.vector ? s.vector : floats(s.b) + token * count;
      float* to = floats(s.to) + token * count;
      for (size_t i = 0; i < count; ++i) to[i] = s.product ? a[i] * b[i] : a[i] + b[i];
    });
  }

  void operator()(const Unary& s) {
    const size_t count = width(s.to);
    each_token([&](size_t token, size_t) {
      (s.softmax ? kernels_.softmax : kernels_.sigmoid)(floats(s.x) + token * count, count, floats(s.to) + token * count);
    });
  }

  // Of equal values the one with the lower index comes first.
  void operator()(const TopK& s) {
    const size_t count = width(s.x);
    reserve_scratch(count * sizeof(int32_t));
    each_token([&](size_t token, size_t thread) {
      const float* x = floats(s.x) + token * count;
      int32_t* order = reinterpret_cast<int32_t*>(scratch(thread));
      std::iota(order, order + count, 0);
      const auto before = [x](int32_t a, int32_t b) {
        const bool a_nan = x[a] != x[a], b_nan = x[b] != x[b];  // a NaN comes last, so that the order is one
        if (a_nan || b_nan) return a_nan != b_nan ? b_nan : a < b;
        return x[a] != x[b] ? x[a] > x[b] : a < b;
      };
      std::partial_sort(order, order + s.k, order + count, before);
      for (size_t i = 0; i < s.k; ++i) floats(s.values)[token * s.k + i] = x[order[i]];
      if (s.indices >= 0) std::memcpy(row(s.indices, token), order, s.k * sizeof(int32_t));
    });
  }

  Runtime& runtime_ = Runtime::instance();
  const Kernels& kernels_ = kernels();
  const Model& model_;
  size_t tokens_, history_;
  const std::vector<const void*>& inputs_;
  const std::vector<void*>& outputs_;
  Pool& pool_;
  uint8_t* workspace_ = nullptr;
  uint8_t* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
};

}  // namespace

void run(const Model& model, size_t tokens, size_t history, const std::vector<const void*>& inputs,
         const std::vector<void*>& outputs) {
  const std::scoped_lock lock(Runtime::instance().mutex);
  Run(model, tokens, history, inputs, outputs).all();
}

}  // namespace axc
