// Base types of the vendor's C interface, 64-bit Linux, written from their sizes.
#pragma once

typedef unsigned long long AX_U64;
typedef long long AX_S64;
typedef unsigned int AX_U32;
typedef int AX_S32;
typedef unsigned short AX_U16;
typedef short AX_S16;
typedef unsigned char AX_U8;
typedef signed char AX_S8;
typedef char AX_CHAR;
typedef void AX_VOID;
typedef float AX_F32;
typedef long AX_LONG;
typedef unsigned long AX_ULONG;
typedef unsigned long AX_ADDR;
typedef unsigned int AX_SIZE_T;  // 4 bytes, on 64-bit systems too

typedef enum { AX_FALSE = 0, AX_TRUE = 1 } AX_BOOL;
