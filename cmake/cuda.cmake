# Looks for a CUDA toolkit and never fails a build over it.
#
#   FASTCONV_CUDA          AUTO: use a toolkit if there is one · ON: warn if there is none · OFF: do not look
#   FASTCONV_CUDA_VERSION  the toolkit's version, e.g. 13.0, or empty
#   FASTCONV_CUDA_REASON   why this build holds no CUDA kernel, for build_info(); empty if it holds some
#
# nvcc is asked directly, without enabling CMake's CUDA language: that would compile a test program at every configuration, for
# a build that has nothing to compile with it yet.

set(FASTCONV_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON or OFF")
set_property(CACHE FASTCONV_CUDA PROPERTY STRINGS AUTO ON OFF)

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
    if(status EQUAL 0 AND banner MATCHES "release ([0-9]+\\.[0-9]+)")
      set(FASTCONV_CUDA_VERSION "${CMAKE_MATCH_1}" PARENT_SCOPE)
      set(reason "no CUDA kernel exists yet")
    else()
      set(reason "${FASTCONV_NVCC} --version failed")
    endif()
  endif()
  set(FASTCONV_CUDA_REASON "${reason}" PARENT_SCOPE)
  if(NOT FASTCONV_CUDA STREQUAL "AUTO")
    message(WARNING "FASTCONV_CUDA=${FASTCONV_CUDA}, but: ${reason}")
  endif()
endfunction()

fastconv_find_cuda()
if(FASTCONV_CUDA_VERSION)
  message(STATUS "CUDA toolkit ${FASTCONV_CUDA_VERSION}: ${FASTCONV_CUDA_REASON}")
else()
  message(STATUS "CUDA: ${FASTCONV_CUDA_REASON}")
endif()
