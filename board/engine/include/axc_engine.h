// What this engine offers beyond the vendor's interface.
#pragma once

#include "ax_engine_api.h"
#include "axc_errors.h"

#ifdef __cplusplus
extern "C" {
#endif

// Version of these extensions; a client refuses one it does not know.
#define AXC_EXTENSIONS 3
AX_U32 axc_extensions(void);

// The kernels in use: portable, avx2, avx512, avx512_bf16, avx512_pairs, neon or neon_dotprod. AXC_ISA in the environment
// forces one.
const char* axc_isa(void);

// What the last failed call of this thread saw, in one line; empty when it had nothing to say.
const char* axc_last_error(void);

// Loads a file by shared memory map: nothing is copied, and processes share the pages. The file must not shrink.
AX_S32 axc_open(AX_ENGINE_HANDLE* handle, const char* path);

// Threads of the process-wide pool, 1..1024, from the next run on; 0: one for each CPU this process may use.
AX_S32 axc_set_threads(AX_U32 threads);
AX_U32 axc_threads(void);

// Bits that activations are rounded to where they meet integer weights, from the next run on: 16, as every model begins,
// or 8, which is faster and less exact.
AX_S32 axc_set_activation_bits(AX_ENGINE_HANDLE handle, AX_U32 bits);

// Runs with any numbers of tokens and history, not only a group's. A null output is not delivered. Returns
// AXC_ENGINE_NOT_FINITE, with all outputs delivered, when one of them holds an infinity or a NaN.
AX_S32 axc_run(AX_ENGINE_HANDLE handle, AX_U32 tokens, AX_U32 history, AX_ENGINE_IO_T* io);

// After such a run, in the same thread: the first row that is not finite, and the index of the output that has it.
void axc_not_finite(AX_U32* output, AX_U32* row);

// Wall time of the steps of one kind in this process since the last reset.
typedef struct {
  const char* kind;
  AX_U64 calls;
  AX_U64 nanoseconds;
} axc_counter;

// Fills at most `capacity` counters and returns how many there are.
AX_U32 axc_counters(axc_counter* out, AX_U32 capacity);
void axc_reset_counters(void);

#ifdef __cplusplus
}
#endif
