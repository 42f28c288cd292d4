// Which kernel sets this processor can run.
#include "kernels/kernels.h"

#ifdef CENACLE_NEON
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace cenacle {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> all;
#ifdef CENACLE_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")) {
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      all.push_back(&vnni);
    all.push_back(&avx2);
  }
#endif
#ifdef CENACLE_NEON
  // What was compiled for ARMv8.2 with dot products may use all of these.
  constexpr unsigned long wanted = HWCAP_ASIMDDP | HWCAP_ASIMDHP | HWCAP_ASIMDRDM | HWCAP_ATOMICS;
  if ((getauxval(AT_HWCAP) & wanted) == wanted) all.push_back(&neon);
#endif
  all.push_back(&portable);
  return all;
}

}  // namespace cenacle
