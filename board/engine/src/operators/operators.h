// Type inference and plain kernels of all operators, registered in table.cc.
#pragma once

#include "operator.h"

namespace axc {

// arithmetic.cc, comparison.cc: two or more tensors, with broadcasting
void infer_arithmetic(Infer&);
void infer_power(Infer&);
void infer_comparison(Infer&);
void infer_logic(Infer&);
void infer_where(Infer&);
void run_add(const Call&);
void run_sub(const Call&);
void run_mul(const Call&);
void run_div(const Call&);
void run_mod(const Call&);
void run_pow(const Call&);
void run_min(const Call&);
void run_max(const Call&);
void run_equal(const Call&);
void run_less(const Call&);
void run_less_or_equal(const Call&);
void run_greater(const Call&);
void run_greater_or_equal(const Call&);
void run_and(const Call&);
void run_or(const Call&);
void run_where(const Call&);

// unary.cc
void infer_number(Infer&);  // any numeric type; the output has the type of the input
void infer_float(Infer&);
void infer_not(Infer&);
void infer_clip(Infer&);
void infer_gelu(Infer&);
void run_neg(const Call&);
void run_abs(const Call&);
void run_sqrt(const Call&);
void run_reciprocal(const Call&);
void run_exp(const Call&);
void run_log(const Call&);
void run_sin(const Call&);
void run_cos(const Call&);
void run_tanh(const Call&);
void run_erf(const Call&);
void run_sigmoid(const Call&);
void run_relu(const Call&);
void run_gelu(const Call&);
void run_clip(const Call&);
void run_not(const Call&);

// cast.cc
void infer_cast(Infer&);
void infer_dequantize(Infer&);
void run_cast(const Call&);
void run_dequantize(const Call&);

// views.cc: changes of shape
void infer_identity(Infer&);
void infer_reshape(Infer&);
void infer_squeeze(Infer&);
void infer_unsqueeze(Infer&);
void infer_shape(Infer&);
void run_shape(const Call&);

// movement.cc: moved elements
void infer_concat(Infer&);
void infer_expand(Infer&);
void infer_gather(Infer&);
void infer_slice(Infer&);
void infer_split(Infer&);
void infer_transpose(Infer&);
void run_concat(const Call&);
void run_expand(const Call&);
void run_gather(const Call&);
void run_slice(const Call&);
void run_split(const Call&);
void run_transpose(const Call&);

// normalization.cc
void infer_layer_norm(Infer&);
void infer_rms_norm(Infer&);
void infer_softmax(Infer&);
void run_layer_norm(const Call&);
void run_rms_norm(const Call&);
void run_softmax(const Call&);

// reduction.cc
void infer_reduce(Infer&);
void infer_top_k(Infer&);
void run_reduce_max(const Call&);
void run_reduce_min(const Call&);
void run_reduce_mean(const Call&);
void run_reduce_sum(const Call&);
void run_top_k(const Call&);

// matmul.cc, rotary.cc, attention.cc
void infer_matmul(Infer&);
void infer_rotary(Infer&);
void infer_attention(Infer&);
void run_matmul(const Call&);
void run_rotary(const Call&);
void run_attention(const Call&);

}  // namespace axc
