#include <algorithm>
#include <array>
#include <cstring>

#include "model.h"
#include "runtime.h"

namespace axc {
namespace {

constexpr size_t kRowsPerItem = 8;
constexpr size_t kElementsPerItem = 8192;  // of a cast
constexpr size_t kSlack = 16;  // numbers behind those of activations: kernels read whole vectors

// How the rows of weights are handed out: so many items that a thread that is held up leaves some to the others.
struct Grain {
  size_t items, step;  // for each thread; rows, of which an item has a multiple
};
constexpr Grain kInPlace{16, 4}, kPacked{6, 32};  // floats in place are turned, 32 rows at a time, as if packed
constexpr size_t kGatedRows = 64;           // of a gate and its `up` that are computed before they are joined
constexpr size_t kAttentionRows = 112;      // query rows that share a pass over the keys
constexpr size_t kAttentionScratch = 8 << 20;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// The rows of weights, one weight's behind the other's, in items of about the same size. A gate and its `up` are
// partitioned alike, so that only the gate's count.
class Partition {
 public:
  Partition(const Linear& step, Grain grain, size_t threads)
      : parts_(step.parts), step_(grain.step), gated_(step.gated >= 0) {
    for (size_t i = 0; i < weights(); ++i) steps_ += steps_of(parts_[i]);
    items_ = std::min(steps_, grain.items * threads);
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
  Run(const Model& model, size_t tokens, size_t history, std::span<const Segment> segments,
      const std::vector<const void*>& inputs, const std::vector<void*>& outputs)
      : model_(model), tokens_(tokens), history_(history), segments_(segments), inputs_(inputs), outputs_(outputs),
        pool_(runtime_.pool()) {
    const Program& program = model.program;
    uint8_t* start = runtime_.values.reserve(program.bytes(tokens, history));
    runtime_.areas.resize(std::max(runtime_.areas.size(), program.areas.size()));
    for (size_t i = 0; i < program.areas.size(); ++i) {
      size_t units = 1;
      for (const Dim& part : program.areas[i].parts) units *= size_of(part);
      runtime_.areas[i] = {start, units};
      start += program.areas[i].width * units;
    }
    runtime_.views.resize(std::max(runtime_.views.size(), program.most_tensors));
  }

  void all() {
    auto start = std::chrono::steady_clock::now();
    for (const Step& step : model_.program.steps) {
      std::visit([this](const auto& kind) { (*this)(kind); }, step);
      const auto end = std::chrono::steady_clock::now();
      Counter& counter = runtime_.counters[counter_of(step)];
      ++counter.calls;
      counter.nanoseconds += static_cast<uint64_t>(std::chrono::nanoseconds(end - start).count());
      start = end;
    }
  }

 private:
  const Value& value(int index) const { return model_.graph.values[index]; }
  size_t size_of(const Dim& dim) const { return static_cast<size_t>(dim.at(tokens_, history_)); }
  size_t counter_of(const Step& step) const {
    const Plain* plain = std::get_if<Plain>(&step);
    if (!plain) return step.index();
    return std::size(kFusedNames) + static_cast<size_t>(model_.graph.operations[plain->operation].op - operators().data());
  }

  uint8_t* address(int index) const {
    index = model_.program.stands_for[index];
    const Value& seen = value(index);
    if (seen.tensor) return const_cast<uint8_t*>(seen.tensor->bytes());
    if (seen.input >= 0) return static_cast<uint8_t*>(const_cast<void*>(inputs_[seen.input]));
    if (seen.output >= 0 && outputs_[seen.output]) return static_cast<uint8_t*>(outputs_[seen.output]);
    const Slot& slot = model_.program.slots[index];
    return runtime_.areas[slot.area].start + slot.offset * runtime_.areas[slot.area].units;
  }
  float* floats(int index) const { return reinterpret_cast<float*>(address(index)); }
  View view(int index) const {
    View view;
    if (index < 0) return view;
    const Value& seen = value(index);
    view.type = seen.type, view.data = address(index), view.rank = seen.shape.size();
    for (size_t i = 0; i < view.rank; ++i) view.dims[i] = size_of(seen.shape[i]);
    return view;
  }
  View view(const Operand& operand) const {
    View view;
    view.type = operand.type, view.rank = operand.rank;
    for (size_t i = 0; i < view.rank; ++i) view.dims[i] = size_of(operand.dims[i]);
    if (operand.constant) {
      view.data = const_cast<uint8_t*>(operand.constant);
    } else if (operand.input >= 0) {
      view.data = static_cast<uint8_t*>(const_cast<void*>(inputs_[operand.input]));
    } else if (operand.output >= 0 && outputs_[operand.output]) {
      view.data = static_cast<uint8_t*>(outputs_[operand.output]);
    } else {
      view.data = runtime_.areas[operand.slot.area].start + operand.slot.offset * runtime_.areas[operand.slot.area].units;
    }
    return view;
  }
  size_t product(int index) const {
    size_t product = 1;
    for (const Dim& dim : value(index).shape) product *= size_of(dim);
    return product;
  }
  // Rows of a tensor: all dimensions but the last.
  size_t rows(int index) const {
    size_t rows = 1;
    const Shape& shape = value(index).shape;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= size_of(shape[i]);
    return rows;
  }

  // Memory of each thread's own, at least `bytes`.
  void reserve_scratch(size_t bytes) {
    scratch_bytes_ = (bytes + 63) / 64 * 64;
    scratch_ = runtime_.scratch.reserve(scratch_bytes_ * pool_.size());
  }
  uint8_t* scratch(size_t thread) const { return scratch_ + thread * scratch_bytes_; }

  // Weights of a norm have been driven from the caches by the matrices of the other layers.
  static void prefetch(const float* from, size_t count) {
    for (size_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
  }

  template <class Body>
  void each_row(size_t rows, const Body& body) {
    pool_.each(ceil_div(rows, kRowsPerItem), [&](size_t item, size_t thread) {
      const size_t last = std::min(rows, (item + 1) * kRowsPerItem);
      for (size_t row = item * kRowsPerItem; row < last; ++row) body(row, thread);
    });
  }

  void operator()(const Plain& s) {
    const Operation& operation = model_.graph.operations[s.operation];
    const size_t inputs = operation.inputs.size(), outputs = operation.outputs.size();
    const std::span<const Operand> operands(&model_.program.operands[s.first], inputs + outputs);
    const auto unread = [&](const Operand& operand) {  // an output that was not asked for
      return operand.type == Type::None || (operand.unread && !outputs_[operand.output]);
    };
    const auto made = operands.subspan(inputs);
    if (std::all_of(made.begin(), made.end(), unread)) return;
    for (size_t i = 0; i < operands.size(); ++i) runtime_.views[i] = view(operands[i]);
    const std::span<const View> views(runtime_.views.data(), operands.size());
    operation.op->run({model_.graph, operation, tokens_, history_, views.first(inputs), views.subspan(inputs), kernels_, pool_,
                       runtime_.scratch});
  }

  void operator()(const Linear& s) {
    const Matrix& any = s.parts[0].weight;
    const size_t count = rows(s.x);
    const bool grouped = any.arithmetic == Arithmetic::Int4 || any.arithmetic == Arithmetic::Int8Blocks;
    Activations levels{model_.precision, count, any.columns, grouped ? any.block : kBlock, nullptr, nullptr, nullptr, nullptr};
    if (rounds(any.arithmetic)) {
      const size_t entries = levels.blocks() * count, groups = entries * levels.groups();
      const bool zeros = std::any_of(s.parts.begin(), s.parts.end(), [](const Part& part) { return part.weight.zeros; });
      levels.levels = runtime_.levels.reserve(entries * kLevelBytes + (groups + kSlack) * (2 * sizeof(float) + sizeof(int32_t)));
      levels.scales = reinterpret_cast<float*>(levels.levels + entries * kLevelBytes);
      levels.sums = reinterpret_cast<int32_t*>(levels.scales + groups + kSlack);
      levels.totals = zeros ? reinterpret_cast<float*>(levels.sums + groups + kSlack) : nullptr;
      each_row(count, [&](size_t row, size_t) { kernels_.quantise(floats(s.x), any.arithmetic, row, row + 1, levels); });
    }
    if (count) s.gated < 0 ? linear(s, count, levels) : gated_linear(s, count, levels);
  }

  // Whether activations are rounded before they are multiplied.
  bool rounds(Arithmetic arithmetic) const {
    if (arithmetic == Arithmetic::BFloat16) return kernels_.rounds_bfloat16;
    return arithmetic != Arithmetic::Float;
  }

  void linear(const Linear& s, size_t count, const Activations& levels) {
    const Partition partition(s, grain(s, count), pool_.size());
    reserve_scratch(kLinearScratch);
    pool_.each(partition.items(), [&](size_t item, size_t thread) {
      partition.each(item, [&](const Part& part, size_t first, size_t last) {
        const float* residual = part.residual < 0 ? nullptr : floats(part.residual);
        const LinearJob job{&part.weight, count, floats(s.x), &levels, part.bias, residual, floats(part.to),
                            part.weight.rows, 0, &part.weight, last};
        kernels_.linear(job, first, last, scratch(thread));
      });
    });
  }

  // Gate and up go no further than the thread's cache.
  void gated_linear(const Linear& s, size_t count, const Activations& levels) {
    const Partition partition(s, grain(s, count), pool_.size());
    const size_t width = s.parts[0].weight.rows;
    const size_t strip = count <= kTokensByDot ? ceil_div(width, partition.items()) + grain(s, count).step : kGatedRows;
    reserve_scratch(kLinearScratch + 2 * count * strip * sizeof(float));
    pool_.each(partition.items(), [&](size_t item, size_t thread) {
      uint8_t* own = scratch(thread);
      float* gate = reinterpret_cast<float*>(own + kLinearScratch);
      float* up = gate + count * strip;
      partition.each(item, [&](const Part&, size_t begin, size_t end) {
        for (size_t first = begin; first < end; first += strip) {
          const size_t last = std::min(first + strip, end);
          const Part &a = s.parts[0], &b = s.parts[1];
          kernels_.linear({&a.weight, count, floats(s.x), &levels, a.bias, nullptr, gate, strip, first, &b.weight, first},
                          first, last, own);
          kernels_.linear({&b.weight, count, floats(s.x), &levels, b.bias, nullptr, up, strip, first, &a.weight, last},
                          first, last, own);
          for (size_t row = 0; row < count; ++row) {
            float* to = floats(s.gated) + row * width + first;
            kernels_.gated(s.activation, gate + row * strip, up + row * strip, last - first, to);
          }
        }
      });
    });
  }

  static Grain grain(const Linear& s, size_t rows) {
    const Arithmetic arithmetic = s.parts[0].weight.arithmetic;
    const bool floats = arithmetic == Arithmetic::Float || arithmetic == Arithmetic::BFloat16;
    return rows <= kTokensByDot && !floats ? kInPlace : kPacked;
  }

  uint64_t position(const Angles& at, size_t token) const {
    if (at.positions < 0) return token;
    uint64_t position = 0;
    const size_t bytes = value(at.positions).type == Type::Uint32 ? 4 : 8;
    std::memcpy(&position, address(at.positions) + bytes * token, bytes);
    return position;
  }

  // Checks the positions, and adds the parts of angles: once for queries and keys.
  void add_parts(const Angles& at, size_t tokens, size_t half) {
    if (at.positions < 0 || (turned_ && *turned_ == at)) return;
    for (size_t token = 0; token < tokens; ++token) check_position(position(at, token), at.reach);
    turned_ = &at;
    if (!at.divisor) return;
    float* rows = reinterpret_cast<float*>(runtime_.turns.reserve(2 * tokens * half * sizeof(float)));
    const Turns high = tables(at.cos, at.sin), low = tables(at.cos_low, at.sin_low);
    each_row(tokens, [&](size_t token, size_t) {
      const uint64_t whole = position(at, token);
      float* row = rows + 2 * token * half;
      add_angles(high.row(whole / at.divisor, half), low.row(whole % at.divisor, half), half, row, row + half);
    });
  }
  Turns tables(int cos, int sin) const { return {floats(cos), floats(sin)}; }

  void operator()(const Rotary& s) {
    const Rotation& rotation = s.rotation;
    const size_t head = rotation.head_dim, width = rotation.heads * head, half = rotation.half, count = rows(s.to);
    add_parts(s.angles, count, half);
    const View to = view(s.to);
    const float *x = floats(s.x), *sums = s.angles.divisor ? reinterpret_cast<const float*>(runtime_.turns.get()) : nullptr;
    const Turns given = tables(s.angles.cos, s.angles.sin);
    reserve_scratch(2 * width * sizeof(float));
    each_row(count, [&](size_t row, size_t thread) {
      float *normed = reinterpret_cast<float*>(scratch(thread)), *turned = normed + width;
      const float* from = x + row * width;
      const Turns turns = sums ? Turns{sums + 2 * row * half, sums + (2 * row + 1) * half}
                               : given.row(position(s.angles, row), half);
      if (s.norm.scale) {
        for (size_t i = 0; i < width; i += head) kernels_.rms_norm(from + i, s.norm.scale, s.norm.epsilon, head, normed + i);
        from = normed;
      }
      float* wide = to.type == Type::Float ? to.floats() + row * width : turned;
      rotate(kernels_, rotation, from, turns.cos, turns.sin, wide);
      if (wide == turned) kernels_.narrow(to.type, turned, width, to.data + row * width * to.element());
    });
  }

  void operator()(const Norm& s) {
    const size_t count = product(s.to) / s.width;
    const float *x = floats(s.x), *residual = s.residual < 0 ? nullptr : floats(s.residual);
    float* to = floats(s.to);
    prefetch(s.scaling.scale, s.width);
    each_row(count, [&](size_t row, size_t) {
      const size_t at = row * s.width;
      kernels_.rms_norm(x + at, s.scaling.scale, s.scaling.epsilon, s.width, to + at);
      for (size_t i = 0; residual && i < s.width; ++i) to[at + i] += residual[at + i];
    });
  }

  void operator()(const Convert& s) {
    const View x = view(s.x), to = view(s.to);
    const Value& made = value(s.to);
    if (made.output >= 0 && !outputs_[made.output] && made.users.empty()) return;
    const size_t count = to.count();
    const bool through = x.type != Type::Float && to.type != Type::Float;
    if (through) reserve_scratch(kElementsPerItem * sizeof(float));
    pool_.each(ceil_div(count, kElementsPerItem), [&](size_t item, size_t thread) {
      const size_t first = item * kElementsPerItem, number = std::min(kElementsPerItem, count - first);
      const uint8_t* from = x.data + first * x.element();
      uint8_t* target = to.data + first * to.element();
      float* wide = reinterpret_cast<float*>(through ? scratch(thread) : target);
      if (x.type != Type::Float) kernels_.widen(x.type, from, number, wide);
      if (to.type == Type::Float) return;
      kernels_.narrow(to.type, through ? wide : reinterpret_cast<const float*>(from), number, target);
    });
  }

  // The cached rows up to the last that the first token sees.
  size_t seen_before(Type type, const uint8_t* mask, size_t history) {
    constexpr size_t kStep = 64;
    const size_t element = static_cast<size_t>(bits_of(type)) / 8;
    std::array<float, kStep> biases;
    while (history) {
      const size_t first = (history - 1) / kStep * kStep;
      kernels_.widen(type, mask + first * element, history - first, biases.data());
      for (; history > first; --history) {
        if (biases[history - first - 1] > kMasked) return history;
      }
    }
    return 0;
  }

  void operator()(const Attention& s) {
    const size_t tokens = size_of(value(s.q).shape[1]);
    if (!tokens) return;
    const Segment only{tokens, size_of(value(s.k_cache).shape[1]), address(s.mask), address(s.k_cache), address(s.v_cache), false};
    const std::span<const Segment> segments = segments_.empty() ? std::span(&only, 1) : segments_;
    const Type type = value(s.k).type;
    const size_t group = s.heads / s.kv_heads, width = s.heads * s.head_dim;
    const size_t row = s.kv_heads * s.head_dim * static_cast<size_t>(bits_of(type)) / 8;
    const size_t splits = std::min(group, ceil_div(pool_.size(), s.kv_heads * tokens));
    const size_t heads = ceil_div(group, splits);
    size_t first_row = 0, scratch_bytes = 0, tile = std::max<size_t>(kAttentionRows / heads, 1);
    runtime_.jobs.clear();
    for (const Segment& of : segments) {
      const AttentionJob job{type, of.tokens, of.history, seen_before(type, of.mask, of.history), s.heads, s.kv_heads, s.head_dim,
                             s.scale, s.softcap, floats(s.q) + first_row * width, of.k_cache, of.v_cache,
                             address(s.k) + first_row * row, address(s.v) + first_row * row, of.mask,
                             floats(s.to) + first_row * width};
      while (tile > 1 && kernels_.attention_scratch(job, tile * heads) > kAttentionScratch) tile /= 2;
      runtime_.jobs.push_back(job);
      first_row += of.tokens;
    }
    size_t tiles = 0;
    for (const AttentionJob& job : runtime_.jobs) {
      scratch_bytes = std::max(scratch_bytes, kernels_.attention_scratch(job, std::min(tile, job.tokens) * heads));
      tiles += ceil_div(job.tokens, tile);
    }
    reserve_scratch(scratch_bytes);
    pool_.each(s.kv_heads * splits * tiles, [&](size_t item, size_t thread) {
      const size_t part = item / tiles, kv_head = part / splits;
      const size_t first_head = kv_head * group + part % splits * heads;
      const size_t last_head = std::min(first_head + heads, (kv_head + 1) * group);
      if (first_head >= last_head) return;
      size_t at = item % tiles;
      const AttentionJob* job = runtime_.jobs.data();
      for (size_t own; at >= (own = ceil_div(job->tokens, tile)); ++job) at -= own;
      const size_t first = at * tile;
      kernels_.attend(*job, {kv_head, first_head, last_head, first, std::min(first + tile, job->tokens)}, scratch(thread));
    });
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& of = segments[i];
      if (!of.keeps) continue;
      std::memcpy(of.k_cache + of.history * row, runtime_.jobs[i].k_current, of.tokens * row);
      std::memcpy(of.v_cache + of.history * row, runtime_.jobs[i].v_current, of.tokens * row);
    }
  }

  void operator()(const Gated& s) {
    const View to = view(s.to);
    const size_t count = rows(s.to), width = to.rank ? to.dims[to.rank - 1] : 1;
    each_row(count, [&](size_t row, size_t) {
      kernels_.gated(s.activation, floats(s.gate) + row * width, floats(s.up) + row * width, width, floats(s.to) + row * width);
    });
  }

  Runtime& runtime_ = Runtime::instance();
  const Kernels& kernels_ = kernels();
  const Model& model_;
  size_t tokens_, history_;
  const std::span<const Segment> segments_;  // none: one sequence, in the inputs
  const std::vector<const void*>& inputs_;
  const std::vector<void*>& outputs_;
  Pool& pool_;
  uint8_t* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
  const Angles* turned_ = nullptr;  // whose sums are in the runtime's `turns`
};

}  // namespace

void run(const Model& model, size_t tokens, size_t history, const std::vector<const void*>& inputs,
         const std::vector<void*>& outputs) {
  const std::scoped_lock lock(Runtime::instance().mutex);
  Run(model, tokens, history, {}, inputs, outputs).all();
}

void run(const Model& model, std::span<const Segment> segments, const std::vector<const void*>& inputs,
         const std::vector<void*>& outputs) {
  size_t tokens = 0;
  for (const Segment& segment : segments) tokens += segment.tokens;
  const std::scoped_lock lock(Runtime::instance().mutex);
  Run(model, tokens, 0, segments, inputs, outputs).all();
}

}  // namespace axc
