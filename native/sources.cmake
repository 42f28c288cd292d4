# The kernel sets of the processor that is compiled for, as sources of `target`. Only these files are
# compiled for more than the baseline; which set is used is decided at run time (kernels/dispatch.cpp).
function(add_kernels target)
  set(here ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_include_directories(${target} PRIVATE ${here})
  target_sources(${target} PRIVATE
    ${here}/layers/layers.cpp ${here}/layers/stream_step.cpp ${here}/ops/ops.cpp ${here}/kernels/repack.cpp ${here}/kernels/dispatch.cpp ${here}/kernels/portable.cpp
    ${here}/ops/portable.cpp)
  # Aligned code: else the speed of a loop depends on what stands before it in the file (devlog, 2026-11-26).
  target_compile_options(${target} PRIVATE -O3 -falign-functions=64 -falign-loops=32 -Wall -Wextra -fno-math-errno -fno-trapping-math)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_sources(${target} PRIVATE ${here}/kernels/avx2.cpp ${here}/kernels/vnni.cpp ${here}/ops/avx2.cpp)
    target_compile_definitions(${target} PRIVATE CENACLE_AVX2)
    set(avx2 -mavx2 -mfma -mf16c -mbmi2)
    set_source_files_properties(${here}/kernels/avx2.cpp ${here}/ops/avx2.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_OPTIONS "${avx2}")
    set_source_files_properties(${here}/kernels/vnni.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_OPTIONS "${avx2};-mavx512f;-mavx512vl;-mavx512bw;-mavx512dq;-mavx512vnni;-Wno-maybe-uninitialized;-Wno-uninitialized")
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    target_sources(${target} PRIVATE ${here}/kernels/neon.cpp)
    target_compile_definitions(${target} PRIVATE CENACLE_NEON)
    set_source_files_properties(${here}/kernels/neon.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_OPTIONS "-march=armv8.2-a+dotprod")
  endif()
endfunction()

# Make `target` stop at the first bad access to memory or undefined operation (`make sanitize`).
option(CENACLE_SANITIZE "Compile with AddressSanitizer and UndefinedBehaviorSanitizer" OFF)
function(add_sanitizers target)
  if(CENACLE_SANITIZE)
    set(flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
    target_compile_options(${target} PRIVATE ${flags})
    target_link_options(${target} PRIVATE ${flags})
  endif()
endfunction()
