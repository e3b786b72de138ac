# What the core needs from outside, as target torch_ext_third_party. Looked up
# on the system, then in .deps, where `make deps` unpacks Debian packages, then
# (nlohmann_json only) among Python's packages.

find_package(Threads REQUIRED)

set(torch_ext_deps ${PROJECT_SOURCE_DIR}/.deps/usr)
add_library(torch_ext_third_party INTERFACE)
target_link_libraries(torch_ext_third_party INTERFACE Threads::Threads)

function(torch_ext_find_header variable header package)
  find_path(${variable} ${header} PATHS ${torch_ext_deps}/include ${ARGN})
  mark_as_advanced(${variable})
  if(NOT ${variable})
    message(FATAL_ERROR "<${header}> is missing: type `apt-get install "
                        "${package}` or, without root, `make deps`.")
  endif()
  target_include_directories(torch_ext_third_party SYSTEM INTERFACE
                             ${${variable}})
endfunction()

file(GLOB torch_ext_pypi
  $ENV{VIRTUAL_ENV}/lib/python3*/site-packages/nlohmann_json/include
  ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nlohmann_json/include)
torch_ext_find_header(TORCH_EXT_XXHASH_DIR xxhash.h libxxhash-dev)
torch_ext_find_header(TORCH_EXT_NLOHMANN_DIR nlohmann/json.hpp
                      nlohmann-json3-dev ${torch_ext_pypi})

# libaio, else raw system calls. A wheel and a static library make raw calls,
# for they cannot count on libaio.so where they are installed or linked.
set(torch_ext_raw_aio ON)
if(BUILD_SHARED_LIBS AND NOT TORCH_EXT_RAW_AIO AND NOT TORCH_EXT_WHEEL)
  find_path(TORCH_EXT_LIBAIO_DIR libaio.h)
  find_library(TORCH_EXT_LIBAIO aio)
  mark_as_advanced(TORCH_EXT_LIBAIO_DIR TORCH_EXT_LIBAIO)
  if(TORCH_EXT_LIBAIO_DIR AND TORCH_EXT_LIBAIO)
    set(torch_ext_raw_aio OFF)
  endif()
endif()
if(NOT torch_ext_raw_aio)
  target_include_directories(torch_ext_third_party SYSTEM INTERFACE
                             ${TORCH_EXT_LIBAIO_DIR})
  target_link_libraries(torch_ext_third_party INTERFACE ${TORCH_EXT_LIBAIO})
else()
  message(STATUS "torch_ext: raw aio system calls instead of libaio")
  target_compile_definitions(torch_ext_third_party INTERFACE TORCH_EXT_RAW_AIO)
endif()

# liburing, else there is no io_uring engine. A wheel holds the static one, for
# it cannot count on liburing.so where it is installed; so does a build that
# finds no other, as in .deps. A static library has no such engine: it would
# need liburing wherever it is linked.
set(torch_ext_liburing OFF)
if(BUILD_SHARED_LIBS AND TORCH_EXT_IO_URING)
  find_path(TORCH_EXT_LIBURING_DIR liburing.h PATHS ${torch_ext_deps}/include)
  find_library(TORCH_EXT_LIBURING_SHARED uring)
  find_library(TORCH_EXT_LIBURING_STATIC liburing.a
    PATHS ${torch_ext_deps}/lib PATH_SUFFIXES ${CMAKE_LIBRARY_ARCHITECTURE})
  mark_as_advanced(TORCH_EXT_LIBURING_DIR TORCH_EXT_LIBURING_SHARED
                   TORCH_EXT_LIBURING_STATIC)
  set(kind STATIC)
  if(TORCH_EXT_LIBURING_SHARED AND NOT TORCH_EXT_WHEEL)
    set(kind SHARED)
  endif()
  if(TORCH_EXT_LIBURING_DIR AND TORCH_EXT_LIBURING_${kind})
    # A static one may have been compiled without -fPIC.
    include(CheckCXXSourceCompiles)
    block()
      set(CMAKE_REQUIRED_FLAGS -fPIC)
      set(CMAKE_REQUIRED_LINK_OPTIONS -shared)
      set(CMAKE_REQUIRED_INCLUDES ${TORCH_EXT_LIBURING_DIR})
      set(CMAKE_REQUIRED_LIBRARIES ${TORCH_EXT_LIBURING_${kind}})
      check_cxx_source_compiles([[
        #include <liburing.h>
        int make(io_uring* ring, io_uring_params* params) {
          return io_uring_queue_init_params(1, ring, params);
        }]] TORCH_EXT_LIBURING_${kind}_WORKS)
    endblock()
    if(TORCH_EXT_LIBURING_${kind}_WORKS)
      set(torch_ext_liburing ${TORCH_EXT_LIBURING_${kind}})
    endif()
  endif()
endif()
if(torch_ext_liburing)
  target_include_directories(torch_ext_third_party SYSTEM INTERFACE
                             ${TORCH_EXT_LIBURING_DIR})
  target_link_libraries(torch_ext_third_party INTERFACE ${torch_ext_liburing})
  target_compile_definitions(torch_ext_third_party INTERFACE TORCH_EXT_LIBURING)
else()
  message(STATUS "torch_ext: no liburing: no io_uring engine")
endif()

# With the toolkit's headers, cuda_runtime.cpp checks its prototypes against
# NVIDIA's. Nothing of the toolkit is linked.
if(TORCH_EXT_TESTS)
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND)
    target_include_directories(torch_ext_third_party SYSTEM INTERFACE
                               ${CUDAToolkit_INCLUDE_DIRS})
  endif()
endif()
