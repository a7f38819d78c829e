# Looks for a CUDA toolkit, adds the CUDA kernels where there is one, and never fails a build over it.
#
#   FASTCONV_CUDA                AUTO: use a toolkit if there is one · ON: warn if there is none · OFF: do not look
#   FASTCONV_CUDA_ARCHITECTURES  what the kernels are compiled for: the PTX of the least, and machine code of each from it
#   FASTCONV_CUDA_VERSION        the toolkit's version, e.g. 13.0, or empty
#   FASTCONV_CUDA_REASON         why this build holds no CUDA kernel, for build_info(); empty if it holds some

include(cmake/cuda_architectures.cmake)

set(FASTCONV_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON or OFF")
set_property(CACHE FASTCONV_CUDA PROPERTY STRINGS AUTO ON OFF)
# No kernel uses what 8.0 has not, so its PTX, one pass of the compiler, serves all: it becomes machine code for each GPU of the
# list, and is there for GPUs to come (docs/cuda.md has what other lists cost).
set(FASTCONV_CUDA_ARCHITECTURES "80;86;89;90" CACHE STRING "GPUs to compile for, by compute capability")

set(FASTCONV_CUDA_VERSION "")
set(FASTCONV_CUDA_REASON "")

function(fastconv_find_cuda)
  if(NOT FASTCONV_CUDA STREQUAL "AUTO" AND NOT FASTCONV_CUDA)
    set(FASTCONV_CUDA_REASON "FASTCONV_CUDA=${FASTCONV_CUDA}" PARENT_SCOPE)
    return()
  endif()

  # CMAKE_CUDA_COMPILER and CUDACXX first: whoever sets them means it.
  set(hints "")
  if(CMAKE_CUDA_COMPILER)
    get_filename_component(directory "${CMAKE_CUDA_COMPILER}" DIRECTORY)
    list(APPEND hints "${directory}")
  endif()
  if(DEFINED ENV{CUDACXX})
    get_filename_component(directory "$ENV{CUDACXX}" DIRECTORY)
    list(APPEND hints "${directory}")
  endif()
  foreach(variable CUDA_HOME CUDA_PATH)
    if(DEFINED ENV{${variable}})
      list(APPEND hints "$ENV{${variable}}/bin")
    endif()
  endforeach()
  find_program(FASTCONV_NVCC nvcc HINTS ${hints} PATHS /usr/local/cuda/bin)
  mark_as_advanced(FASTCONV_NVCC)

  if(NOT FASTCONV_NVCC)
    set(reason "no nvcc found")
  else()
    execute_process(COMMAND "${FASTCONV_NVCC}" --version OUTPUT_VARIABLE banner RESULT_VARIABLE status ERROR_QUIET)
    if(NOT status EQUAL 0 OR NOT banner MATCHES "release ([0-9]+\\.[0-9]+)")
      set(reason "${FASTCONV_NVCC} --version failed")
    elseif(CMAKE_MATCH_1 VERSION_LESS 12.0)
      set(reason "nvcc ${CMAKE_MATCH_1} has no C++20, 12.0 has")
    else()
      set(FASTCONV_CUDA_VERSION "${CMAKE_MATCH_1}" PARENT_SCOPE)
      set(reason "")
    endif()
  endif()
  set(FASTCONV_CUDA_REASON "${reason}" PARENT_SCOPE)
  if(reason AND NOT FASTCONV_CUDA STREQUAL "AUTO")
    message(WARNING "FASTCONV_CUDA=${FASTCONV_CUDA}, but: ${reason}")
  endif()
endfunction()

fastconv_find_cuda()

if(FASTCONV_CUDA_VERSION)
  # Set before the language is enabled, which would otherwise choose one for this machine's GPU, or for none.
  set(CMAKE_CUDA_COMPILER "${FASTCONV_NVCC}")
  execute_process(COMMAND "${FASTCONV_NVCC}" --list-gpu-code OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REPLACE "\n" ";" known "${known}")
  fastconv_cuda_architectures("${FASTCONV_CUDA_ARCHITECTURES}" "${known}")
  set(CMAKE_CUDA_ARCHITECTURES "${FASTCONV_CUDA_LEAST}")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  else()
    set(FASTCONV_CUDA_VERSION "")
    set(FASTCONV_CUDA_REASON "${FASTCONV_NVCC} does not work with ${CMAKE_CXX_COMPILER}")
  endif()
endif()

if(FASTCONV_CUDA_VERSION)
  message(STATUS "CUDA toolkit ${FASTCONV_CUDA_VERSION}, kernels for ${FASTCONV_CUDA_BUILT_FOR}")
else()
  set(FASTCONV_CUDA_BUILT_FOR "")
  message(STATUS "CUDA: ${FASTCONV_CUDA_REASON}")
endif()

# Objects of the sources that follow, linked into `target`.
function(fastconv_add_cuda_objects target name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_link_libraries(${name} PRIVATE CUDA::cudart_static)
  target_compile_definitions(${name} PRIVATE FASTCONV_CUDA FASTCONV_CUDA_ARCHITECTURES="${FASTCONV_CUDA_BUILT_FOR}")
  target_compile_features(${name} PRIVATE cxx_std_20)
  set_target_properties(${name} PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static
                                           CUDA_ARCHITECTURES OFF)
  # Not the feature cuda_std_20: CMake 3.25 does not know it for compilers that are newer than itself.
  target_compile_options(${name} PRIVATE -Wall -Wextra
                         "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;${FASTCONV_CUDA_CODE};-Xfatbin=-compress-all;-Xptxas=-v>")
  # Registers and spills of every kernel, beside its object, for tools/check_gpu_resources.py. The interpreter of the first
  # configuration: with another one's path in their command all objects would be built again.
  set(FASTCONV_COLLECTOR "${Python_EXECUTABLE}" CACHE FILEPATH "Python that keeps the GPU kernels' resource reports")
  mark_as_advanced(FASTCONV_COLLECTOR)
  set(launcher ${FASTCONV_COLLECTOR} ${PROJECT_SOURCE_DIR}/cmake/collect_resources.py ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${name} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

# The kernels, and what asks the runtime about GPUs, as part of `target`.
function(fastconv_add_cuda target)
  find_package(CUDAToolkit REQUIRED)
  file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/kernels/*.cu)
  # Attention's kernels take ten times as long as others: an object for each dtype, so that they are compiled side by side, and
  # first, so that the build does not end with one core waiting for them.
  file(GLOB long CONFIGURE_DEPENDS csrc/cuda/kernels/sdpa_*.cu)
  list(REMOVE_ITEM kernels ${long})
  foreach(dtype BF16 F16 F32)
    fastconv_add_cuda_objects(${target} fastconv_cuda_long_${dtype} ${long})
    target_compile_definitions(fastconv_cuda_long_${dtype} PRIVATE FASTCONV_ONE_DTYPE FASTCONV_${dtype})
  endforeach()
  fastconv_add_cuda_objects(${target} fastconv_cuda ${kernels} csrc/cuda/gpu.cpp)
  # Static, so that importing needs no CUDA library, and hidden: torch may bring a runtime of its own.
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
  target_link_options(${target} PUBLIC LINKER:--exclude-libs,libcudart_static.a)
  target_compile_definitions(${target} PUBLIC FASTCONV_CUDA)
endfunction()
