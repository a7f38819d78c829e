# What FASTCONV_CUDA_ARCHITECTURES asks of nvcc. In a file of its own, so that a test can run it without a toolkit.

# fastconv_cuda_architectures(GIVEN KNOWN): reads a list of compute capabilities, GIVEN, for an nvcc that has those of KNOWN, in the
# form of its --list-gpu-code. Sets
#
#   FASTCONV_CUDA_LEAST      the least, whose PTX everything is made of
#   FASTCONV_CUDA_BUILT_FOR  all of them, in order, with spaces between them
#   FASTCONV_CUDA_CODE       nvcc's options: one pass of the compiler to that PTX, and machine code of each from it
#
# 90a is read as 90: the letter is for what only that GPU has, of which the PTX of the least knows nothing.
function(fastconv_cuda_architectures given known)
  set(found "")
  foreach(one IN LISTS given)
    string(STRIP "${one}" one)
    if(NOT one MATCHES "^([0-9]+)[af]?$")
      message(FATAL_ERROR "FASTCONV_CUDA_ARCHITECTURES: got '${one}', expected compute capabilities with ';' between them: 80;90")
    endif()
    set(number "${CMAKE_MATCH_1}")
    if(number LESS 80)
      message(FATAL_ERROR "FASTCONV_CUDA_ARCHITECTURES: got ${one}, expected 80 or later")
    endif()
    if(NOT "sm_${number}" IN_LIST known)
      string(REPLACE ";" " " known "${known}")
      message(FATAL_ERROR "FASTCONV_CUDA_ARCHITECTURES: got ${one}, and this nvcc has ${known}")
    endif()
    list(APPEND found "${number}")
  endforeach()
  if(NOT found)
    message(FATAL_ERROR "FASTCONV_CUDA_ARCHITECTURES is empty, expected compute capabilities: 80;90")
  endif()
  list(REMOVE_DUPLICATES found)
  list(SORT found COMPARE NATURAL)
  list(GET found 0 least)
  list(JOIN found " " all)
  list(JOIN found ",sm_" code)
  set(FASTCONV_CUDA_LEAST "${least}" PARENT_SCOPE)
  set(FASTCONV_CUDA_BUILT_FOR "${all}" PARENT_SCOPE)
  set(FASTCONV_CUDA_CODE "--gpu-architecture=compute_${least};--gpu-code=compute_${least},sm_${code}" PARENT_SCOPE)
endfunction()
