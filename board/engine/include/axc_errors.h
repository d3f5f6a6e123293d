// The vendor's error codes: 0x80000000 | module << 16 | error.
#pragma once

enum {
  AXC_OK = 0,
  AXC_ENGINE_ILLEGAL = (int)0x8006000A,      // an invalid parameter or model
  AXC_ENGINE_NULL = (int)0x8006000B,         // a null pointer
  AXC_ENGINE_NOT_READY = (int)0x80060010,    // AX_SYS_Init was not called
  AXC_ENGINE_NOT_INIT = (int)0x80060012,     // AX_ENGINE_Init was not called
  AXC_ENGINE_UNSUPPORTED = (int)0x80060014,  // a model this engine cannot run
  AXC_ENGINE_MISSING = (int)0x80060017,      // a handle, context, group or file that does not exist
  AXC_ENGINE_NO_MEMORY = (int)0x80060018,
  AXC_ENGINE_UNKNOWN = (int)0x80060029,
  AXC_ENGINE_NOT_FINITE = (int)0x80060080,   // from axc_run: an output holds an infinity or a NaN
  AXC_SYS_ILLEGAL = (int)0x800B000A,
  AXC_SYS_NULL = (int)0x800B000B,
  AXC_SYS_NOT_READY = (int)0x800B0010,  // AX_SYS_Init was not called
  AXC_SYS_NO_MEMORY = (int)0x800B0018,
  AXC_SYS_UNMAP = (int)0x800B0081,
  AXC_SYS_FREE = (int)0x800B0082,
};
