# Targets torch_ext_libtorch and torch_ext_libtorch_python: the LibTorch inside
# Python's torch and its Python side, without find_package(Torch), which is
# fatal where there is no CUDA toolkit. Sets TORCH_EXT_NO_TORCH to the reason
# when there is none.

find_package(Python3 COMPONENTS Interpreter Development.Module)
if(NOT Python3_Development.Module_FOUND)
  set(TORCH_EXT_NO_TORCH "no Python headers (python3-dev)")
  return()
endif()

# find_spec does not import torch, which takes seconds.
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE TORCH_EXT_TORCH_ROOT
  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
if(failed OR NOT EXISTS ${TORCH_EXT_TORCH_ROOT}/lib)
  set(TORCH_EXT_NO_TORCH "${Python3_EXECUTABLE} has no torch")
  return()
endif()
message(STATUS "torch_ext: torch in ${TORCH_EXT_TORCH_ROOT}")

add_library(torch_ext_libtorch INTERFACE)
target_include_directories(torch_ext_libtorch SYSTEM INTERFACE
  ${TORCH_EXT_TORCH_ROOT}/include
  ${TORCH_EXT_TORCH_ROOT}/include/torch/csrc/api/include)
foreach(name torch torch_cpu c10)
  target_link_libraries(torch_ext_libtorch INTERFACE
    ${TORCH_EXT_TORCH_ROOT}/lib/lib${name}.so)
endforeach()
add_library(torch_ext_libtorch_python INTERFACE)
target_link_libraries(torch_ext_libtorch_python INTERFACE
  ${TORCH_EXT_TORCH_ROOT}/lib/libtorch_python.so)
