# One object library for each ISA, all from the same sources but for avx512_bf16, which has what its few kernels need.
#
#   FASTCONV_ISAS  those to build; scalar is always among them, and avx512 where avx512_bf16 is. Fewer than all are for the
#                  sanitizers, whose build takes minutes for each, and not for a package.

function(fastconv_add_isa target flags)
  add_library(fastconv_cpu_${target} OBJECT ${ARGN})
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

set(FASTCONV_ISAS "scalar;avx2;avx512;avx512_bf16" CACHE STRING "Instruction sets to build for, on x86-64")
set(FASTCONV_ISA_DEFINITIONS "")

fastconv_add_isa(scalar "" ${FASTCONV_CPU_SOURCES})
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  if("avx2" IN_LIST FASTCONV_ISAS)
    fastconv_add_isa(avx2 "-march=x86-64-v3" ${FASTCONV_CPU_SOURCES})
    list(APPEND FASTCONV_ISA_DEFINITIONS FASTCONV_AVX2)
  endif()
  if("avx512" IN_LIST FASTCONV_ISAS)
    # GCC and clang prefer 256-bit vectors by default because early Skylake lowered its clock for 512-bit ones.
    fastconv_add_isa(avx512 "-march=x86-64-v4;-mprefer-vector-width=512" ${FASTCONV_CPU_SOURCES})
    list(APPEND FASTCONV_ISA_DEFINITIONS FASTCONV_AVX512)
    # Products of pairs of bf16: sources of their own, and those of blocks that they use.
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag("-march=x86-64-v4 -mavx512bf16" FASTCONV_HAS_AVX512_BF16)
    if("avx512_bf16" IN_LIST FASTCONV_ISAS AND FASTCONV_HAS_AVX512_BF16)
      file(GLOB FASTCONV_PAIR_SOURCES CONFIGURE_DEPENDS csrc/cpu/kernels/avx512_bf16/*.cpp csrc/cpu/blocks/avx512_bf16/*.cpp)
      fastconv_add_isa(avx512_bf16 "-march=x86-64-v4;-mavx512bf16;-mprefer-vector-width=512" ${FASTCONV_PAIR_SOURCES}
                       csrc/cpu/blocks/fma_burst.cpp csrc/cpu/blocks/input_gradient.cpp csrc/cpu/blocks/bias_gradient.cpp
                       csrc/cpu/blocks/attention.cpp csrc/cpu/kernels/sdpa_fwd_flash.cpp
                       csrc/cpu/kernels/sdpa_bwd_flash.cpp)
      list(APPEND FASTCONV_ISA_DEFINITIONS FASTCONV_AVX512_BF16)
    endif()
  endif()
endif()
