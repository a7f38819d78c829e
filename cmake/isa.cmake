# One object library for each ISA, all from the same sources.
#
#   FASTCONV_ISAS  those to build; scalar is always among them. Fewer than all are for the sanitizers, whose build takes minutes for
#                  each, and not for a package.

function(fastconv_add_isa target flags)
  add_library(fastconv_cpu_${target} OBJECT ${FASTCONV_CPU_SOURCES})
  target_include_directories(fastconv_cpu_${target} PRIVATE csrc)
  target_compile_definitions(fastconv_cpu_${target} PRIVATE FASTCONV_TARGET=${target})
  target_compile_features(fastconv_cpu_${target} PRIVATE cxx_std_20)
  # No -ffast-math: it links crtfastmath.o, which turns on flush-to-zero in the user's whole process. These are the safe parts of it.
  target_compile_options(
    fastconv_cpu_${target}
    PRIVATE $<IF:$<BOOL:${FASTCONV_SANITIZE}>,-O1,-O3>
            -Wall
            -Wextra
            -fno-exceptions
            -fno-rtti
            -fno-math-errno
            -fno-trapping-math
            -ffp-contract=fast
            -fno-threadsafe-statics
            ${flags})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC 12's avx512fintrin.h warns about its own _mm512_undefined_ps.
    target_compile_options(fastconv_cpu_${target} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  # Read once for each ISA and not by each of its files, most of which compile in a second.
  target_precompile_headers(fastconv_cpu_${target} PRIVATE csrc/cpu/simd/vec.h csrc/core/kernel.h)
  target_sources(fastconv_kernels PRIVATE $<TARGET_OBJECTS:fastconv_cpu_${target}>)
endfunction()

set(FASTCONV_ISAS "scalar;avx2;avx512" CACHE STRING "Instruction sets to build for, on x86-64")
set(FASTCONV_ISA_DEFINITIONS "")

fastconv_add_isa(scalar "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  if("avx2" IN_LIST FASTCONV_ISAS)
    fastconv_add_isa(avx2 "-march=x86-64-v3")
    list(APPEND FASTCONV_ISA_DEFINITIONS FASTCONV_AVX2)
  endif()
  if("avx512" IN_LIST FASTCONV_ISAS)
    # GCC and clang prefer 256-bit vectors by default because early Skylake lowered its clock for 512-bit ones.
    fastconv_add_isa(avx512 "-march=x86-64-v4;-mprefer-vector-width=512")
    list(APPEND FASTCONV_ISA_DEFINITIONS FASTCONV_AVX512)
  endif()
endif()
