// The table of operators.
#include "operators.h"

namespace axc {
namespace {

constexpr int kFloat = 1, kInt = 2, kString = 3, kInts = 7;  // AttributeProto.AttributeType
constexpr size_t kMany = 1024;                                // limit for operators with any number of inputs or outputs
constexpr AttributeRow kAxis{"axis", kInt}, kKeepDims{"keepdims", kInt}, kNoop{"noop_with_empty_axes", kInt};

// name, inputs at least and at most, outputs at most, type inference, plain kernel, attributes
constexpr Operator kOperators[] = {
    {"Abs", 1, 1, 1, infer_number, run_abs, {}},
    {"Add", 2, 2, 1, infer_arithmetic, run_add, {}},
    {"And", 2, 2, 1, infer_logic, run_and, {}},
    {"Attention", 3, 6, 4, infer_attention, run_attention,
     {{{"q_num_heads", kInt}, {"kv_num_heads", kInt}, {"scale", kFloat}, {"softcap", kFloat}, {"is_causal", kInt},
       {"qk_matmul_output_mode", kInt}, {"softmax_precision", kInt}}}},
    {"Cast", 1, 1, 1, infer_cast, run_cast, {{{"to", kInt}, {"saturate", kInt}}}},
    {"Clip", 1, 3, 1, infer_clip, run_clip, {}},
    {"Concat", 1, kMany, 1, infer_concat, run_concat, {{kAxis}}},
    {"Cos", 1, 1, 1, infer_float, run_cos, {}},
    {"DequantizeLinear", 2, 3, 1, infer_dequantize, run_dequantize, {{kAxis, {"block_size", kInt}, {"output_dtype", kInt}}}},
    {"Div", 2, 2, 1, infer_arithmetic, run_div, {}},
    {"Equal", 2, 2, 1, infer_comparison, run_equal, {}},
    {"Erf", 1, 1, 1, infer_float, run_erf, {}},
    {"Exp", 1, 1, 1, infer_float, run_exp, {}},
    {"Expand", 2, 2, 1, infer_expand, run_expand, {}},
    {"Gather", 2, 2, 1, infer_gather, run_gather, {{kAxis}}},
    {"Gelu", 1, 1, 1, infer_gelu, run_gelu, {{{"approximate", kString}}}},
    {"Greater", 2, 2, 1, infer_comparison, run_greater, {}},
    {"GreaterOrEqual", 2, 2, 1, infer_comparison, run_greater_or_equal, {}},
    {"Identity", 1, 1, 1, infer_identity, run_copy, {}},
    {"LayerNormalization", 2, 3, 3, infer_layer_norm, run_layer_norm, {{kAxis, {"epsilon", kFloat}, {"stash_type", kInt}}}},
    {"Less", 2, 2, 1, infer_comparison, run_less, {}},
    {"LessOrEqual", 2, 2, 1, infer_comparison, run_less_or_equal, {}},
    {"Log", 1, 1, 1, infer_float, run_log, {}},
    {"MatMul", 2, 2, 1, infer_matmul, run_matmul, {}},
    {"Max", 1, kMany, 1, infer_arithmetic, run_max, {}},
    {"Min", 1, kMany, 1, infer_arithmetic, run_min, {}},
    {"Mod", 2, 2, 1, infer_arithmetic, run_mod, {{{"fmod", kInt}}}},
    {"Mul", 2, 2, 1, infer_arithmetic, run_mul, {}},
    {"Neg", 1, 1, 1, infer_number, run_neg, {}},
    {"Not", 1, 1, 1, infer_not, run_not, {}},
    {"Or", 2, 2, 1, infer_logic, run_or, {}},
    {"Pow", 2, 2, 1, infer_power, run_pow, {}},
    {"RMSNormalization", 2, 2, 1, infer_rms_norm, run_rms_norm, {{kAxis, {"epsilon", kFloat}, {"stash_type", kInt}}}},
    {"Reciprocal", 1, 1, 1, infer_float, run_reciprocal, {}},
    {"ReduceMax", 1, 2, 1, infer_reduce, run_reduce_max, {{kKeepDims, kNoop}}},
    {"ReduceMean", 1, 2, 1, infer_reduce, run_reduce_mean, {{kKeepDims, kNoop}}},
    {"ReduceMin", 1, 2, 1, infer_reduce, run_reduce_min, {{kKeepDims, kNoop}}},
    {"ReduceSum", 1, 2, 1, infer_reduce, run_reduce_sum, {{kKeepDims, kNoop}}},
    {"Relu", 1, 1, 1, infer_number, run_relu, {}},
    {"Reshape", 2, 2, 1, infer_reshape, run_copy, {{{"allowzero", kInt}}}},
    {"RotaryEmbedding", 3, 4, 1, infer_rotary, run_rotary,
     {{{"num_heads", kInt}, {"interleaved", kInt}, {"rotary_embedding_dim", kInt}}}},
    {"Shape", 1, 1, 1, infer_shape, run_shape, {{{"start", kInt}, {"end", kInt}}}},
    {"Sigmoid", 1, 1, 1, infer_float, run_sigmoid, {}},
    {"Sin", 1, 1, 1, infer_float, run_sin, {}},
    {"Slice", 3, 5, 1, infer_slice, run_slice, {}},
    {"Softmax", 1, 1, 1, infer_softmax, run_softmax, {{kAxis}}},
    {"Split", 1, 2, kMany, infer_split, run_split, {{kAxis, {"num_outputs", kInt}}}},
    {"Sqrt", 1, 1, 1, infer_float, run_sqrt, {}},
    {"Squeeze", 1, 2, 1, infer_squeeze, run_copy, {}},
    {"Sub", 2, 2, 1, infer_arithmetic, run_sub, {}},
    {"Tanh", 1, 1, 1, infer_float, run_tanh, {}},
    {"TopK", 2, 2, 2, infer_top_k, run_top_k, {{kAxis, {"largest", kInt}, {"sorted", kInt}}}},
    {"Transpose", 1, 1, 1, infer_transpose, run_transpose, {{{"perm", kInts}}}},
    {"Unsqueeze", 2, 2, 1, infer_unsqueeze, run_copy, {}},
    {"Where", 3, 3, 1, infer_where, run_where, {}},
};

}  // namespace

std::span<const Operator> operators() { return kOperators; }

}  // namespace axc
